"""What stands in each patch: dense supervision for the tower, and what the language model reads before it sees pixels.

Seven codes a patch, each 0 for nothing: what is centred there, what covers it, in which colour; where a letter or digit
is centred, which one stands before it; how high the bar is that covers the patch; and where a thing is centred, in
which third of the height and of the width. A thing's patch also has the numbers of its box.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.demo.labels import ANCHORS, COVERS, DIGITS, INKS
from opsin.demo.scene import BAR_STEP, COLUMNS, LETTERS, MAX_BAR, ROWS, Scene
from opsin.mini.model import PATCH, shown_size

BEFORE = ("nothing", "first", *LETTERS, *DIGITS)
THIRDS_DOWN, THIRDS_ACROSS = ("nothing", *ROWS), ("nothing", *COLUMNS)
FIELDS = (*map(len, (ANCHORS, COVERS, INKS, BEFORE)), MAX_BAR + 1, len(THIRDS_DOWN), len(THIRDS_ACROSS))
"""Values of each of the seven codes, `nothing` included."""
ANCHOR, COVER, INK, PREVIOUS, VALUE, DOWN, ACROSS = range(7)
WORDS: dict[int, tuple[str, ...]] = {
    ANCHOR: tuple(name.removeprefix("value ") for name in ANCHORS),
    COVER: COVERS,
    INK: INKS,
    VALUE: tuple(map(str, range(MAX_BAR + 1))),
    DOWN: THIRDS_DOWN,
    ACROSS: THIRDS_ACROSS,
}
"""How the language says a code, for those it has a word for; `nothing` (0) is not said."""
NUM_NUMBERS = 5
"""Left, top, right and bottom as shares of the picture's sides, and the side in units of UNIT pixels."""
UNIT = 40.0
FREQUENCIES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
NUM_WAVES = 2 * len(FREQUENCIES) * NUM_NUMBERS
_ANCHOR_IDS = {name: index for index, name in enumerate(ANCHORS)}
_COVER_IDS = {name: index for index, name in enumerate(COVERS)}
_BEFORE_IDS = {name: index for index, name in enumerate(BEFORE)}
_INK_IDS = {name: index for index, name in enumerate(INKS)}
_LEAST_OVERLAP = 2.5
"""Pixels that a box must reach into a patch, across and down, to count as covering it."""


@dataclass(frozen=True, eq=False, slots=True)
class PatchLabels:
    """Labels of a picture's patches."""

    codes: NDArray[np.int64]
    """(rows, columns, 7)."""
    numbers: NDArray[np.float32]
    """(rows, columns, 5) of the thing centred there; zeros where none is."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.codes.shape[0], self.codes.shape[1]

    def in_blocks(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(tokens, 4, 7) and (tokens, 4, 5): as patches arrive, block by block, row by row within a block."""
        rows, columns = self.grid

        def blocks(x: NDArray[Any]) -> NDArray[Any]:
            x = x.reshape(rows // 2, 2, columns // 2, 2, x.shape[-1])
            return x.transpose(0, 2, 1, 3, 4).reshape(-1, 4, x.shape[-1])

        return blocks(self.codes), blocks(self.numbers)


def waves(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """(..., 5) numbers -> (..., 60) their sines and cosines at six frequencies; zeros where no thing is centred.

    A model reads a number from such a code far more finely than from its size alone, and a network that is a little
    off writes a code of a number that is a little off.
    """
    turns = numbers[..., None] * np.array(FREQUENCIES, np.float32) * np.float32(2 * np.pi)
    found = np.concatenate([np.sin(turns), np.cos(turns)], axis=-1).reshape(*numbers.shape[:-1], NUM_WAVES)
    return found * (numbers[..., -1:] > 0)


def patch_labels(scene: Scene) -> PatchLabels:
    """Labels of the patches of a picture, as it is shown to the model."""
    width, height = shown_size(scene)
    across, down = width / scene.size[0], height / scene.size[1]
    labels = np.zeros((height // PATCH, width // PATCH, len(FIELDS)), np.int64)
    numbers = np.zeros((*labels.shape[:2], NUM_NUMBERS), np.float32)

    def at(x: float, y: float) -> tuple[int, int]:
        row, column = int(y * down // PATCH), int(x * across // PATCH)
        return min(labels.shape[0] - 1, max(0, row)), min(labels.shape[1] - 1, max(0, column))

    def spread(cover: str, ink: str, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        area = (
            _covered(top * down, bottom * down, labels.shape[0]),
            _covered(left * across, right * across, labels.shape[1]),
        )
        labels[*area, COVER], labels[*area, INK] = _COVER_IDS[cover], _INK_IDS[ink]
        return area

    for thing in scene.things:
        half = thing.size / 2
        spread(thing.shape, thing.color, thing.x - half, thing.y - half, thing.x + half, thing.y + half)
    for thing in scene.things:
        half, place = thing.size / 2, at(thing.x, thing.y)
        # A neighbour's box may have claimed the patch in which this thing is centred: the centre decides.
        labels[place][:3] = _ANCHOR_IDS[thing.shape], _COVER_IDS[thing.shape], _INK_IDS[thing.color]
        left, top, right, bottom = thing.x - half, thing.y - half, thing.x + half, thing.y + half
        wide, high = scene.size
        # Not the thing's own cell: of what moves, that is where it began.
        labels[place][DOWN] = 1 + min(2, int(3 * thing.y / high))
        labels[place][ACROSS] = 1 + min(2, int(3 * thing.x / wide))
        numbers[place] = left / wide, top / high, right / wide, bottom / high, thing.size / UNIT
    for writing in scene.writings:
        top = writing.baseline - writing.height
        spread("writing", writing.color, writing.pitch[0] - 5, top, writing.pitch[-1] + 5, writing.baseline)
        before = "first"
        for char, x in zip(writing.text, writing.pitch, strict=True):
            place = at(x, writing.baseline - writing.height / 2)
            labels[place][:3] = _ANCHOR_IDS[char], _COVER_IDS["writing"], _INK_IDS[writing.color]
            labels[place][PREVIOUS] = _BEFORE_IDS[before]
            before = char
    for bar in scene.bars:
        middle_x, top = (bar.left + bar.right) / 2, scene.baseline - bar.value * BAR_STEP
        area = spread("bar", bar.color, bar.left, top, bar.right, scene.baseline)
        labels[*area, VALUE] = bar.value
        # Just inside the bar, so that its colour and its value stand in one patch.
        place = at(middle_x, top + 2)
        labels[place][:3] = _ANCHOR_IDS[f"value {bar.value}"], _COVER_IDS["bar"], _INK_IDS[bar.color]
        place = at(middle_x, scene.baseline - 3)
        if not labels[place][ANCHOR]:
            labels[place][:3] = _ANCHOR_IDS["bar"], _COVER_IDS["bar"], _INK_IDS[bar.color]
    return PatchLabels(labels, numbers)


def _covered(start: float, stop: float, count: int) -> slice:
    """Patches that start..stop reaches into by at least _LEAST_OVERLAP pixels."""
    first = int(max(0.0, start + _LEAST_OVERLAP) // PATCH)
    last = int(max(0.0, min(stop - _LEAST_OVERLAP, count * PATCH - 1)) // PATCH)
    return slice(first, last + 1)
