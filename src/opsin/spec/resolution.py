"""How a picture of any size becomes tiles of the size the tower reads, and in which order their rows are laid out.

Each rule has two halves, integers in and integers out:

    tiling(size, patch_size)       canvases to draw and tiles to cut, from the picture's (width, height)
    layout(tiling, row_grids)      for each token slot, the connector row that fills it

`VLMConfig.plan` joins them with the connector in between; `media.prepare` draws what the tiling says.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from opsin.errors import PlanError
from opsin.spec.base import Spec
from opsin.spec.native import Native
from opsin.spec.plan import NEWLINE, Canvas, Color, Grid, Resample, RowLayout, Size, Tile, Tiling


def _check_size(size: Size) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise PlanError(f"a picture of {width}x{height} px has no pixels; both sides must be at least 1")


def _one_tile(canvas: Canvas, patch_size: int) -> Tiling:
    width, height = canvas.size
    grid = (1, height // patch_size, width // patch_size)
    return Tiling((canvas,), (Tile(0, (0, 0, width, height), grid),))


def _num_rows(row_grids: Sequence[Grid], class_rows: int) -> int:
    return sum(class_rows + t * h * w for t, h, w in row_grids)


class _TileByTile(Spec):
    """What the rules have in common that leave rows as the connector returns them."""

    tile_size: PositiveInt
    """Side in pixels of the square that the tower reads."""

    @property
    def uses_newline(self) -> bool:
        """Whether the model has a learned newline row."""
        return False

    def smaller(self) -> tuple[Self, ...]:
        """Rules under which pictures take ever fewer tokens; none where every picture takes the same."""
        return ()

    def layout(self, tiling: Tiling, row_grids: Sequence[Grid], *, class_rows: int = 0) -> RowLayout:
        """Every row, tile by tile: the class token, if kept, then the raster."""
        return RowLayout(np.arange(_num_rows(row_grids, class_rows), dtype=np.int32))


class CenterCrop(_TileByTile):
    """Shortest side to `tile_size`, then the central square: LLaVA's `square` mode, CLIP's own preprocessing."""

    kind: Literal["center_crop"] = "center_crop"

    def tiling(self, size: Size, patch_size: int) -> Tiling:
        """Canvases and tiles for a picture of `size`."""
        _check_size(size)
        width, height = size
        side = self.tile_size
        # The long side is truncated, not rounded: CLIPImageProcessor, get_resize_output_image_size.
        resized = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
        # On an odd surplus the crop starts at the smaller half: image_transforms.center_crop.
        offset = (-((resized[0] - side) // 2), -((resized[1] - side) // 2))
        return _one_tile(Canvas(size, (0, 0), resized, (side, side), offset), patch_size)


class Squash(_TileByTile):
    """Resize to the square, whatever the aspect ratio: BLIP-2 and Qwen-VL."""

    kind: Literal["squash"] = "squash"

    def tiling(self, size: Size, patch_size: int) -> Tiling:
        """Canvases and tiles for a picture of `size`."""
        _check_size(size)
        return _one_tile(_stretched(size, (self.tile_size, self.tile_size)), patch_size)


class Pad(_TileByTile):
    """Pad to a square with the mean colour, then resize: LLaVA-1.5's `pad` mode."""

    kind: Literal["pad"] = "pad"
    fill: Color = (122, 116, 104)
    """int(255 * mean) of CLIP's channel means (llava/mm_utils.py, expand2square)."""

    def tiling(self, size: Size, patch_size: int) -> Tiling:
        """Canvases and tiles for a picture of `size`."""
        _check_size(size)
        side = max(size)
        offset = ((side - size[0]) // 2, (side - size[1]) // 2)
        tile = (self.tile_size, self.tile_size)
        return _one_tile(Canvas((side, side), offset, tile, tile, (0, 0), self.fill), patch_size)


class AnyRes(Spec):
    """LLaVA-NeXT's tiling: the whole picture once, stretched, then a mosaic of tiles at the best-fitting resolution."""

    kind: Literal["anyres"] = "anyres"
    tile_size: PositiveInt
    """Side in pixels of the square that the tower reads."""
    resolutions: tuple[Size, ...] = Field(min_length=1)
    """Candidate mosaics as in `image_grid_pinpoints`: pairs of pixels, (width, height) for `original`, which `hf` reads
    as (height, width). Ties take the first."""
    merge: Literal["flat", "spatial", "spatial_unpad", "spatial_maxpool2x2"] = "spatial_unpad"
    """How tile rows become slots (`mm_patch_merge_type`): tile by tile; one raster; a raster without padding and with a
    newline after each line; a raster reduced by 2x2 maxima."""
    base: Literal["first", "none"] = "first"
    """Whether the rows of the stretched whole picture come first or are left out (`nobase`)."""
    max_base_tiles: PositiveInt | None = None
    """`anyres_max_N`: unpadded rasters of more rows than N tiles are shrunk bilinearly (LLaVA-NeXT code); None leaves
    them. Other merges never shrink."""
    compat: Literal["original", "hf"] = "original"
    """Whose arithmetic: the authors' or transformers'. transformers reads candidates as (height, width), so that ties
    fall the other way, and rounds to 7 places before it truncates the unpadded side."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for pair in self.resolutions:
            if min(pair) < 1 or pair[0] % self.tile_size or pair[1] % self.tile_size:
                raise ValueError(
                    f"resolution {pair[0]}x{pair[1]} does not consist of whole tiles of {self.tile_size} px; "
                    "a tower of another size needs its own list"
                )
        return self

    @property
    def uses_newline(self) -> bool:
        """Whether the model has a learned newline row."""
        return self.merge == "spatial_unpad"

    @property
    def candidates(self) -> tuple[Size, ...]:
        """Resolutions as (width, height), in the order they are tried."""
        return self.resolutions if self.compat == "original" else tuple((h, w) for w, h in self.resolutions)

    def smaller(self) -> tuple[Self, ...]:
        """The rule with mosaics of ever fewer tiles, down to the smallest that the model knows."""
        areas = sorted({math.prod(each) for each in self.resolutions}, reverse=True)
        return tuple(
            self.replace(resolutions=tuple(each for each in self.resolutions if math.prod(each) <= area))
            for area in areas[1:]
        )

    def best_resolution(self, size: Size) -> Size:
        """The candidate that keeps most of the picture's pixels, then wastes fewest of its own, then comes first."""
        width, height = size

        def merit(candidate: Size) -> tuple[int, int]:
            scale = min(candidate[0] / width, candidate[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - candidate[0] * candidate[1]

        return max(self.candidates, key=merit)  # max keeps the first of equals

    def tiling(self, size: Size, patch_size: int) -> Tiling:
        """Canvases and tiles for a picture of `size`: the stretched base, then the mosaic row by row."""
        _check_size(size)
        (width, height), side = size, self.tile_size
        best = self.best_resolution(size)
        scale_w, scale_h = best[0] / width, best[1] / height
        if scale_w < scale_h:
            resized = (best[0], min(math.ceil(height * scale_w), best[1]))
        else:
            resized = (min(math.ceil(width * scale_h), best[0]), best[1])
        offset = ((best[0] - resized[0]) // 2, (best[1] - resized[1]) // 2)
        whole = _stretched(size, (side, side))
        mosaic = Canvas(size, (0, 0), resized, best, offset)
        columns, rows = best[0] // side, best[1] // side
        grid = (1, side // patch_size, side // patch_size)
        tiles = [Tile(0, (0, 0, side, side), grid)]
        tiles += [
            Tile(1, (x * side, y * side, (x + 1) * side, (y + 1) * side), grid)
            for y in range(rows)
            for x in range(columns)
        ]
        return Tiling((whole, mosaic), tuple(tiles), columns, rows)

    def layout(self, tiling: Tiling, row_grids: Sequence[Grid], *, class_rows: int = 0) -> RowLayout:
        """Base rows, then the mosaic's rows as `merge` says. `class_rows` can only be kept tile by tile (`flat`)."""
        num_base, num_rows = _num_rows(row_grids[:1], class_rows), _num_rows(row_grids, class_rows)
        base = np.arange(num_base if self.base == "first" else 0, dtype=np.int32)
        numbers = np.arange(num_base, num_rows, dtype=np.int32)
        if self.merge == "flat":
            return RowLayout(np.concatenate([base, numbers]))
        assert class_rows == 0, "VLMConfig refuses class tokens in a raster"
        _, tile_h, tile_w = row_grids[1]
        rows, columns = tiling.rows, tiling.columns
        # (tile row, tile column, line, place) -> one raster of lines across tiles
        tiles = numbers.reshape(rows, columns, tile_h, tile_w)
        raster: NDArray[np.int32] = tiles.transpose(0, 2, 1, 3).reshape(rows * tile_h, columns * tile_w)
        resample: Resample | None = None
        if self.merge == "spatial_maxpool2x2":
            resample = _resample(raster, (raster.shape[0] // 2, raster.shape[1] // 2), "max")
        elif self.merge == "spatial_unpad":
            raster = self._unpad(raster, tiling.canvases[1].padded)
            resample = self._shrink(raster, tile_h * tile_w)
        if resample is not None:
            raster = np.arange(num_rows, num_rows + math.prod(resample.grid_out), dtype=np.int32).reshape(
                resample.grid_out
            )
        if self.uses_newline:
            raster = np.concatenate([raster, np.full((raster.shape[0], 1), NEWLINE, np.int32)], axis=1)
        return RowLayout(np.concatenate([base, raster.ravel()]), resample)

    def _unpad(self, raster: NDArray[np.int32], size: Size) -> NDArray[np.int32]:
        """Cut the rows that see only the black bars. An odd surplus keeps one row more than the arithmetic says."""
        (width, height), (grid_h, grid_w) = size, raster.shape

        def truncate(value: float) -> int:
            return int(value) if self.compat == "original" else int(round(value, 7))

        if width / height > grid_w / grid_h:
            surplus = (grid_h - truncate(height * (grid_w / width))) // 2
            return raster[surplus : grid_h - surplus]
        surplus = (grid_w - truncate(width * (grid_h / height))) // 2
        return raster[:, surplus : grid_w - surplus]

    def _shrink(self, raster: NDArray[np.int32], rows_per_tile: int) -> Resample | None:
        """How `max_base_tiles` shrinks a raster: only beyond 1.1 times, truncating (LLaVA-NeXT llava_arch.py)."""
        if self.max_base_tiles is None:
            return None
        times = math.sqrt(raster.size / (self.max_base_tiles * rows_per_tile))
        if times <= 1.1:
            return None
        height, width = int(raster.shape[0] // times), int(raster.shape[1] // times)
        if height < 1 or width < 1:
            raise PlanError(
                f"a raster of {raster.shape[1]}x{raster.shape[0]} rows cannot shrink {times:.1f} times to fit "
                f"{self.max_base_tiles} tiles of {rows_per_tile} rows: nothing is left of its short side"
            )
        return _resample(raster, (height, width), "bilinear")


def _resample(raster: NDArray[np.int32], grid_out: tuple[int, int], mode: Literal["bilinear", "max"]) -> Resample:
    return Resample(raster.ravel(), (raster.shape[0], raster.shape[1]), grid_out, mode)


class DynamicTiles(_TileByTile):
    """InternVL-1.5's tiling: the picture stretched to the grid of tiles whose shape is nearest its own, and where those
    are several, the whole picture once more, stretched to one tile (arXiv:2404.16821 section 3.2; dataset.py,
    dynamic_preprocess)."""

    kind: Literal["dynamic_tiles"] = "dynamic_tiles"
    min_tiles: PositiveInt = 1
    """Fewest tiles of a grid (`min_dynamic_patch`)."""
    max_tiles: PositiveInt = 12
    """Most tiles of a grid, the thumbnail not counted (`max_dynamic_patch`)."""
    thumbnail: Literal["last", "none"] = "last"
    """Whether the whole picture follows the tiles; a grid of one tile is the whole picture already."""
    budget: Literal["each", "shared"] = "each"
    """Several pictures of one conversation: `each` may take max_tiles, as in the authors' chat; `shared`: max_tiles
    divided by their number and rounded down, but one at least, as in the authors' training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"min_tiles {self.min_tiles} is more than max_tiles {self.max_tiles}")
        return self

    def among(self, num_images: int) -> Self:
        """The rule for each of `num_images` pictures of one conversation."""
        if self.budget == "each" or num_images < 2:
            return self
        most = self.max_tiles // num_images
        if most < self.min_tiles:  # no grid is left to choose from; the authors' code then takes one tile
            return self.replace(min_tiles=1, max_tiles=1)
        return self.replace(max_tiles=most)

    def smaller(self) -> tuple[Self, ...]:
        """The rule with ever fewer tiles, down to one."""
        counts = range(self.max_tiles - 1, 0, -1)
        return tuple(self.replace(max_tiles=count, min_tiles=min(self.min_tiles, count)) for count in counts)

    def grid(self, size: Size) -> tuple[int, int]:
        """(columns, rows) whose ratio is nearest the picture's. Of equally near ones a later, larger one wins only
        where the picture has more than half its pixels."""
        width, height = size
        best, smallest = (1, 1), math.inf
        for columns, rows in _tile_grids(self.min_tiles, self.max_tiles):
            difference = abs(width / height - columns / rows)
            halved = 0.5 * self.tile_size * self.tile_size * columns * rows
            if difference < smallest or (difference == smallest and width * height > halved):
                best, smallest = (columns, rows), difference
        return best

    def tiling(self, size: Size, patch_size: int) -> Tiling:
        """Canvases and tiles for a picture of `size`: the grid row by row, then the thumbnail."""
        _check_size(size)
        side = self.tile_size
        columns, rows = self.grid(size)
        patches = (1, side // patch_size, side // patch_size)
        canvases = [_stretched(size, (columns * side, rows * side))]
        tiles = [
            Tile(0, (x * side, y * side, (x + 1) * side, (y + 1) * side), patches)
            for y in range(rows)
            for x in range(columns)
        ]
        if self.thumbnail == "last" and len(tiles) > 1:
            canvases.append(_stretched(size, (side, side)))
            tiles.append(Tile(1, (0, 0, side, side), patches))
        return Tiling(tuple(canvases), tuple(tiles), columns, rows)


@cache
def _tile_grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of `least` to `most` tiles, fewest tiles first.

    Grids of equally many tiles stand in the order in which the authors' code meets them, that of a Python set filled in
    this order: CPython's, the same in all versions since 3.8. It matters where two of them are exactly as near, which
    takes least == most.
    """
    sides = [(i, j) for n in range(least, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)]
    grids = {(columns, rows) for columns, rows in sides if least <= columns * rows <= most}
    return tuple(sorted(grids, key=math.prod))


def _stretched(size: Size, canvas: Size) -> Canvas:
    return Canvas(size, (0, 0), canvas, canvas, (0, 0))


ResolutionConfig = Annotated[CenterCrop | Squash | Pad | AnyRes | DynamicTiles | Native, Field(discriminator="kind")]
