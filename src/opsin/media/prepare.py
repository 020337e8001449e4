"""From an opened picture and its plan to what the vision tower reads: float32 patches.

For LLaVA-1.5 (`Pad`) and a 1024x768 photo the way is

    1024x768 --pad with the mean colour--> 1024x1024 --bicubic--> 336x336 --24x24 patches of 14 px--> (576, 588)
             each value x becomes (x / 255 - mean) / std

for LLaVA-NeXT (`AnyRes`) the whole photo once, stretched to 336x336, and once at 672x504 on black 672x672, cut into
four tiles: (5 * 576, 588); for Qwen2-VL (`Native`) once, at 1036x756, each patch shown in two frames: (54 * 74, 1176).
What is drawn where is decided in `spec.resolution`; here it is only done. The numbers equal those of the authors' code
bit by bit, run with the same Pillow: the resampling is Pillow's, and the arithmetic has the same order and precision.
(Pillow 13 moved some values of stretched pictures by one of 256 levels.)
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opsin.errors import MediaError
from opsin.media.image import Picture
from opsin.media.resize import MIN_PIXELS, bands, resize, side_by_side
from opsin.spec.plan import Canvas, ImagePlan, Size, Tile
from opsin.spec.vision import VisionConfig

Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]
"""8-bit pixels (H, W, 4): red, green, blue, and a byte that says nothing, as Pillow keeps them. Words are moved and
resized faster than three bytes, and need no packing."""

_BAND = 256
"""Source lines that are padded and narrowed at a time."""

_GROUP = 512
"""Patches that are normalised at a time: so few that the numbers in between stay in the processor's cache."""


class Kernels(Protocol):
    """The two steps that take time, for callers that bring faster ones, which need not be exact."""

    def resize(self, levels: Levels, size: Size) -> Levels:
        """(H, W, 4) to (height, width, 4)."""

    def normalise(self, levels: NDArray[np.uint8], mean: Floats, std: Floats, out: Floats) -> None:
        """Write (levels / 255 - mean) / std to `out` (P, 3, frames, p * p). levels: (P, 3, 1, p * p); others: (3,)."""


class _Exact:
    """The numbers of the authors' code: normalising in the same order; resizing is left to `draw_canvas`."""

    def normalise(self, levels: NDArray[np.uint8], mean: Floats, std: Floats, out: Floats) -> None:
        """The authors' image processors multiply by 1/255 in float64, round to float32, and go on in float32. Dividing
        by 255 in float32 gives the same 256 numbers.

        Channel by channel, so that what is worked on stays in the cache; equal frames are copied, not divided again.
        """
        for channel in range(3):
            values = levels[:, channel].astype(np.float32)
            values /= np.float32(255)
            values -= mean[channel]
            values /= std[channel]
            out[:, channel] = values


_EXACT = _Exact()


@dataclass(frozen=True, eq=False, slots=True)
class PreparedImage:
    """One picture or video as the tower reads it. P patches of N tiles, each of p * p pixels in t frames."""

    patches: NDArray[np.float32]
    """(P, 3 * t * p * p) tile by tile, in raster order within a tile, or block by block (`VisionConfig.patch_block`). A
    patch is laid out (channel, frame, y, x), like the weight of a strided convolution, so that the convolution is one
    matrix product."""
    grids: NDArray[np.int64]
    """(N, 3) patches (t, h, w) of each tile."""
    plan: ImagePlan
    name: str


def prepare(
    picture: Picture, plan: ImagePlan, vision: VisionConfig, *, kernels: Kernels | None = None
) -> PreparedImage:
    """Draw the canvases of `plan`, cut them into tiles and patches, and normalise.

    plan: of `picture.size`. vision: gives the patch size and the pixel statistics. kernels: None for the exact ones.
    Check the plan with `media.image.check_plan` first: it allocates what it says.

    Where a patch spans several frames, the picture stands still: it is drawn and normalised once.
    """
    patches = _empty(plan, vision)
    start = 0
    for tile, levels in _tiles(picture.pixels, plan, kernels):
        _, rows, columns = tile.grid
        _fill(patches[start : start + rows * columns], levels, vision, kernels)
        start += rows * columns
    return _prepared(patches, plan, picture.name)


def prepare_video(
    frames: Iterable[Image.Image],
    plan: ImagePlan,
    vision: VisionConfig,
    *,
    name: str,
    kernels: Kernels | None = None,
) -> PreparedImage:
    """The same for the frames of a video, which are drawn one at a time.

    frames: one for each different index in `plan.frames`, in that order, of `plan.size`. Raises MediaError where they
    end too early.
    """
    patches = _empty(plan, vision)
    per_time = plan.num_patches // plan.tiles[0].grid[0]
    place, given = 0, iter(frames)
    for index, repeats in groupby(plan.frames):
        frame = next(given, None)
        if frame is None:
            raise MediaError(f"{name}: its frame {index} cannot be decoded. Copy or download the video again.")
        ((_, levels),) = _tiles(frame, plan, kernels)
        for _ in repeats:
            time, within = divmod(place, vision.frames)
            _fill(patches[time * per_time : (time + 1) * per_time, :, within, None], levels, vision, kernels)
            place += 1
    return _prepared(patches, plan, name)


def _empty(plan: ImagePlan, vision: VisionConfig) -> NDArray[np.float32]:
    return np.empty((plan.num_patches, 3, vision.frames, vision.patch_size**2), np.float32)


def _prepared(patches: NDArray[np.float32], plan: ImagePlan, name: str) -> PreparedImage:
    grids = np.array([tile.grid for tile in plan.tiles], np.int64)
    return PreparedImage(patches.reshape(len(patches), -1), grids, plan, name)


def _fill(patches: NDArray[np.float32], levels: Levels, vision: VisionConfig, kernels: Kernels | None) -> None:
    """Cut one drawn tile into patches (P, 3, frames, p * p) and write them normalised, the same into every frame."""
    p, block = vision.patch_size, vision.patch_block
    mean, std = np.array(vision.mean, np.float32), np.array(vision.std, np.float32)
    normalise = (kernels or _EXACT).normalise
    columns = levels.shape[1] // p
    lines = max(1, _GROUP // (columns * block)) * block * p

    tops = range(0, levels.shape[0] - p + 1, lines)

    def fill(tops: range) -> None:
        for top in tops:
            start, cut = top // p * columns, _cut(levels[top : top + lines], p, block)
            normalise(cut[:, :, None], mean, std, patches[start : start + len(cut)])

    # Kernels that callers bring have threads of their own. Besides, so little is left to do after them that handing it
    # out cost more than it gained.
    if kernels is not None or levels.shape[0] * levels.shape[1] < MIN_PIXELS:
        fill(tops)
    else:
        side_by_side(fill, [tops[first:last] for first, last in bands(len(tops))])


def _cut(levels: Levels, p: int, block: int) -> NDArray[np.uint8]:
    """(P, 3, p * p) patches of (H, W, 4) pixels, block by block of `block` by `block` patches.

    A remainder of less than a patch is left out, as a strided convolution does. A line of a patch is moved as one item,
    which is several times faster than byte by byte.
    """
    rows, columns = levels.shape[0] // p, levels.shape[1] // p
    whole = levels[: rows * p, : columns * p].reshape(rows // block, block, p, columns // block, block, 4 * p)
    lines = whole.view(np.dtype((np.void, 4 * p)))[..., 0].transpose(0, 3, 1, 4, 2)
    words = np.ascontiguousarray(lines).view("<u4").reshape(rows * columns, p * p)
    planes = np.empty((3, rows * columns, p * p), np.uint8)
    for channel in range(3):
        np.right_shift(words, np.uint32(8 * channel), out=planes[channel], casting="unsafe")  # the lowest byte of each
    return planes.transpose(1, 0, 2)


def pixels(image: Image.Image, plan: ImagePlan, vision: VisionConfig) -> NDArray[np.float32]:
    """(N, 3, H, W) normalised tiles, all of one size: the `pixel_values` that other code feeds its towers.

    image: RGB, of `plan.size`.
    """
    mean, std = np.array(vision.mean, np.float32), np.array(vision.std, np.float32)
    left, top, right, bottom = plan.tiles[0].box
    out = np.empty((plan.num_tiles, 3, bottom - top, right - left), np.float32)
    for place, (_, levels) in zip(out, _tiles(image, plan), strict=True):
        _EXACT.normalise(levels[..., :3].transpose(2, 0, 1)[None], mean, std, place[None])
    return out


def _tiles(image: Image.Image, plan: ImagePlan, kernels: Kernels | None = None) -> Iterator[tuple[Tile, Levels]]:
    """Each tile with its 8-bit pixels, a view of its canvas. Tiles of one canvas stand together in a plan."""
    assert image.size == plan.size, f"a plan of {plan.size} for a picture of {image.size}"
    drawn, canvas = -1, np.empty((0, 0, 4), np.uint8)
    for tile in plan.tiles:
        if tile.canvas != drawn:
            drawn, canvas = tile.canvas, _drawn(image, plan.canvases[tile.canvas], kernels)
        left, top, right, bottom = tile.box
        yield tile, canvas[top:bottom, left:right]


def _drawn(image: Image.Image, canvas: Canvas, kernels: Kernels | None) -> Levels:
    # Padded pictures are left to Pillow, which never holds them padded.
    if kernels is None or canvas.padded != image.size:
        return _levels(draw_canvas(image, canvas))
    resized = kernels.resize(_levels(image), canvas.resized)
    if _fills(canvas):
        return resized
    return _levels(_paste(Image.frombytes("RGB", canvas.resized, resized.tobytes(), "raw", "RGBX"), canvas))


def _levels(image: Image.Image) -> Levels:
    return np.frombuffer(image.tobytes("raw", "RGBX"), np.uint8).reshape(image.height, image.width, 4)


def _fills(canvas: Canvas) -> bool:
    return canvas.offset == (0, 0) and canvas.resized == canvas.size


def _paste(resized: Image.Image, canvas: Canvas) -> Image.Image:
    page = Image.new("RGB", canvas.size, canvas.fill)
    page.paste(resized, canvas.offset)  # what lies outside is cropped
    return page


def draw_canvas(image: Image.Image, canvas: Canvas) -> Image.Image:
    """One canvas as the tower sees it, before normalisation: pad, resize, and paste or crop. image: RGB."""
    resized = _resize(image, canvas)
    return resized if _fills(canvas) else _paste(resized, canvas)


def _resize(image: Image.Image, canvas: Canvas) -> Image.Image:
    """The padded picture at its new size, equal bit by bit to padding first, without ever holding it padded.

    Pillow resamples a square along lines first, then along columns, and rounds to 8 bits in between. So bands of lines
    can be padded and narrowed one at a time, and padding above and below can be added between the two steps. A
    16000x100 strip padded to a square would take 1 GB; this way it takes a few MB.
    """
    if canvas.padded == image.size:
        return resize(image, canvas.resized)
    (padded_width, padded_height), (left, top) = canvas.padded, canvas.pad_offset
    width = canvas.resized[0]
    # Since version 13 Pillow takes the cheaper order of the two steps, which for squares is the old one.
    assert (padded_height, *canvas.resized) == (padded_width, width, width), "only squares are padded"
    narrow = Image.new("RGB", (width, padded_height), canvas.fill)
    for y in range(0, image.height, _BAND):
        lines = min(_BAND, image.height - y)
        band = Image.new("RGB", (padded_width, lines), canvas.fill)
        band.paste(image.crop((0, y, image.width, y + lines)), (left, 0))
        narrow.paste(band.resize((width, lines), Image.Resampling.BICUBIC), (0, top + y))
    return narrow.resize(canvas.resized, Image.Resampling.BICUBIC)
