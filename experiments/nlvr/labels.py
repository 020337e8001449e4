"""What each patch is told about a drawn picture; and what the language model reads in its place before it sees pixels.

A picture has 64 patches, and there are four places (three boxes, and the whole picture) by sixteen sets of things
(everything, each colour, each shape, each colour of each shape). So every patch of a box keeps the account of one set
in its box, and the sixteen patches of the grey gaps, which show nothing, those of the sets in the whole picture. What
a sentence names is then found in one row, as facts that are yes or no; numbers are written as thermometers: at least
one, at least two, ...
"""

import itertools
from collections import Counter

import numpy as np
from experiments.nlvr.model import COLUMNS, PATCH, ROWS
from experiments.nlvr.scenes import BOX_LEFTS, COLORS, MAX_HEIGHT, SHAPES, SIZES, Item, Scene
from numpy.typing import NDArray

Facts = NDArray[np.float32]
"""0 or 1."""
SIDES = ("left", "right", "top", "bottom")
KINDS: tuple[tuple[str, str], ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
SETS: tuple[tuple[str, str], ...] = (
    ("", ""),
    *[(color, "") for color in COLORS],
    *[("", shape) for shape in SHAPES],
    *KINDS,
)
"""Colour and shape of what an account is about; empty where any is."""
_COLORED = slice(1, 4)
"""Which of SETS are colours."""
_HEIGHTS = range(1, MAX_HEIGHT + 1)
WHERE = 4
"""Three boxes, and the whole picture."""
_BOX_COLUMNS = tuple(range(left // PATCH, left // PATCH + 4) for left in BOX_LEFTS)
_GAP_COLUMNS = tuple(c for c in range(COLUMNS) if not any(c in columns for columns in _BOX_COLUMNS))
PATCHES = np.array(
    [[row * COLUMNS + c for row in range(ROWS) for c in columns] for columns in (*_BOX_COLUMNS, _GAP_COLUMNS)]
)
"""(WHERE, 16): which patch keeps which account."""
_MOST = (8, 4, 4, 2, 2, 2)
"""How far thermometers go of: all of a set, those that touch a wall, none, the bottom, the right wall, two walls."""
_LENGTHS = (WHERE + len(SETS), sum(_MOST), 24, 14, 54, 36)
_STARTS = tuple(itertools.accumulate(_LENGTHS, initial=0))
NUM_FACTS = _STARTS[-1]
_KEY, _COUNTS, _BOXES, _BOX_COLOR, _COLOR, _WHOLE = (slice(*each) for each in itertools.pairwise(_STARTS))


def patch_facts(scene: Scene) -> Facts:
    """(ROWS * COLUMNS, 25): kinds and sizes centred there, walls touched by these, kinds that cover a part of it."""
    facts = np.zeros((ROWS, COLUMNS, 25), np.float32)
    for left, box in zip(BOX_LEFTS, scene.boxes, strict=True):
        for item in box:
            kind = KINDS.index((item.color, item.shape))
            x, y, end = left + item.x, item.y, item.size - 1
            here = facts[(y + item.size // 2) // PATCH, (x + item.size // 2) // PATCH]
            here[kind] = 1
            here[9 + list(SIZES.values()).index(item.size)] = 1
            for side in item.walls:
                here[12 + SIDES.index(side)] = 1
            facts[y // PATCH : (y + end) // PATCH + 1, x // PATCH : (x + end) // PATCH + 1, 16 + kind] = 1
    return facts.reshape(ROWS * COLUMNS, -1)


def row_facts(scene: Scene) -> Facts:
    """(ROWS * COLUMNS, NUM_FACTS): the account that each patch keeps."""
    facts = np.zeros((WHERE, len(SETS), NUM_FACTS), np.float32)
    facts[..., _KEY] = _keys()
    counts = np.stack([_counted(box) for box in scene.boxes])
    facts[..., _COUNTS] = np.concatenate(
        [_thermometer(each, most) for each, most in zip(np.moveaxis(_with_sum(counts), -1, 0), _MOST, strict=True)], -1
    )
    facts[3, :, _BOXES] = _boxes(counts)
    for number, box in enumerate(scene.boxes):
        facts[number, _COLORED, _BOX_COLOR] = [_box_color(scene, box, color) for color in COLORS]
        facts[number, 0, _WHOLE] = _whole(scene, (box,))
    facts[3, _COLORED, _COLOR] = [_color(scene, color) for color in COLORS]
    facts[3, 0, _WHOLE] = _whole(scene, scene.boxes)
    return _by_patch(facts)


def relevant() -> NDArray[np.bool_]:
    """(ROWS * COLUMNS, NUM_FACTS): which facts an account can have at all."""
    mask = np.zeros((WHERE, len(SETS), NUM_FACTS), np.float32)
    mask[..., _COUNTS] = 1
    mask[3, :, _BOXES] = 1
    mask[:3, _COLORED, _BOX_COLOR] = 1
    mask[3, _COLORED, _COLOR] = 1
    mask[:, 0, _WHOLE] = 1
    return _by_patch(mask) > 0


def _by_patch(accounts: Facts) -> Facts:
    facts = np.empty((ROWS * COLUMNS, accounts.shape[-1]), np.float32)
    facts[PATCHES.ravel()] = accounts.reshape(-1, accounts.shape[-1])
    return facts


def _keys() -> Facts:
    """(WHERE, 16, 20): what an account is about."""
    where = np.repeat(np.eye(WHERE)[:, None], len(SETS), axis=1)
    which = np.repeat(np.eye(len(SETS))[None], WHERE, axis=0)
    return np.concatenate([where, which], -1).astype(np.float32)


def _counted(box: tuple[Item, ...]) -> NDArray[np.int64]:
    """(16, 6): how many of each set are how (_MOST)."""
    member = np.array([[c in ("", item.color) and s in ("", item.shape) for c, s in SETS] for item in box], np.int64)
    how = np.array(
        [
            [True, bool(item.walls), not item.walls, "bottom" in item.walls, "right" in item.walls, item.in_corner]
            for item in box
        ],
        np.int64,
    )
    return member.T @ how


def _with_sum(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([counts, counts.sum(0, keepdims=True)])


def _thermometer(counts: NDArray[np.int64], most: int) -> NDArray[np.bool_]:
    """(..., n) -> (..., n, most), or of (...) -> (..., most)."""
    return counts[..., None] >= np.arange(1, most + 1)


def _boxes(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(16, 24): in how many boxes there are at least, and exactly, so many of a set, and of it touching a wall."""
    number, touching = counts[..., 0], counts[..., 1]
    have = [number >= 1, number >= 2, number >= 3, number == 1, number == 2, number == 3, touching >= 1, touching >= 2]
    return _thermometer(np.stack(have, -1).sum(0), 3).reshape(len(SETS), -1)


def _box_color(scene: Scene, box: tuple[Item, ...], color: str) -> list[int]:
    """14 facts of a colour in a box: on top, alone, at each height, upon each colour, runs of it."""
    facts = [min(box, key=lambda item: item.y).color == color, {item.color for item in box} == {color}]
    if scene.kind != "towers":
        return [*map(int, facts), *[0] * 12]
    facts += [len(box) > level and box[level].color == color for level in range(MAX_HEIGHT)]
    pairs = [(high.color, low.color) for low, high in itertools.pairwise(box)]
    facts += [pairs.count((color, low)) >= least for low in COLORS for least in (1, 2)]
    return [*map(int, facts), *(int(longest_run(box, color) >= least) for least in (2, 3))]


def longest_run(box: tuple[Item, ...], color: str) -> int:
    """How many of a colour lie upon each other."""
    runs = [[key, *run] for key, run in itertools.groupby(item.color for item in box)]
    return max((len(run) - 1 for run in runs if run[0] == color), default=0)


def _color(scene: Scene, color: str) -> NDArray[np.bool_]:
    """54 facts of a colour in the picture: in how many boxes or towers it is where."""
    boxes, towers = scene.boxes, scene.boxes if scene.kind == "towers" else ()
    pairs = [(high.color, low.color) for box in towers for low, high in itertools.pairwise(box)]
    counts = (
        sum(min(box, key=lambda item: item.y).color == color for box in boxes),
        sum({item.color for item in box} == {color} for box in boxes),
        sum({item.color for item in box} == set(COLORS) - {color} for box in boxes),
        sum(box[0].color == color for box in towers),
        sum(len(box) > 1 and box[1].color == color for box in towers),
        sum(len(box) == 3 and box[1].color == color for box in towers),
        sum(longest_run(box, color) > 1 for box in towers),
        *(
            sum(len(b) == k and b[end].color == color for b in towers)
            for end in (0, -1)
            for k in range(1, MAX_HEIGHT + 1)
        ),
        *(pairs.count((color, low)) for low in COLORS),
    )
    return _thermometer(np.array(counts), 3).ravel()


def _whole(scene: Scene, boxes: tuple[tuple[Item, ...], ...]) -> NDArray[np.bool_]:
    """36 facts of one box, or of all: how many have each height, how many colours, how many are alike."""
    towers = scene.kind == "towers"
    heights, colors = [len(box) for box in boxes], [len({item.color for item in box}) for box in boxes]
    bases = [box[0].color for box in boxes] if towers else []
    tops = [box[-1].color for box in boxes] if towers else []
    alike = [max(Counter[int | str](each).values(), default=0) for each in (heights, bases, tops)]
    counted = [*(heights.count(k) for k in range(1, 5)), *(colors.count(k) for k in (1, 2, 3)), *alike, int(towers)]
    facts = _thermometer(np.array(counted), 3).ravel()
    return np.concatenate([facts, [heights.count(k) > 0 for k in (5, 6, 7)]])
