"""What stands between tower and language model: features in, rows (one per token slot) out."""

from typing import Annotated, Literal

from pydantic import Field

from opsin.errors import PlanError
from opsin.spec.base import Spec
from opsin.spec.plan import Grid
from opsin.spec.qformer import QFormerConfig


class LinearConnector(Spec):
    """One linear layer with bias (LLaVA, arXiv:2304.08485 section 4.1)."""

    kind: Literal["linear"] = "linear"

    def row_grid(self, grid: Grid) -> Grid:
        """Rows (t, h, w) for a tile of `grid` features: one each."""
        return grid


class MLPConnector(Spec):
    """`num_layers` linear layers with exact GELU between them (LLaVA-1.5, arXiv:2310.03744 section 3.2: two)."""

    kind: Literal["mlp"] = "mlp"
    num_layers: int = Field(default=2, ge=2)

    def row_grid(self, grid: Grid) -> Grid:
        """Rows (t, h, w) for a tile of `grid` features: one each."""
        return grid


class PixelShuffleConnector(Spec):
    """Two by two neighbours joined on the channel, LayerNorm, then a two-layer MLP (InternVL-1.5, arXiv:2404.16821)."""

    kind: Literal["pixel_shuffle"] = "pixel_shuffle"
    order: Literal["rows", "columns"] = "rows"
    """Order of the joined rows: `ps_version` v2 reads along rows, v1 along columns."""

    def row_grid(self, grid: Grid) -> Grid:
        """Rows (t, h / 2, w / 2)."""
        return _halved(grid)


class PatchMerger(Spec):
    """LayerNorm, then blocks of two by two patches joined on the channel and a two-layer MLP (Qwen2-VL,
    arXiv:2409.12191). The tower's patches arrive block by block (`VisionConfig.patch_block`)."""

    kind: Literal["patch_merger"] = "patch_merger"
    norm_eps: float = 1e-6

    def row_grid(self, grid: Grid) -> Grid:
        """Rows (t, h / 2, w / 2)."""
        return _halved(grid)


class Resampler(Spec):
    """`side * side` learned queries read a tile by one cross-attention with 2-D sine positions (Qwen-VL,
    arXiv:2308.12966 section 2.1)."""

    kind: Literal["resampler"] = "resampler"
    side: int = 16
    num_heads: int
    norm_eps: float = 1e-6

    def row_grid(self, grid: Grid) -> Grid:
        """Rows (1, side, side), whatever the tile."""
        return (1, self.side, self.side)


def _halved(grid: Grid) -> Grid:
    t, h, w = grid
    if h % 2 or w % 2:
        raise PlanError(f"a grid of {w}x{h} patches cannot be joined two by two; both sides must be even")
    return (t, h // 2, w // 2)


ConnectorConfig = Annotated[
    LinearConnector | MLPConnector | PixelShuffleConnector | PatchMerger | Resampler | QFormerConfig,
    Field(discriminator="kind"),
]
