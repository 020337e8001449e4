"""A picture as integers: which canvases are drawn, which tiles are cut, which connector row fills which token slot.

An `ImagePlan` follows from (width, height) alone, before any pixel is read. It is the only place where image tokens are
counted: the encoder, the planner, the packer and the inspector all take `num_slots` from here.

Sizes are (width, height), boxes (left, top, right, bottom), grids (t, h, w) in patches or rows.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
Grid = tuple[int, int, int]
Color = tuple[int, int, int]
IntBox = tuple[int, int, int, int]

NEWLINE = -1
"""Entry of `RowLayout.order` that stands for the learned newline row. It is -1 because the model appends that row last."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """One resampled view of the source: pad the source, resize it, then paste (or crop) it onto the canvas."""

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
    """Per tile, the (t, h, w) grid of rows that the connector returns."""
    layout: RowLayout
    mosaic: tuple[int, int] = field(default=(1, 1))
    """(columns, rows) of the tile mosaic; (1, 1) when the picture is one tile."""

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
        return sum(t * h * w for t, h, w in self.row_grids)

    @property
    def num_slots(self) -> int:
        """Token positions that the picture takes in the sequence."""
        return len(self.layout.order)

    @property
    def derived_pixels(self) -> int:
        """The largest picture that preparing this one allocates, in pixels: padded, resized or canvas."""
        return max(w * h for c in self.canvases for w, h in (c.padded, c.resized, c.size))

    @cached_property
    def row_tiles(self) -> NDArray[np.int32]:
        """(num_rows,) tile index of each connector row."""
        counts = [t * h * w for t, h, w in self.row_grids]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @cached_property
    def row_boxes(self) -> NDArray[np.float64]:
        """(num_rows, 4) source box of each connector row, clipped to the picture; padding gives an empty box.

        Exact for connectors that keep the raster (linear, MLP, pixel shuffle, merger); a row of a resampler looks at the
        whole tile, so its box there names a cell of the tile by position only.
        """
        boxes = []
        for tile, (_, rows, columns) in zip(self.tiles, self.row_grids, strict=True):
            left, top, right, bottom = tile.box
            xs = np.linspace(left, right, columns + 1)
            ys = np.linspace(top, bottom, rows + 1)
            grid = np.empty((rows, columns, 4))
            grid[..., 0], grid[..., 2] = xs[:-1], xs[1:]
            grid[..., 1], grid[..., 3] = ys[:-1, None], ys[1:, None]
            boxes.append(self.canvases[tile.canvas].to_source(grid.reshape(-1, 4)))
        limits = np.array([*self.size, *self.size], np.float64)
        return np.clip(np.concatenate(boxes), 0, limits)

    def slot_boxes(self) -> NDArray[np.float64]:
        """(num_slots, 4) source box of each token slot; newline slots get NaN."""
        order, resample = self.layout.order, self.layout.resample
        boxes = self.row_boxes
        if resample is not None:
            boxes = np.concatenate([boxes, self._resampled_boxes(resample)])
        out = np.full((len(order), 4), np.nan)
        filled = order != NEWLINE
        out[filled] = boxes[order[filled]]
        return out

    def _resampled_boxes(self, resample: Resample) -> NDArray[np.float64]:
        """Boxes of resampled rows: the raster's whole extent cut into the new grid."""
        source = self.row_boxes[resample.rows]
        left, top, right, bottom = source[:, 0].min(), source[:, 1].min(), source[:, 2].max(), source[:, 3].max()
        rows, columns = resample.grid_out
        xs, ys = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
        grid = np.empty((rows, columns, 4))
        grid[..., 0], grid[..., 2] = xs[:-1], xs[1:]
        grid[..., 1], grid[..., 3] = ys[:-1, None], ys[1:, None]
        return grid.reshape(-1, 4)
