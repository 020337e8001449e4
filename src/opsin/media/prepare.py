"""From an opened picture and its plan to what the vision tower reads: float32 patches.

For LLaVA-1.5 (`Pad`) and a 1024x768 photo the way is

    1024x768 --pad with the mean colour--> 1024x1024 --bicubic--> 336x336 --24x24 patches of 14 px--> (576, 588)
             each value x becomes (x / 255 - mean) / std

and for LLaVA-NeXT (`AnyRes`) the whole photo once, stretched to 336x336, and once at 672x504 on black 672x672, cut into
four tiles: (5 * 576, 588). What is drawn where is decided in `spec.resolution`; here it is only done. The numbers equal
those of the authors' code bit by bit, run with the same Pillow: the resampling is Pillow's, and the arithmetic has the
same order and precision. (Pillow 13 moved some values of stretched pictures by one of 256 levels.)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opsin.media.image import Picture
from opsin.spec.plan import Canvas, ImagePlan, Tile
from opsin.spec.vision import VisionConfig

_BAND = 256
"""Source lines that are padded and narrowed at a time."""


@dataclass(frozen=True, eq=False, slots=True)
class PreparedImage:
    """One picture as the tower reads it. P patches of N tiles, each of p * p pixels."""

    patches: NDArray[np.float32]
    """(P, 3 * p * p) tile by tile, in raster order within a tile. A patch is laid out (channel, y, x), like the weight
    of a strided convolution, so that the convolution is one matrix product."""
    grids: NDArray[np.int64]
    """(N, 3) patches (t, h, w) of each tile."""
    plan: ImagePlan
    name: str


def prepare(picture: Picture, plan: ImagePlan, vision: VisionConfig) -> PreparedImage:
    """Draw the canvases of `plan`, cut them into tiles and patches, and normalise.

    plan: of `picture.size`. vision: gives the patch size and the pixel statistics. Check the plan with
    `media.image.check_plan` first: it allocates what it says.
    """
    p = vision.patch_size
    patches = np.empty((plan.num_patches, 3, p * p), np.float32)
    start = 0
    for tile, levels in _tiles(picture.pixels, plan):
        _, rows, columns = tile.grid
        # A remainder of less than a patch is left out, as a strided convolution does.
        whole = levels[: rows * p, : columns * p].reshape(rows, p, columns, p, 3)
        cut = whole.transpose(0, 2, 4, 1, 3).reshape(rows * columns, 3, p * p)
        _normalise(cut, vision, patches[start : start + len(cut)])
        start += len(cut)
    grids = np.array([tile.grid for tile in plan.tiles], np.int64)
    return PreparedImage(patches.reshape(len(patches), -1), grids, plan, picture.name)


def pixels(image: Image.Image, plan: ImagePlan, vision: VisionConfig) -> NDArray[np.float32]:
    """(N, 3, H, W) normalised tiles, all of one size: the `pixel_values` that other code feeds its towers.

    image: RGB, of `plan.size`.
    """
    tiles = [levels.transpose(2, 0, 1).reshape(3, -1) for _, levels in _tiles(image, plan)]
    left, top, right, bottom = plan.tiles[0].box
    out = np.empty((len(tiles), 3, (bottom - top) * (right - left)), np.float32)
    for levels, place in zip(tiles, out, strict=True):
        _normalise(levels, vision, place)
    return out.reshape(len(tiles), 3, bottom - top, right - left)


def _tiles(image: Image.Image, plan: ImagePlan) -> Iterator[tuple[Tile, NDArray[np.uint8]]]:
    """Each tile with its 8-bit pixels (H, W, 3), a view of its canvas. Tiles of one canvas stand together in a plan."""
    assert image.size == plan.size, f"a plan of {plan.size} for a picture of {image.size}"
    drawn, canvas = -1, np.empty((0, 0, 3), np.uint8)
    for tile in plan.tiles:
        if tile.canvas != drawn:
            drawn, canvas = tile.canvas, np.asarray(draw_canvas(image, plan.canvases[tile.canvas]))
        left, top, right, bottom = tile.box
        yield tile, canvas[top:bottom, left:right]


def draw_canvas(image: Image.Image, canvas: Canvas) -> Image.Image:
    """One canvas as the tower sees it, before normalisation: pad, resize, and paste or crop. image: RGB."""
    resized = _resize(image, canvas)
    if canvas.offset == (0, 0) and canvas.resized == canvas.size:
        return resized
    page = Image.new("RGB", canvas.size, canvas.fill)
    page.paste(resized, canvas.offset)  # what lies outside is cropped
    return page


def _resize(image: Image.Image, canvas: Canvas) -> Image.Image:
    """The padded picture at its new size, equal bit by bit to padding first, without ever holding it padded.

    Pillow resamples a square along lines first, then along columns, and rounds to 8 bits in between. So bands of lines
    can be padded and narrowed one at a time, and padding above and below can be added between the two steps. A
    16000x100 strip padded to a square would take 1 GB; this way it takes a few MB.
    """
    if canvas.padded == image.size:
        return image.resize(canvas.resized, Image.Resampling.BICUBIC)
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


def _normalise(levels: NDArray[np.uint8], vision: VisionConfig, out: NDArray[np.float32]) -> None:
    """out = (levels / 255 - mean) / std, all in float32. levels, out: (..., 3, K).

    The authors' image processor multiplies by 1/255 in float64, rounds to float32, and goes on in float32. Dividing by
    255 in float32 gives the same 256 numbers.
    """
    np.divide(levels, np.float32(255), out=out, dtype=np.float32)
    out -= np.array(vision.mean, np.float32)[:, None]
    out /= np.array(vision.std, np.float32)[:, None]
