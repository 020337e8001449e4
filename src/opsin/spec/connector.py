"""What stands between tower and language model: features in, rows (one per token slot) out."""

from typing import Annotated, Literal

from pydantic import Field

from opsin.spec.base import Spec
from opsin.spec.plan import Grid


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


ConnectorConfig = Annotated[LinearConnector | MLPConnector, Field(discriminator="kind")]
