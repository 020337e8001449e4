"""Dense exercises: many single facts of one scene in one answer, before anybody asks for yes or no.

`touching the edge` -> `blue items =2; circles =0; ...`. Names come in random order and nobody can foresee them, so they
are not taught: only what stands behind each `=` is. A sentence of NLVR gives one bit; such an answer gives dozens, each
of them a step that sentences need.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from experiments.nlvr.groups import (
    Property,
    box_property,
    group,
    number_of,
    pairs_of,
    place_color,
    touching,
    tower_height,
    tower_property,
)
from experiments.nlvr.scenes import COLORS, SHAPES, Item, Scene

EQUALS = " ="
"""What stands before everything that is taught."""
_PLACES = ("left", "middle", "right")
_LENGTH = 9
"""Most facts in one exercise."""


@dataclass(frozen=True)
class Exercise:
    """What is asked for, and facts: names, and what is found about each."""

    text: str
    facts: tuple[tuple[str, str], ...]

    @property
    def answer(self) -> str:
        """`blue items =2; circles =0`."""
        return "; ".join(f"{name}{EQUALS}{found}" for name, found in self.facts)


def exercises(scene: Scene, rng: random.Random, count: int) -> list[Exercise]:
    """So many exercises of different kinds."""
    makers = _TOWERS if scene.kind == "towers" else _SCATTERED
    return [maker(scene, rng) for maker in rng.sample(makers, min(count, len(makers)))]


def _exercise(text: str, facts: Sequence[tuple[str, str | int]], rng: random.Random) -> Exercise:
    """In any order; half of what is not there is left out."""
    kept = [(name, str(found)) for name, found in dict(facts).items() if found != 0 or rng.random() < 0.5]
    rng.shuffle(kept)
    return Exercise(text, tuple(kept[:_LENGTH]) or tuple((name, str(found)) for name, found in facts[:1]))


def _kinds(scene: Scene, items: Sequence[Item], rng: random.Random) -> Iterator[tuple[str, int]]:
    """How many there are of everything that has a name."""
    towers = scene.kind == "towers"
    general = "block" if towers and rng.random() < 0.7 else rng.choice(("item", "object"))
    for color in ("", *COLORS):
        for noun in (general,) if towers else (general, *SHAPES):
            count = sum(color in ("", item.color) and noun in (general, item.shape) for item in items)
            yield f"{color} {noun}s".strip(), min(9, count)


def _count(scene: Scene, rng: random.Random) -> Exercise:
    return _exercise("count", list(_kinds(scene, scene.items, rng)), rng)


def _touching(scene: Scene, rng: random.Random) -> Exercise:
    text, holds = touching(rng)
    return _exercise(text, list(_kinds(scene, [item for item in scene.items if holds(item)], rng)), rng)


def _one_box(scene: Scene, rng: random.Random) -> Exercise:
    """What is in the left, middle or right box."""
    number = rng.randrange(3)
    box = scene.boxes[number]
    facts: list[tuple[str, str | int]] = list(_kinds(scene, box, rng))
    facts.append(("on top", min(box, key=lambda item: item.y).color))
    facts.append(("colors", len({item.color for item in box})))
    if scene.kind == "towers":
        facts += [(name, box[index].color) for name, index in (("base", 0), ("top", -1))]
        facts += [("second block", box[1].color)] if len(box) > 1 else []
        facts += [("height", len(box))]
    return _exercise(f"{_PLACES[number]} box", facts, rng)


def _with(text: str, scene: Scene, draw: Callable[[], Property], rng: random.Random) -> Exercise:
    """How many boxes or towers have what."""
    facts: list[tuple[str, str | int]] = []
    for _ in range(2 * _LENGTH):
        name, holds = draw()
        facts.append((name, sum(map(holds, scene.boxes))))
    return _exercise(text, facts, rng)


def _boxes(scene: Scene, rng: random.Random) -> Exercise:
    return _with("boxes with", scene, lambda: box_property(scene, rng), rng)


def _towers(scene: Scene, rng: random.Random) -> Exercise:
    return _with("towers with", scene, lambda: tower_property(rng), rng)


def _ends(scene: Scene, rng: random.Random) -> Exercise:
    return _with("towers with", scene, lambda: place_color(rng), rng)


def _heights(scene: Scene, rng: random.Random) -> Exercise:
    def draw() -> Property:
        text, holds = tower_height(rng)
        return text, lambda box: holds(len(box))

    return _with("towers with", scene, draw, rng)


def _high_and(scene: Scene, rng: random.Random) -> Exercise:
    """Towers of one height by what else they have."""
    text, high = tower_height(rng)

    def draw() -> Property:
        also, holds = place_color(rng)
        return also, lambda box: high(len(box)) and holds(box)

    return _with(f"towers with {text} and", scene, draw, rng)


def _as_ends(scene: Scene, rng: random.Random) -> Exercise:
    """`blue blocks =1` as the top of a tower."""
    place, index = rng.choice((("base", 0), ("top", -1)))
    text, high = tower_height(rng)
    text, boxes = (
        (f" with {text}", [b for b in scene.boxes if high(len(b))]) if rng.random() < 0.6 else ("", scene.boxes)
    )
    ends = [box[index] for box in boxes]
    facts = [(f"{color} {rng.choice(('block', 'blocks'))}", number_of(tuple(ends), color)) for color in COLORS]
    return _exercise(f"as the {place} of a tower{text}", facts, rng)


def _upon(scene: Scene, rng: random.Random) -> Exercise:
    """`a blue block over a yellow block =2`."""
    pairs = [(high.color, low.color) for box in scene.boxes for low, high in pairs_of(box)]
    facts: list[tuple[str, str | int]] = []
    for high, low in itertools.product(COLORS, COLORS):
        over, under = rng.choice(("over", "above", "on", "on top of")), rng.choice(("below", "under"))
        count = pairs.count((high, low))
        if rng.random() < 0.75:
            facts.append((f"{high} block {over} a {low} block", count))
        else:
            facts.append((f"{low} block {under} a {high} block", count))
    return _exercise("count", facts, rng)


def _groups(scene: Scene, rng: random.Random) -> Exercise:
    """Whatever sentences count, in their own words."""
    asked = [group(scene, rng) for _ in range(_LENGTH)]
    facts = [(rng.choice((each.single, each.several))(), min(9, each.count)) for each in asked]
    return _exercise("how many", facts[: _LENGTH - 2], rng)


_SCATTERED = (_count, _count, _touching, _touching, _touching, _one_box, _one_box, _boxes, _boxes, _groups)
_TOWERS = (_count, _one_box, _one_box, _boxes, _towers, _ends, _heights, _high_and, _as_ends, _upon, _groups)
