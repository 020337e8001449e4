"""Low-rank adapters (LoRA, arXiv:2106.09685) as a description."""

import math
from typing import Literal

from pydantic import Field

from opsin.spec.base import Spec


class Lora(Spec):
    """What is added to linear layers that stay frozen: y = W x + scale * B A x, A with `rank` rows, B from zero."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    """How much the change weighs: see `scaling`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of A that is dropped, in training only."""
    targets: tuple[str, ...] = Field(default=("decoder",), min_length=1)
    """Linear layers by part or by glob over their names (`decoder.layers.*.attn.q`). Patch embedding and head are never
    among them."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """scale = alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""

    @property
    def scale(self) -> float:
        """Factor of the change."""
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))
