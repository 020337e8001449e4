"""A whole vision-language model as one value, and the plan of one picture for it."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Tag, model_validator

from opsin.errors import PlanError
from opsin.spec.base import Spec
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import ConnectorConfig
from opsin.spec.decoder import DecoderConfig
from opsin.spec.native import Native
from opsin.spec.plan import ImagePlan, Size, Tiling
from opsin.spec.resolution import AnyRes, DynamicTiles, ResolutionConfig
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.spec.vision import VisionConfig


def _language_kind(value: Any) -> str:
    """Which description of a language model some data is: the older one, of a causal model, does not say its kind."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "causal" if kind is None else str(kind)


LanguageConfig = Annotated[
    Annotated[DecoderConfig, Tag("causal")] | Annotated[Seq2SeqConfig, Tag("seq2seq")], Discriminator(_language_kind)
]


class VLMConfig(Spec):
    """Tower, connector, decoder, resolution and chat format. Checks that they agree."""

    vision: VisionConfig
    connector: ConnectorConfig
    decoder: LanguageConfig
    """The language model; `seq2seq` has an encoder as well, which reads the prompt."""
    resolution: ResolutionConfig
    chat: ChatFormat
    image_token_id: int | None = None
    """Id that stands at picture slots in `Encoded.ids` and in exported prompts; None where the checkpoint has none
    (the authors' LLaVA marks slots outside the vocabulary). The model never reads it: slots are carried as data."""
    video_token_id: int | None = None
    """The same at the slots of videos."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("image_token_id", "video_token_id"):
            token_id = getattr(self, name)
            if token_id is not None and not 0 <= token_id < self.decoder.vocab_size:
                raise ValueError(f"{name} {token_id} lies outside the vocabulary of {self.decoder.vocab_size} rows")
        if isinstance(self.resolution, Native):
            self._check_native(self.resolution)
        elif self.vision.positions == "learned" and self.resolution.tile_size != self.vision.image_size:
            raise ValueError(
                f"resolution.tile_size {self.resolution.tile_size} differs from vision.image_size "
                f"{self.vision.image_size}: the tower's learned positions fit one size only"
            )
        raster = isinstance(self.resolution, AnyRes) and self.resolution.merge != "flat"
        if raster and self._keeps_class_rows:
            raise ValueError(
                "vision.class_token is 'keep', but resolution.merge lays rows out as a raster, in which class tokens "
                "have no place; use class_token 'drop' or merge 'flat'"
            )
        if self.connector.kind == "resampler" and self.vision.class_token == "keep":
            raise ValueError(
                "connector 'resampler' looks at patches by their places, and a class token has none; use "
                "vision.class_token 'drop'"
            )
        block = 2 if self.connector.kind == "patch_merger" else 1
        if self.vision.patch_block != block:
            order = "in blocks of 2x2" if block == 2 else "line by line"
            raise ValueError(
                f"connector {self.connector.kind!r} reads patches {order}: vision.patch_block must be {block}, not "
                f"{self.vision.patch_block}"
            )
        return self

    def _check_native(self, resolution: Native) -> None:
        if self.vision.positions == "learned":
            raise ValueError(
                "resolution 'native' gives pictures of any size, and the tower's learned positions fit one; use vision."
                "positions 'rotary' or one of the bicubic forms"
            )
        halves = self.connector.kind in ("patch_merger", "pixel_shuffle")
        block = self.vision.patch_size * (2 if halves else 1)
        if resolution.factor % block:
            raise ValueError(
                f"resolution.factor {resolution.factor} is not a multiple of the {block} px that connector "
                f"{self.connector.kind!r} makes a row of"
            )

    @property
    def uses_newline(self) -> bool:
        """Whether the model has a learned newline row."""
        return self.resolution.uses_newline

    @property
    def reads_videos(self) -> bool:
        """Whether the model was trained on videos."""
        return isinstance(self.resolution, Native) and self.resolution.video is not None

    @property
    def _keeps_class_rows(self) -> bool:
        """Whether each tile has a row of the class token's: a Q-Former takes it in."""
        return self.vision.class_token == "keep" and self.connector.kind != "qformer"

    def plan(self, size: Size, *, num_images: int = 1) -> ImagePlan:
        """The plan of one picture of (width, height) pixels. Raises PlanError for a size that cannot be served.

        num_images: pictures of its conversation, which may have to share what one alone could take.
        """
        resolution = self.resolution
        if isinstance(resolution, DynamicTiles):
            resolution = resolution.among(num_images)
        return self._laid_out(size, resolution.tiling(size, self.vision.patch_size))

    def plan_video(self, size: Size, *, num_frames: int, rate: float | None = None) -> ImagePlan:
        """The plan of a video of `num_frames` frames of (width, height) pixels, or its part that is shown.

        rate: its frames per second, by which frames are chosen; None shows all of them, such as pictures that somebody
        chose. An incomplete last group of frames is filled up with the last. Raises PlanError, also for a model that
        reads no videos.
        """
        resolution = self.resolution
        if not isinstance(resolution, Native) or resolution.video is None:
            raise PlanError("this model reads pictures only, no videos; show single frames as pictures")
        multiple = self.vision.frames
        if rate is None:
            chosen = tuple(range(num_frames))
        else:
            chosen = resolution.video.choose(num_frames, rate, multiple=multiple)
        if not chosen:
            raise PlanError("a video without frames cannot be shown")
        tiling = resolution.video_tiling(
            size, self.vision.patch_size, num_frames=len(chosen), frames_per_patch=multiple
        )
        return self._laid_out(size, tiling, frames=chosen + chosen[-1:] * (-len(chosen) % multiple))

    def _laid_out(self, size: Size, tiling: Tiling, *, frames: tuple[int, ...] = ()) -> ImagePlan:
        row_grids = [self.connector.row_grid(tile.grid) for tile in tiling.tiles]
        class_rows: Literal[0, 1] = 1 if self._keeps_class_rows else 0
        layout = self.resolution.layout(tiling, row_grids, class_rows=class_rows)
        return ImagePlan(
            size=size,
            canvases=tiling.canvases,
            tiles=tiling.tiles,
            row_grids=tuple(row_grids),
            layout=layout,
            mosaic=(tiling.columns, tiling.rows),
            class_rows=class_rows,
            frames=frames,
        )

    def plan_all(self, sizes: Sequence[Size]) -> list[ImagePlan]:
        """Plans of the pictures of one conversation; an error names the picture's number."""
        plans = []
        for number, size in enumerate(sizes, start=1):
            try:
                plans.append(self.plan(size, num_images=len(sizes)))
            except PlanError as error:
                raise PlanError(f"picture {number} of {len(sizes)}: {error}") from None
        return plans
