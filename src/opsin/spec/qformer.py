"""BLIP-2's Q-Former: as a connector, and with its text side as the model of stage 1 and of retrieval."""

from typing import ClassVar, Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from opsin.spec.base import Spec
from opsin.spec.plan import Grid, ImagePlan, Size
from opsin.spec.resolution import Squash
from opsin.spec.vision import VisionConfig


class QFormerConfig(Spec):
    """Learned queries read a tile through a BERT-like stack (arXiv:2301.12597 section 3.1). Defaults are BERT-base."""

    kind: Literal["qformer"] = "qformer"
    num_queries: PositiveInt = 32
    dim: PositiveInt = 768
    num_layers: PositiveInt = 12
    num_heads: PositiveInt = 12
    mlp_dim: PositiveInt = 3072
    cross_every: PositiveInt = 2
    """Queries look at the features in layers 0, n, 2n, ...; text never does."""
    norm_eps: PositiveFloat = 1e-12
    feature_norm_eps: PositiveFloat = 1e-5
    """Of the LayerNorm on the tower's features, which trains with the queries: the authors' is torch's 1e-5, that of
    converted checkpoints the tower's 1e-6."""
    dropout: NonNegativeFloat = 0.1
    """Share of attention weights, embeddings and outputs that training drops (BERT's)."""

    FLOAT32: ClassVar[tuple[str, ...]] = ("queries", "qformer.")
    """Beginnings of the names of its tensors that are loaded in float32 where the rest is in half precision, as
    transformers does."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        return self

    def row_grid(self, grid: Grid) -> Grid:
        """Rows (1, 1, num_queries), whatever the tile."""
        return (1, 1, self.num_queries)


class TextControls(Spec):
    """Names of the control tokens around a text."""

    first: str = "[CLS]"
    last: str = "[SEP]"
    caption: str = "[DEC]"
    """Takes the first one's place where the text is to be written rather than read."""


class RetrieverConfig(Spec):
    """Tower, Q-Former with its text side, and the heads that compare a picture with a text."""

    vision: VisionConfig
    qformer: QFormerConfig
    resolution: Squash
    vocab_size: PositiveInt = 30_523
    """bert-base-uncased and `[DEC]`."""
    max_positions: PositiveInt = 512
    """Longest text that has positions; `max_tokens` is what was trained."""
    max_tokens: PositiveInt = 32
    """Texts are cut here, both control tokens included."""
    embed_dim: PositiveInt = 256
    """Width in which pictures and texts are compared."""
    heads: Literal["all", "matching"] = "all"
    """`all`: the heads of the three losses of stage 1 and their temperature; `matching`: without the captions' head and
    the temperature, which transformers does not keep."""
    controls: TextControls = TextControls()
    image_token_id: int | None = None
    """Id that stands `num_queries` times before a text in transformers' inputs. Never read here."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vision.positions == "learned" and self.resolution.tile_size != self.vision.image_size:
            raise ValueError(
                f"resolution.tile_size {self.resolution.tile_size} differs from vision.image_size "
                f"{self.vision.image_size}: the tower's learned positions fit one size only"
            )
        if self.max_tokens > self.max_positions:
            raise ValueError(f"max_tokens {self.max_tokens} is more than max_positions {self.max_positions}")
        return self

    def plan(self, size: Size) -> ImagePlan:
        """The plan of one picture of (width, height) pixels: one tile. Raises PlanError."""
        tiling = self.resolution.tiling(size, self.vision.patch_size)
        row_grids = tuple(self.qformer.row_grid(tile.grid) for tile in tiling.tiles)
        layout = self.resolution.layout(tiling, row_grids)
        return ImagePlan(size=size, canvases=tiling.canvases, tiles=tiling.tiles, row_grids=row_grids, layout=layout)
