"""Rules applied to names: which tensor of a checkpoint is which of ours, and back."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.spec.rules import Constant, Drop, Fill, Layout, Rename, Reshape, Split, targets_of

NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d*)(?=\.|$)")
"""A layer number: one dotted component of digits, as Python prints integers."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """One tensor of ours and the tensor of the checkpoint that it is, or is part of."""

    source: str
    target: str
    rule: Rename | Reshape | Split
    piece: int = 0
    """Of a split tensor: which of its targets this is."""

    def source_shape(self, target_shape: Shape) -> Shape:
        """Shape in the checkpoint of a tensor that has `target_shape` in the model."""
        match self.rule:
            case Reshape():
                return self.rule.source_shape
            case Split():
                return (self.rule.groups * sum(self.rule.rows), *target_shape[1:])
            case _:
                return target_shape


class Renamer:
    """A layout, ready to look names up in both directions."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        kept = [rule for rule in layout.rules if not isinstance(rule, Drop | Fill | Constant)]
        self._by_source = {rule.source: rule for rule in kept}
        self._by_target = {target: (rule, piece) for rule in kept for piece, target in enumerate(targets_of(rule))}
        self._filled = {rule.target: rule for rule in layout.rules if isinstance(rule, Fill)}
        self._dropped = {rule.source for rule in layout.rules if isinstance(rule, Drop)}
        self.constants = {rule.source: rule for rule in layout.rules if isinstance(rule, Constant)}
        """What a checkpoint holds beside the model's tensors, by name."""

    def from_source(self, name: str) -> tuple[Match, ...]:
        """The matches of a checkpoint's tensor, several where it is split; none where no rule knows it."""
        for template, numbers in _templates(name):
            if rule := self._by_source.get(template):
                targets = enumerate(targets_of(rule))
                return tuple(Match(name, target.format(*numbers), rule, piece) for piece, target in targets)
        return ()

    def from_target(self, name: str) -> Match | None:
        """The match of a model's tensor, or None where the layout has no name for it."""
        for template, numbers in _templates(name):
            if found := self._by_target.get(template):
                rule, piece = found
                return Match(rule.source.format(*numbers), name, rule, piece)
        return None

    def fills(self, name: str) -> Fill | None:
        """The rule that gives a model's tensor its only value, where this layout does not store it."""
        return next((self._filled[template] for template, _ in _templates(name) if template in self._filled), None)

    def drops(self, name: str) -> bool:
        """Whether a checkpoint's tensor is known and of no use."""
        return any(template in self._dropped for template, _ in _templates(name))

    def num_known(self, names: Iterable[str], part: str = "") -> int:
        """How many of a checkpoint's names this layout keeps, among those that are ours under the prefix `part`."""
        return sum(match.target.startswith(part) for name in names for match in self.from_source(name)[:1])


def piece_of(tensor: Tensor, match: Match) -> Tensor:
    """The tensor of ours that a checkpoint's tensor is or holds."""
    match match.rule:
        case Reshape():
            return tensor.reshape(match.rule.target_shape)
        case Split():
            rule, piece = match.rule, match.piece
            grouped = tensor.unflatten(0, (rule.groups, sum(rule.rows)))
            return grouped.narrow(1, sum(rule.rows[:piece]), rule.rows[piece]).flatten(0, 1)
        case _:
            return tensor


def constant(rule: Constant, dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor that are always the same."""
    return torch.eye(*rule.shape, dtype=dtype) if rule.value == "identity" else torch.zeros(rule.shape, dtype=dtype)


def identity(names: Iterable[str]) -> Layout:
    """The layout of a model saved under our own names."""
    return Layout(name="opsin", rules=tuple(Rename(source=name, target=name) for name in names))


def _templates(name: str) -> tuple[tuple[str, list[str]], ...]:
    """The name as it stands, whose numbers are part of the rule, and with `{}` for each number."""
    return (name, []), (NUMBER.sub("{}", name), NUMBER.findall(name))
