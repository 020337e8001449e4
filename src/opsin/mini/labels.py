"""What stands in each patch: dense supervision for the tower, and what the language model reads before it sees pixels.

Nine numbers a patch, each 0 for nothing: what is centred there, what covers it, in which colour; where a thing is
centred, how far its box reaches from the patch's middle to the left, the top, the right and the bottom; where a letter
or digit is centred, which one stands before it; and how high the bar is that covers the patch.
"""

import numpy as np
from numpy.typing import NDArray

from opsin.demo.labels import ANCHORS, COVERS, DIGITS, INKS
from opsin.demo.scene import BAR_STEP, LETTERS, MAX_BAR, Scene
from opsin.mini.model import PATCH, shown_size

NUM_REACHES, REACH_STEP = 12, 2.0
"""Reaches are told in steps of so many pixels, from 1 to NUM_REACHES."""
BEFORE = ("nothing", "first", *LETTERS, *DIGITS)
FIELDS = (len(ANCHORS), len(COVERS), len(INKS), *(NUM_REACHES + 1,) * 4, len(BEFORE), MAX_BAR + 1)
"""Values of each of the nine numbers, `nothing` included."""
ANCHOR, COVER, INK, REACH, PREVIOUS, VALUE = 0, 1, 2, slice(3, 7), 7, 8
NUM_PLACES = 24
"""Into how many parts a side is cut to tell where a token stands."""
WORDS: dict[int, tuple[str, ...]] = {
    ANCHOR: tuple(name.removeprefix("value ") for name in ANCHORS),
    COVER: COVERS,
    INK: INKS,
    VALUE: tuple(map(str, range(MAX_BAR + 1))),
}
"""How the language says a label, for those it has a word for; `nothing` (0) is not said."""
_ANCHOR_IDS = {name: index for index, name in enumerate(ANCHORS)}
_COVER_IDS = {name: index for index, name in enumerate(COVERS)}
_BEFORE_IDS = {name: index for index, name in enumerate(BEFORE)}
_INK_IDS = {name: index for index, name in enumerate(INKS)}
_LEAST_OVERLAP = 2.5
"""Pixels that a box must reach into a patch, across and down, to count as covering it."""


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """(rows, columns, 9) labels of the patches of a picture, as it is shown to the model."""
    width, height = shown_size(scene)
    across, down = width / scene.size[0], height / scene.size[1]
    labels = np.zeros((height // PATCH, width // PATCH, len(FIELDS)), np.int64)

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
        middle = (place[1] + 0.5) * PATCH, (place[0] + 0.5) * PATCH
        reaches = (
            middle[0] - (thing.x - half) * across,
            middle[1] - (thing.y - half) * down,
            (thing.x + half) * across - middle[0],
            (thing.y + half) * down - middle[1],
        )
        labels[place][REACH] = [min(NUM_REACHES, max(1, round(reach / REACH_STEP))) for reach in reaches]
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
    return labels


def _covered(start: float, stop: float, count: int) -> slice:
    """Patches that start..stop reaches into by at least _LEAST_OVERLAP pixels."""
    first = int(max(0.0, start + _LEAST_OVERLAP) // PATCH)
    last = int(max(0.0, min(stop - _LEAST_OVERLAP, count * PATCH - 1)) // PATCH)
    return slice(first, last + 1)


def in_blocks(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows, columns, 9) -> (tokens, 4, 9): as patches arrive, block by block, row by row within a block."""
    rows, columns, fields = labels.shape
    return labels.reshape(rows // 2, 2, columns // 2, 2, fields).transpose(0, 2, 1, 3, 4).reshape(-1, 4, fields)


def token_places(rows: int, columns: int) -> NDArray[np.int64]:
    """(tokens, 2) in which part of the height and of the width each token of rows x columns tokens stands."""
    down, across = np.indices((rows, columns)).reshape(2, -1)
    shares = np.stack([(down + 0.5) / rows, (across + 0.5) / columns], axis=1)
    return (shares * NUM_PLACES).astype(np.int64)
