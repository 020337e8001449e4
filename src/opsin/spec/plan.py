"""A picture as integers: which canvases are drawn, which tiles are cut, which connector row fills which token slot.

An `ImagePlan` follows from (width, height) alone, before any pixel is read. It is the only place where image tokens are
counted: the encoder, the planner, the packer and the inspector all take `num_slots` from here.

Sizes are (width, height), boxes (left, top, right, bottom), grids (t, h, w) in patches or rows.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
Grid = tuple[int, int, int]
Color = tuple[int, int, int]
IntBox = tuple[int, int, int, int]

NEWLINE = -1
"""Entry of `RowLayout.order` for the learned newline row. It is -1 because the model appends that row last."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """One resampled view of the source: pad the source, resize it, then paste it onto the canvas, which may crop it.

    source --pad_offset--> padded --bicubic--> resized --offset--> canvas --Tile.box--> what the tower sees
    """

    padded: Size
    """Source after padding; equal to the source size when nothing is padded."""
    pad_offset: tuple[int, int]
    """Where the source's top-left corner lies on the padded picture."""
    resized: Size
    """Size the padded picture is resampled to."""
    size: Size
    """Size of the canvas."""
    offset: tuple[int, int]
    """Where the resized picture's top-left corner lies on the canvas; negative values crop it."""
    fill: Color = (0, 0, 0)
    """8-bit RGB colour of padding and of canvas that the picture does not cover."""

    def to_source(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map boxes (N, 4) on this canvas to source pixels. Not clipped: padding maps outside the picture."""
        scale = np.array(self.padded, np.float64) / np.array(self.resized, np.float64)
        points = np.asarray(boxes, np.float64).reshape(-1, 2, 2)
        points = (points - np.array(self.offset)) * scale - np.array(self.pad_offset)
        return points.reshape(-1, 4)

    def from_source(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map boxes (N, 4) in source pixels onto this canvas; the inverse of `to_source`."""
        scale = np.array(self.resized, np.float64) / np.array(self.padded, np.float64)
        points = np.asarray(boxes, np.float64).reshape(-1, 2, 2)
        points = (points + np.array(self.pad_offset)) * scale + np.array(self.offset)
        return points.reshape(-1, 4)

    @property
    def largest(self) -> int:
        """Pixels of the largest picture that drawing this canvas allocates.

        That may be the one between the resampler's two steps: lines already narrowed, still as many as before. The
        padded source is never made, because its lines are padded and narrowed in bands.
        """
        (width, height), (_, padded_height) = self.resized, self.padded
        return max(width * height, width * padded_height, self.size[0] * self.size[1])


@dataclass(frozen=True, slots=True)
class Tile:
    """A rectangle of a canvas that the vision tower sees as one picture."""

    canvas: int
    """Index into `ImagePlan.canvases`."""
    box: IntBox
    """Where it lies on that canvas, in canvas pixels."""
    grid: Grid
    """Patches (t, h, w)."""


@dataclass(frozen=True, eq=False, slots=True)
class Resample:
    """Rows made by resampling a raster of connector rows (anyres_max, maxpool2x2): they follow the connector's rows."""

    rows: NDArray[np.int32]
    """Connector rows of the raster, row-major, grid_in[0] * grid_in[1] of them."""
    grid_in: tuple[int, int]
    """(h, w) before."""
    grid_out: tuple[int, int]
    """(h, w) after."""
    mode: Literal["bilinear", "max"]
    """Bilinear with align_corners=False, or a 2x2 maximum."""


@dataclass(frozen=True, eq=False, slots=True)
class RowLayout:
    """For each token slot of a picture, the row that fills it."""

    order: NDArray[np.int32]
    """(num_slots,) row indices: first the connector's rows, tile by tile, then the resampled rows; or NEWLINE."""
    resample: Resample | None = None


@dataclass(frozen=True, slots=True)
class Tiling:
    """What a resolution rule decides before the connector is known: canvases and tiles."""

    canvases: tuple[Canvas, ...]
    tiles: tuple[Tile, ...]
    columns: int = 1
    """Tiles per row of the mosaic that follows the base tile (anyres); 1 where there is no mosaic."""
    rows: int = 1


@dataclass(frozen=True, eq=False)
class ImagePlan:
    """Everything about one picture that can be known from its size."""

    size: Size
    """Source (width, height) in pixels."""
    canvases: tuple[Canvas, ...]
    tiles: tuple[Tile, ...]
    row_grids: tuple[Grid, ...]
    """Per tile, the (t, h, w) raster of rows that the connector returns."""
    layout: RowLayout
    mosaic: tuple[int, int] = (1, 1)
    """(columns, rows) of the tile mosaic; (1, 1) when the picture is one tile."""
    class_rows: Literal[0, 1] = 0
    """Rows in front of each tile's raster: 1 where the class token leaves the tower and sees the whole tile."""
    frames: tuple[int, ...] = ()
    """Of a video: indices of the frames that are shown; its one tile has the patches of all. Empty for a picture."""

    @property
    def raster(self) -> Grid | None:
        """The (t, h, w) of the slots, where they are one raster of rows and nothing else."""
        whole = self.num_tiles == 1 and not self.class_rows and self.num_slots == math.prod(self.row_grids[0])
        return self.row_grids[0] if whole else None

    @property
    def num_tiles(self) -> int:
        """Pictures that the tower sees."""
        return len(self.tiles)

    @cached_property
    def num_patches(self) -> int:
        """Patches over all tiles."""
        return sum(t * h * w for t, h, w in (tile.grid for tile in self.tiles))

    @cached_property
    def num_rows(self) -> int:
        """Rows that the connector returns over all tiles (resampled rows and the newline are not counted)."""
        return sum(self._rows_per_tile)

    @property
    def num_slots(self) -> int:
        """Token positions that the picture takes in the sequence."""
        return len(self.layout.order)

    @property
    def derived_pixels(self) -> int:
        """Pixels of the largest picture that preparing this one allocates, the source aside."""
        return max(canvas.largest for canvas in self.canvases)

    @property
    def _rows_per_tile(self) -> list[int]:
        return [self.class_rows + t * h * w for t, h, w in self.row_grids]

    @cached_property
    def row_tiles(self) -> NDArray[np.int32]:
        """(num_rows,) tile index of each connector row."""
        return np.repeat(np.arange(self.num_tiles, dtype=np.int32), self._rows_per_tile)

    @cached_property
    def row_boxes(self) -> NDArray[np.float64]:
        """(num_rows, 4) source box of each connector row, clipped to the picture; padding gives an empty box.

        Exact for connectors that keep the raster (linear, MLP, pixel shuffle, merger); a row of a resampler looks at
        the whole tile, so its box there names a cell of the tile by position only.
        """
        return self._clip(self._cells)

    def slot_boxes(self) -> NDArray[np.float64]:
        """(num_slots, 4) source box of each token slot, clipped to the picture; newline slots get NaN."""
        order, resample = self.layout.order, self.layout.resample
        boxes = self._cells
        if resample is not None:
            boxes = np.concatenate([boxes, self._resampled_cells(resample)])
        out = np.full((len(order), 4), np.nan)
        filled = order != NEWLINE
        out[filled] = self._clip(boxes[order[filled]])
        return out

    @cached_property
    def _cells(self) -> NDArray[np.float64]:
        """(num_rows, 4) source box of each connector row, padding included."""
        boxes = []
        for tile, (times, rows, columns) in zip(self.tiles, self.row_grids, strict=True):
            whole = np.array(tile.box, np.float64)
            cells = np.tile(_grid_cells(whole, whole[2:] - whole[:2], (rows, columns)), (times, 1))
            if self.class_rows:
                cells = np.concatenate([whole[None], cells])
            boxes.append(self.canvases[tile.canvas].to_source(cells))
        return np.concatenate(boxes)

    def _resampled_cells(self, resample: Resample) -> NDArray[np.float64]:
        """Source boxes of resampled rows. The raster they are made of is regular, so its first cell gives them all."""
        first = self._cells[resample.rows[0]]
        (in_h, in_w), (out_h, out_w) = resample.grid_in, resample.grid_out
        # Maxima cover exactly 2x2 cells and leave an odd last line out; bilinear resampling covers the whole raster.
        covered = (2 * out_w, 2 * out_h) if resample.mode == "max" else (in_w, in_h)
        return _grid_cells(first, (first[2:] - first[:2]) * covered, (out_h, out_w))

    def _clip(self, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(boxes, 0, np.array([*self.size, *self.size], np.float64))


def _grid_cells(corner: NDArray[np.float64], extent: NDArray[np.float64], grid: tuple[int, int]) -> NDArray[np.float64]:
    """(rows * columns, 4) boxes that cut `extent` (width, height), beginning at `corner` (left, top), into a grid."""
    rows, columns = grid
    xs = np.linspace(corner[0], corner[0] + extent[0], columns + 1)
    ys = np.linspace(corner[1], corner[1] + extent[1], rows + 1)
    cells = np.empty((rows, columns, 4))
    cells[..., 0], cells[..., 2] = xs[:-1], xs[1:]
    cells[..., 1], cells[..., 3] = ys[:-1, None], ys[1:, None]
    return cells.reshape(-1, 4)
