"""What stands in each patch of a picture: the dense supervision of the vision tower, and pictures typed with words.

The language model's pretraining text holds typed pictures, as people once drew with a typewriter: one place per patch,
and in it, struck over each other, the words for where it is, for its colour and for what is centred there: a shape's
name, a letter, a digit, the foot of a bar (`bar`) or its top (its value).
"""

import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opsin.demo.scene import BAR_STEP, COLORS, COLUMNS, LETTERS, MAX_BAR, PATCH, ROWS, SHAPES, SIDE, Scene

GRID = SIDE // PATCH
"""Patches along one side."""
DIGITS = "0123456789"
NOTHING = 0
ANCHORS = ("nothing", *SHAPES, *LETTERS, *DIGITS, *(f"value {v}" for v in range(1, MAX_BAR + 1)), "bar")
"""What can be centred in a patch; each thing, character and bar has exactly one patch of each of its anchors."""
COVERS = ("nothing", *SHAPES, "writing", "bar")
"""What can cover a part of a patch."""
INKS = ("nothing", *COLORS)
_ANCHOR_IDS = {name: index for index, name in enumerate(ANCHORS)}
_COVER_IDS = {name: index for index, name in enumerate(COVERS)}
_INK_IDS = {name: index for index, name in enumerate(INKS)}
_LEAST_OVERLAP = 3.0
"""Pixels that a box must reach into a patch, across and down, to count as covering it."""


@dataclass(frozen=True, eq=False, slots=True)
class PatchLabels:
    """Each (GRID, GRID) int64, row by row; 0 is `nothing`."""

    anchor: NDArray[np.int64]
    """Index into ANCHORS."""
    cover: NDArray[np.int64]
    """Index into COVERS."""
    ink: NDArray[np.int64]
    """Index into INKS: the colour of what covers the patch."""


def patch_labels(scene: Scene) -> PatchLabels:
    """Labels of every patch."""
    anchor, cover, ink = (np.zeros((GRID, GRID), np.int64) for _ in range(3))

    def place(name: str, x: float, y: float) -> None:
        anchor[_patch(y), _patch(x)] = _ANCHOR_IDS[name]

    def spread(name: str, color: str, left: float, top: float, right: float, bottom: float) -> None:
        area = (_covered(top, bottom), _covered(left, right))
        cover[area] = _COVER_IDS[name]
        ink[area] = _INK_IDS[color]

    for thing in scene.things:
        half = thing.size / 2
        spread(thing.shape, thing.color, thing.x - half, thing.y - half, thing.x + half, thing.y + half)
    for thing in scene.things:
        # A neighbour's box may have claimed the patch in which this thing is centred: the centre decides.
        spread(thing.shape, thing.color, thing.x - 4, thing.y - 4, thing.x + 4, thing.y + 4)
        place(thing.shape, thing.x, thing.y)
    for writing in scene.writings:
        middle = writing.baseline - writing.height / 2
        top, bottom = middle - writing.height / 2, writing.baseline
        spread("writing", writing.color, writing.pitch[0] - 5, top, writing.pitch[-1] + 5, bottom)
        for char, x in zip(writing.text, writing.pitch, strict=True):
            place(char, x, middle)
    for bar in scene.bars:
        middle, top = (bar.left + bar.right) / 2, scene.baseline - bar.value * BAR_STEP
        spread("bar", bar.color, bar.left, top, bar.right, scene.baseline)
        place(f"value {bar.value}", middle, top + BAR_STEP / 2 - 1)
        place("bar", middle, SIDE - 1)
        cover[-1, _patch(middle)] = _COVER_IDS["bar"]
        ink[-1, _patch(middle)] = _INK_IDS[bar.color]
    return PatchLabels(anchor, cover, ink)


def _patch(pixels: float) -> int:
    return min(GRID - 1, max(0, int(pixels // PATCH)))


def _covered(start: float, stop: float) -> slice:
    """Patches that start..stop reaches into by at least _LEAST_OVERLAP pixels."""
    first = int(max(0.0, start + _LEAST_OVERLAP) // PATCH)
    last = int(max(0.0, min(stop - _LEAST_OVERLAP, SIDE - 1)) // PATCH)
    return slice(first, last + 1)


def typed_picture(labels: PatchLabels, rng: random.Random, *, dropout: float = 0.0) -> list[tuple[str, ...]]:
    """For each patch, row by row, the words struck there: its place, its colour, and what is centred in it.

    Words begin with a space, letters and digits do not: each is one token.
    dropout: how often a word is left out, so that a reader learns to need none in particular. What is centred stays.
    """
    patches = []
    for row in range(GRID):
        for column in range(GRID):
            words = [f" {ROWS[row // 3]}", f" {COLUMNS[column // 3]}"]
            if labels.ink[row, column] != NOTHING:
                words.append(f" {INKS[labels.ink[row, column]]}")
            if dropout:
                words = [word for word in words if rng.random() >= dropout]
            name = ANCHORS[labels.anchor[row, column]]
            if name != "nothing":
                name = name.removeprefix("value ")
                words.append(name if len(name) == 1 else f" {name}")
            patches.append(tuple(words))
    return patches
