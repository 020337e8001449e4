"""Weight rules: how the tensors of a published checkpoint map onto ours, as invertible descriptions.

`{}` in a pattern stands for one dotted component (a layer number). A rule list read forwards loads a checkpoint, read
backwards it writes one; `weights` does both.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from opsin.spec.base import Spec


class Rename(Spec):
    """The same tensor under another name."""

    kind: Literal["rename"] = "rename"
    source: str
    target: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source.count("{}") != self.target.count("{}"):
            raise ValueError(f"{self.source!r} and {self.target!r} have different numbers of {{}}")
        return self


class Reshape(Spec):
    """The same numbers under another name and shape: a strided convolution is a linear layer over flat patches."""

    kind: Literal["reshape"] = "reshape"
    source: str
    target: str
    source_shape: tuple[int, ...]
    """Shape in the checkpoint; -1 once where it follows from the rest."""
    target_shape: tuple[int, ...]
    """Shape in the model; -1 likewise."""


class Drop(Spec):
    """A tensor that checkpoints may hold and the model has no use for. It is neither needed nor written back."""

    kind: Literal["drop"] = "drop"
    source: str
    reason: str


Rule = Annotated[Rename | Reshape | Drop, Field(discriminator="kind")]


class Layout(Spec):
    """One published way to name the tensors of a model."""

    name: str
    """`original`, `hf`, `hf-v5`, ..."""
    rules: tuple[Rule, ...]
    optional: tuple[str, ...] = ()
    """Prefixes of our names that a checkpoint may leave out as a whole, because another repository holds them."""
