"""A whole vision-language model as one value, and the plan of one picture for it."""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from opsin.errors import PlanError
from opsin.spec.base import Spec
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import ConnectorConfig
from opsin.spec.decoder import DecoderConfig
from opsin.spec.plan import ImagePlan, Size
from opsin.spec.resolution import ResolutionConfig
from opsin.spec.vision import VisionConfig


class VLMConfig(Spec):
    """Tower, connector, decoder, resolution and chat format. Checks that they agree."""

    vision: VisionConfig
    connector: ConnectorConfig
    decoder: DecoderConfig
    resolution: ResolutionConfig
    chat: ChatFormat
    image_token_id: int | None = None
    """Id that stands at picture slots in `Encoded.ids` and in exported prompts; None where the checkpoint has none
    (the authors' LLaVA marks slots outside the vocabulary). The model never reads it: slots are carried as data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.resolution.tile_size != self.vision.image_size:
            raise ValueError(
                f"resolution.tile_size {self.resolution.tile_size} differs from vision.image_size {self.vision.image_size}: "
                "the tower's learned positions fit one size only"
            )
        return self

    @property
    def uses_newline(self) -> bool:
        """Whether the model has a learned newline row."""
        return self.resolution.uses_newline

    def plan(self, size: Size) -> ImagePlan:
        """The plan of one picture of (width, height) pixels. Raises PlanError for a size that cannot be served."""
        tiling = self.resolution.tiling(size, self.vision.patch_size)
        row_grids = [self.connector.row_grid(tile.grid) for tile in tiling.tiles]
        if self.vision.class_token == "keep":
            # The class token is one more row in front of each tile, and no raster can be built from such tiles.
            row_grids = [(1, 1, 1 + t * h * w) for t, h, w in row_grids]
        layout = self.resolution.layout(tiling, row_grids)
        return ImagePlan(
            size=size,
            canvases=tiling.canvases,
            tiles=tiling.tiles,
            row_grids=tuple(row_grids),
            layout=layout,
            mosaic=(tiling.columns, tiling.rows),
        )

    def plan_all(self, sizes: Sequence[Size]) -> list[ImagePlan]:
        """Plans of several pictures; an error names the picture's number."""
        plans = []
        for number, size in enumerate(sizes, start=1):
            try:
                plans.append(self.plan(size))
            except PlanError as error:
                raise PlanError(f"picture {number} of {len(sizes)}: {error}") from None
        return plans
