"""Scenes read off pictures of the data set by their colours: to tell what is seen from what is understood.

No model is trained on them: they serve to score the language model without its eyes.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from experiments.nlvr.data import opened
from experiments.nlvr.scenes import BOX, BOX_LEFTS, COLORS, SIZES, Item, Scene
from numpy.typing import NDArray

_SAME = 90
"""How far apart colours may be, summed over channels, to be the same: edges of circles are mixed with the ground."""
_FILLED = (("square", 0.9), ("circle", 0.6), ("triangle", 0.0))
"""Least share of its square that a shape fills."""


def read_scene(path: Path) -> Scene:
    """What a picture shows; towers from the base up."""
    pixels = np.asarray(opened(path)).astype(np.int64)
    boxes = []
    for left in BOX_LEFTS:
        items = [
            _item(name, rows, columns)
            for name, color in COLORS.items()
            for rows, columns in _blobs(np.abs(pixels[:, left : left + BOX] - color).sum(-1) < _SAME)
        ]
        boxes.append(tuple(sorted(items, key=lambda item: -item.y)))
    towers = all(item.shape == "square" and item.x == 2 * BOX // 5 for box in boxes for item in box)
    return Scene("towers" if towers else "scattered", tuple(boxes))


def _item(color: str, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Item:
    top, left = int(rows.min()), int(columns.min())
    height, width = int(rows.max()) - top + 1, int(columns.max()) - left + 1
    size = min(SIZES.values(), key=lambda side: abs(side - max(height, width)))
    share = len(rows) / size**2
    shape = next(name for name, least in _FILLED if share >= least)
    return Item(shape, color, min(left, BOX - size), min(top, BOX - size), size)


def _blobs(mask: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows and columns of the pixels of each connected part of at least 20 pixels."""
    left = mask.copy()
    while left.any():
        row, column = (int(each[0]) for each in left.nonzero())
        left[row, column] = False
        waiting, found = [(row, column)], []
        while waiting:
            row, column = waiting.pop()
            found.append((row, column))
            for r in range(max(0, row - 1), min(BOX, row + 2)):
                for c in range(max(0, column - 1), min(BOX, column + 2)):
                    if left[r, c]:
                        left[r, c] = False
                        waiting.append((r, c))
        if len(found) >= 20:
            rows, columns = zip(*found, strict=True)
            yield np.array(rows), np.array(columns)
