"""A whole vision-language model as one value, and the plan of one picture for it."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import model_validator

from opsin.errors import PlanError
from opsin.spec.base import Spec
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import ConnectorConfig
from opsin.spec.decoder import DecoderConfig
from opsin.spec.plan import ImagePlan, Size
from opsin.spec.resolution import AnyRes, ResolutionConfig
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
        if self.image_token_id is not None and not 0 <= self.image_token_id < self.decoder.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} lies outside the vocabulary of {self.decoder.vocab_size} rows"
            )
        if self.vision.positions == "learned" and self.resolution.tile_size != self.vision.image_size:
            raise ValueError(
                f"resolution.tile_size {self.resolution.tile_size} differs from vision.image_size "
                f"{self.vision.image_size}: the tower's learned positions fit one size only"
            )
        raster = isinstance(self.resolution, AnyRes) and self.resolution.merge != "flat"
        if raster and self.vision.class_token == "keep":
            raise ValueError(
                "vision.class_token is 'keep', but resolution.merge lays rows out as a raster, in which class tokens "
                "have no place; use class_token 'drop' or merge 'flat'"
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
        class_rows: Literal[0, 1] = 1 if self.vision.class_token == "keep" else 0
        layout = self.resolution.layout(tiling, row_grids, class_rows=class_rows)
        return ImagePlan(
            size=size,
            canvases=tiling.canvases,
            tiles=tiling.tiles,
            row_grids=tuple(row_grids),
            layout=layout,
            mosaic=(tiling.columns, tiling.rows),
            class_rows=class_rows,
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
