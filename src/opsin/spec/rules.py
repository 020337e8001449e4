"""Weight rules: how the tensors of a published checkpoint map onto ours, as invertible descriptions.

`{}` in a pattern stands for one layer number. A rule list read forwards loads a checkpoint, read backwards it writes
one; `weights` does both.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from opsin.spec.base import Spec


class Rename(Spec):
    """The same tensor under another name."""

    kind: Literal["rename"] = "rename"
    source: str
    """Name in the checkpoint."""
    target: str
    """Name in the model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_numbers(self.source, self.target)
        return self


class Reshape(Spec):
    """The same numbers under another name and shape: a strided convolution is a linear layer over flat patches."""

    kind: Literal["reshape"] = "reshape"
    source: str
    target: str
    source_shape: tuple[int, ...]
    """Shape in the checkpoint."""
    target_shape: tuple[int, ...]
    """Shape in the model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_numbers(self.source, self.target)
        return self


class Split(Spec):
    """One tensor of the checkpoint that is several of ours, stacked along its first axis.

    With `groups` the stack repeats: each group holds `rows[0]` rows of the first target, then `rows[1]` of the second,
    and so on (InternLM2 groups its queries by key head, Qwen-VL's tower groups queries, keys and values by head).
    """

    kind: Literal["split"] = "split"
    source: str
    targets: tuple[str, ...] = Field(min_length=2)
    rows: tuple[int, ...]
    """Rows of each target in one group."""
    groups: int = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.rows) != len(self.targets):
            raise ValueError(
                f"{self.source!r} is split into {len(self.targets)} tensors by {len(self.rows)} row counts"
            )
        for target in self.targets:
            _check_numbers(self.source, target)
        return self


class Fill(Spec):
    """A tensor of ours that this layout does not store because all its numbers are `value`. It is not written back."""

    kind: Literal["fill"] = "fill"
    target: str
    value: float = 0.0
    reason: str


class Drop(Spec):
    """A tensor that checkpoints may hold and the model has no use for. It is neither needed nor written back."""

    kind: Literal["drop"] = "drop"
    source: str
    reason: str


class Constant(Spec):
    """A tensor that this layout has to hold and the model has not, because with these numbers it changes nothing. It is
    written, needed, and refused where it holds other numbers."""

    kind: Literal["constant"] = "constant"
    source: str
    shape: tuple[int, ...]
    value: Literal["zeros", "identity"]
    beside: str
    """The tensor of ours that it comes with."""
    reason: str


Rule = Annotated[Rename | Reshape | Split | Fill | Drop | Constant, Field(discriminator="kind")]


class Layout(Spec):
    """One published way to name the tensors of a model."""

    name: str
    """`original`, `hf`, `hf-v5`, ..."""
    rules: tuple[Rule, ...]
    optional: tuple[str, ...] = ()
    """Prefixes of our names that a checkpoint may leave out as a whole, because another repository holds them."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        sources = [rule.source for rule in self.rules if not isinstance(rule, Fill)]
        targets = [target for rule in self.rules for target in targets_of(rule)]
        for kind, names in (("source", sources), ("target", targets)):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"layout {self.name!r} has two rules for {kind} {sorted(twice)[0]!r}")
        return self


def targets_of(rule: Rule) -> tuple[str, ...]:
    """Our names that a rule gives a value to."""
    match rule:
        case Drop() | Constant():
            return ()
        case Split():
            return rule.targets
        case _:
            return (rule.target,)


def _check_numbers(source: str, target: str) -> None:
    if source.count("{}") != target.count("{}"):
        raise ValueError(f"{source!r} and {target!r} have different numbers of {{}}")
