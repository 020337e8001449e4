"""Rules applied to names: which tensor of a checkpoint is which of ours, and back."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from opsin.spec.rules import Drop, Layout, Rename, Reshape

NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d*)(?=\.|$)")
"""A layer number: one dotted component of digits, as Python prints integers."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """One tensor under both names."""

    source: str
    target: str
    rule: Rename | Reshape

    def source_shape(self, target_shape: Shape) -> Shape:
        """Shape in the checkpoint of a tensor that has `target_shape` in the model."""
        return self.rule.source_shape if isinstance(self.rule, Reshape) else target_shape


class Renamer:
    """A layout, ready to look names up in both directions."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        kept = [rule for rule in layout.rules if not isinstance(rule, Drop)]
        self._by_source: dict[str, Rename | Reshape] = {rule.source: rule for rule in kept}
        self._by_target: dict[str, Rename | Reshape] = {rule.target: rule for rule in kept}
        self._dropped = {rule.source for rule in layout.rules if isinstance(rule, Drop)}

    def from_source(self, name: str) -> Match | None:
        """The match of a checkpoint's tensor, or None where no rule knows it."""
        for template, numbers in _templates(name):
            if rule := self._by_source.get(template):
                return Match(name, rule.target.format(*numbers), rule)
        return None

    def from_target(self, name: str) -> Match | None:
        """The match of a model's tensor, or None where the layout has no name for it."""
        for template, numbers in _templates(name):
            if rule := self._by_target.get(template):
                return Match(rule.source.format(*numbers), name, rule)
        return None

    def drops(self, name: str) -> bool:
        """Whether a checkpoint's tensor is known and of no use."""
        return any(template in self._dropped for template, _ in _templates(name))

    def num_known(self, names: Iterable[str], part: str = "") -> int:
        """How many of a checkpoint's names this layout keeps, among those that are ours under the prefix `part`."""
        matches = (self.from_source(name) for name in names)
        return sum(match is not None and match.target.startswith(part) for match in matches)


def identity(names: Iterable[str]) -> Layout:
    """The layout of a model saved under our own names."""
    return Layout(name="opsin", rules=tuple(Rename(source=name, target=name) for name in names))


def _templates(name: str) -> tuple[tuple[str, list[str]], ...]:
    """The name as it stands, whose numbers are part of the rule, and with `{}` for each number."""
    return (name, []), (NUMBER.sub("{}", name), NUMBER.findall(name))
