"""Native resolution: a picture keeps its size, rounded to whole blocks of patches, within limits of pixels (Qwen2-VL).

A video is pictures of one size: some of its frames are chosen, and the more there are, the smaller each becomes. All of
it is integers from (width, height), number of frames and frames per second.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, Self

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from opsin.errors import PlanError
from opsin.spec.base import Spec
from opsin.spec.plan import Canvas, Grid, RowLayout, Size, Tile, Tiling

BLOCK_PIXELS = 28 * 28
"""Pixels that become one token in the published models: 2x2 patches of 14x14."""

SmallSides = Literal["grow", "one_block", "refuse"]
"""What happens to a side of less than one block, the one thing in which published versions of the rule differ:
`grow`: it may round to nothing, and the picture is then below the least number of pixels and grows (transformers 5);
`one_block`: it becomes one block before anything else is looked at (qwen-vl-utils 0.0.8);
`refuse`: an error (transformers 4.45 to 4.49)."""


class VideoSampling(Spec):
    """Which frames of a video are shown, and how large. Defaults are qwen-vl-utils 0.0.8 (vision_process.py)."""

    rule: Literal["qwen_vl_utils", "transformers"] = "qwen_vl_utils"
    """`qwen_vl_utils`: first and last frame and what lies evenly between, the count rounded to even; frames that are
    too small for a block become one. `transformers`: evenly from the first, truncated, the count rounded down to even
    (Qwen2VLVideoProcessor.sample_frames of 5.23)."""
    fps: PositiveFloat = 2.0
    """Frames shown per second."""
    num_frames: PositiveInt | None = None
    """Frames shown whatever the video's length, in place of `fps` and its limits."""
    min_frames: PositiveInt = 4
    max_frames: PositiveInt = 768
    min_pixels: PositiveInt = 128 * BLOCK_PIXELS
    """Of one frame."""
    max_pixels: PositiveInt = 768 * BLOCK_PIXELS
    """Of one frame."""
    max_total_pixels: PositiveInt | None = 24_576 * BLOCK_PIXELS
    """Of all frames, counting those that share a patch once; a frame may always have 1.05 times `min_pixels`."""

    def choose(self, num_source: int, rate: float, *, multiple: int) -> tuple[int, ...]:
        """Indices of the frames to show, of a video of `num_source` frames at `rate` frames per second.

        multiple: frames that one patch spans; their number is a multiple of it. Raises PlanError for a video that is
        too short.
        """
        count = self._count(num_source, rate, multiple)
        if not multiple <= count <= num_source:
            wanted = f"{self.num_frames} are asked for" if self.num_frames else f"{count} would be shown"
            raise PlanError(
                f"a video of {num_source} frame(s) cannot be sampled: {wanted}; at least {multiple} are needed, and at "
                "most as many as there are. Show a single picture instead, or ask for fewer frames"
            )
        if self.rule == "transformers":
            # Its positions are float32 (torch.arange), in which a product just below an integer is that integer.
            step = num_source / count
            return tuple(int(np.float32(number * step)) for number in range(count))
        last = num_source - 1
        return tuple(round(Fraction(last * number, count - 1)) for number in range(count))

    def _count(self, num_source: int, rate: float, multiple: int) -> int:
        if self.num_frames is not None:
            return round(self.num_frames / multiple) * multiple
        wanted = num_source / rate * self.fps
        longest = min(self.max_frames, num_source) // multiple * multiple
        if self.rule == "transformers":
            return math.floor(min(max(wanted, self.min_frames), longest) / multiple) * multiple
        shortest = -(-self.min_frames // multiple) * multiple
        return round(min(max(wanted, shortest), longest) / multiple) * multiple

    def max_frame_pixels(self, num_frames: int, *, multiple: int) -> float:
        """Largest frame of a video of which `num_frames` frames are shown."""
        if self.max_total_pixels is None:
            return self.max_pixels
        share = self.max_total_pixels / num_frames * multiple
        return max(min(self.max_pixels, share), int(self.min_pixels * 1.05))


class Native(Spec):
    """Both sides to the nearest multiple of `factor`; within limits of pixels, keeping the aspect ratio."""

    kind: Literal["native"] = "native"
    factor: PositiveInt = 28
    """Side in pixels of what becomes one row: a patch, or a block of patches that the connector joins."""
    min_pixels: PositiveInt = 4 * BLOCK_PIXELS
    max_pixels: PositiveInt = 16_384 * BLOCK_PIXELS
    """Both limits as in the published preprocessor_config.json; transformers' class defaults to 1280 blocks instead."""
    max_ratio: PositiveInt = 200
    """Longer side by shorter side."""
    small_sides: SmallSides = "grow"
    video: VideoSampling | None = VideoSampling()
    """How videos are read; None: they are not."""

    @property
    def uses_newline(self) -> bool:
        """Whether the model has a learned newline row."""
        return False

    def smaller(self) -> tuple[Self, ...]:
        """The rule with ever fewer pixels of pictures and videos, each step a tenth less, down to `min_pixels`."""
        rules: list[Self] = []
        most = self.max_pixels
        while most > self.min_pixels:
            most = max(most * 9 // 10, self.min_pixels)
            video = self.video
            if video is not None:
                share, total = Fraction(most, self.max_pixels), video.max_total_pixels
                video = video.replace(
                    max_pixels=max(int(video.max_pixels * share), video.min_pixels),
                    max_total_pixels=total and max(int(total * share), 1),
                )
            rules.append(self.replace(max_pixels=most, video=video))
        return tuple(rules)

    def tiling(self, size: Size, patch_size: int) -> Tiling:
        """Canvases and tiles for a picture of `size`: one of each."""
        resized = self.resize(size, self.min_pixels, self.max_pixels, self.small_sides)
        return _one_tile(size, resized, patch_size, num_frames=1)

    def video_tiling(self, size: Size, patch_size: int, *, num_frames: int, frames_per_patch: int) -> Tiling:
        """The same for `num_frames` frames of `size`: one canvas, drawn for every frame, and one tile."""
        if self.video is None:
            raise PlanError("this model reads pictures only, no videos; show single frames as pictures")
        most = self.video.max_frame_pixels(num_frames, multiple=frames_per_patch)
        small: SmallSides = "grow" if self.video.rule == "transformers" else "one_block"
        resized = self.resize(size, self.video.min_pixels, most, small)
        return _one_tile(size, resized, patch_size, num_frames=-(-num_frames // frames_per_patch))

    def layout(self, tiling: Tiling, row_grids: Sequence[Grid], *, class_rows: int = 0) -> RowLayout:
        """Every row, in the order in which the connector returns them."""
        return RowLayout(np.arange(sum(class_rows + t * h * w for t, h, w in row_grids), dtype=np.int32))

    def resize(self, size: Size, min_pixels: float, max_pixels: float, small_sides: SmallSides) -> Size:
        """`smart_resize`: the size that a picture of `size` is drawn at. Raises PlanError.

        A limit may be met exactly; sides that lie halfway between two multiples go to the even one.
        """
        factor, (width, height) = self.factor, size
        if width < 1 or height < 1:
            raise PlanError(f"a picture of {width}x{height} px has no pixels; both sides must be at least 1")
        if small_sides == "refuse" and min(size) < factor:
            raise PlanError(
                f"a picture of {width}x{height} px is too small: both sides must be at least {factor} px. Enlarge it"
            )
        if max(size) > self.max_ratio * min(size):
            raise PlanError(
                f"a picture of {width}x{height} px is too elongated: one side is {max(size) / min(size):.1f} times the "
                f"other, at most {self.max_ratio} times is read. Cut it into pieces"
            )
        least = factor if small_sides == "one_block" else 0
        across, down = (max(least, round(side / factor) * factor) for side in size)
        if across * down > max_pixels:
            shrink = math.sqrt(height * width / max_pixels)
            least = factor if small_sides == "grow" else 0
            across, down = (max(least, math.floor(side / shrink / factor) * factor) for side in size)
        elif across * down < min_pixels:
            grow = math.sqrt(min_pixels / (height * width))
            across, down = (math.ceil(side * grow / factor) * factor for side in size)
        if not across or not down:
            raise PlanError(
                f"a picture of {width}x{height} px cannot shrink to {max_pixels:.0f} pixels: less than {factor} px "
                "would be left of one side. Cut it into pieces, or allow more pixels"
            )
        return across, down


def _one_tile(size: Size, resized: Size, patch_size: int, *, num_frames: int) -> Tiling:
    width, height = resized
    grid = (num_frames, height // patch_size, width // patch_size)
    return Tiling((Canvas(size, (0, 0), resized, resized, (0, 0)),), (Tile(0, (0, 0, width, height), grid),))
