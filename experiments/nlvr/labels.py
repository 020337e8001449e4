"""What the tower is told of a drawn picture: facts of every patch, of every box, and of the whole picture.

All are yes or no. Counts are written as thermometers: at least one, at least two, ... Patches of a box tell what
stands in them and what their box holds; the grey gaps, which show nothing, tell what the whole picture holds, each of
their four rows another group of facts. A language model behind the tower then finds counts ready to be read.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from experiments.nlvr.model import COLUMNS, PATCH, ROWS
from experiments.nlvr.scenes import BOX_LEFTS, COLORS, MAX_HEIGHT, SHAPES, SIZES, Item, Scene
from numpy.typing import NDArray

Facts = NDArray[np.float32]
"""0 or 1."""
SIDES = ("left", "right", "top", "bottom")
KINDS: tuple[tuple[str, str], ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
SETS: tuple[Callable[[Item], bool], ...] = (
    lambda item: True,
    *[lambda item, c=color: item.color == c for color in COLORS],
    *[lambda item, s=shape: item.shape == s for shape in SHAPES],
    *[lambda item, k=kind: (item.color, item.shape) == k for kind in KINDS],
)
"""What is counted: everything, each colour, each shape, each kind."""
_SET_NUMBERS = {
    (color, shape): (0, 1 + c, 4 + s, 7 + KINDS.index((color, shape)))
    for c, color in enumerate(COLORS)
    for s, shape in enumerate(SHAPES)
}
_BOX_COLUMNS = tuple(range(left // PATCH, left // PATCH + 4) for left in BOX_LEFTS)
_GAP_COLUMNS = tuple(c for c in range(COLUMNS) if not any(c in columns for columns in _BOX_COLUMNS))
IN_BOX = np.array([[c not in _GAP_COLUMNS for c in range(COLUMNS)]] * ROWS).ravel()
"""(ROWS * COLUMNS,): which patches belong to a box."""


def patch_facts(scene: Scene) -> Facts:
    """(ROWS, COLUMNS, 25): kinds and sizes centred there, walls touched by these, kinds that cover a part of it."""
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
    return facts


def _counts(items: Iterable[Item]) -> list[int]:
    """How many items each of SETS has."""
    counts = [0] * len(SETS)
    for item in items:
        for number in _SET_NUMBERS[item.color, item.shape]:
            counts[number] += 1
    return counts


def _thermometer(counts: Iterable[int], most: int) -> list[int]:
    return [int(count >= least) for count in counts for least in range(1, most + 1)]


def box_facts(scene: Scene, box: Sequence[Item]) -> list[int]:
    """What one box holds."""
    touching = [item for item in box if item.walls]
    facts = _thermometer(_counts(box), 5)
    facts += [int(len(box) >= least) for least in (6, 7, 8)]
    facts += _thermometer(_counts(touching), 2)
    for holds in _PLACES[1:]:
        facts += _thermometer(_counts(item for item in box if holds(item)), 1)
    top = min(box, key=lambda item: item.y)
    facts += [int(top.color == color) for color in COLORS]
    is_tower = scene.kind == "towers"
    for level in range(MAX_HEIGHT):
        facts += [int(is_tower and len(box) > level and box[level].color == color) for color in COLORS]
    facts += _pair_facts([box], 1) if is_tower else [0] * 9
    return facts


_PLACES: tuple[Callable[[Item], bool], ...] = (
    lambda item: bool(item.walls),
    lambda item: "bottom" in item.walls,
    lambda item: "right" in item.walls,
    lambda item: item.in_corner,
)


def _pair_facts(boxes: Iterable[Sequence[Item]], most: int) -> list[int]:
    """For each colour upon each colour, how often a block lies so."""
    pairs = Counter((high.color, low.color) for box in boxes for low, high in itertools.pairwise(box))
    return _thermometer((pairs[high, low] for high in COLORS for low in COLORS), most)


def counted_facts(scene: Scene) -> list[int]:
    """First row of the gaps: how many there are of each set."""
    return _thermometer(_counts(scene.items), 6)


def place_facts(scene: Scene) -> list[int]:
    """Second row: how many of each set touch what."""
    items = scene.items
    facts = _thermometer(_counts(item for item in items if item.walls), 4)
    facts += _thermometer(_counts(item for item in items if not item.walls), 4)
    for holds in _PLACES[1:]:
        facts += _thermometer(_counts(item for item in items if holds(item)), 2)
    return facts


def tower_facts(scene: Scene) -> list[int]:
    """Third row: how many towers are how; all 0 where there are none."""
    boxes = scene.boxes if scene.kind == "towers" else ()
    facts = [int(scene.kind == "towers")]
    for color in COLORS:
        facts += _thermometer(
            (
                sum(box[-1].color == color for box in boxes),
                sum(box[0].color == color for box in boxes),
                sum(len(box) > 1 and box[1].color == color for box in boxes),
                sum({item.color for item in box} == {color} for box in boxes),
                *(sum(sum(i.color == color for i in box) >= k for box in boxes) for k in (1, 2, 3)),
                *(sum(len(box) == k and box[-1].color == color for box in boxes) for k in range(1, MAX_HEIGHT + 1)),
                *(sum(len(box) == k and box[0].color == color for box in boxes) for k in range(1, MAX_HEIGHT + 1)),
            ),
            3,
        )
    facts += _thermometer((sum(len(box) == k for box in boxes) for k in range(1, MAX_HEIGHT + 1)), 3)
    facts += _thermometer((sum(len({i.color for i in box}) == k for box in boxes) for k in (1, 2, 3)), 3)
    return facts + _pair_facts(boxes, 3)


def content_facts(scene: Scene) -> list[int]:
    """Fourth row: how many boxes hold what."""
    counts = [_counts(box) for box in scene.boxes]
    facts = _thermometer((sum(c[s] >= k for c in counts) for s in range(len(SETS)) for k in (1, 2, 3)), 3)
    facts += [int(any(c[0] == k for c in counts)) for k in range(1, 9)]
    seen = [frozenset(item.color for item in box) for box in scene.boxes]
    facts += _thermometer((sum(len(colors) == k for colors in seen) for k in (1, 2, 3)), 3)
    facts += _thermometer((sum(colors == {color} for colors in seen) for color in COLORS), 2)
    facts += _thermometer((sum(colors == set(COLORS) - {color} for colors in seen) for color in COLORS), 2)
    tops = Counter(min(box, key=lambda item: item.y).color for box in scene.boxes)
    return facts + _thermometer((tops[color] for color in COLORS), 3)


GROUPS = (counted_facts, place_facts, tower_facts, content_facts)
"""Facts of the whole picture, one function per row of the gaps."""
