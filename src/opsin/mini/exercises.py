"""What training asks besides the tasks: several things in one answer, each found by what comes first in it."""

import random
from collections import Counter

from opsin.demo.phrases import listed
from opsin.demo.scene import COLORS, COLUMNS, ROWS, SHAPES, Split
from opsin.mini.tasks import LARGER, Asked, Found, Sample, box_of, named, one_picture, side_of

NUM_PARTS = 4
"""Of an exercise's answer, at most."""


def _colours(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Each thing's shape, then its colour. Names say the colour first, which teaches to find things by it alone.

    In any order, so that the shape alone tells which thing is meant; things that share theirs are left out.
    """
    scenes = shown.clip.frames[:1] if shown.clip else shown.pictures
    things = [thing for scene in scenes for thing in scene.things]
    counts = Counter(thing.shape for thing in things)
    names = [f"{thing.shape} {thing.color}" for thing in things if counts[thing.shape] == 1]
    if len(names) > 1:
        yield {}, _some(names, rng)


def _some(parts: list[str], rng: random.Random) -> str:
    """A few of the parts in any order; more would outweigh all short answers."""
    return f"{listed(rng.sample(parts, min(NUM_PARTS, len(parts))))}."


def _places(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Each thing's name, then its place."""
    if scene := one_picture(shown):
        names = [f"{thing.name} {ROWS[thing.cell[0]]} {COLUMNS[thing.cell[1]]}" for thing in scene.things]
        yield {}, _some(names, rng)


def boxes(shown: Sample, rng: random.Random, split: Split) -> Found:
    """The boxes of one or two things."""
    if (scene := one_picture(shown)) and (things := named(scene)):
        chosen = rng.sample(things, min(2, len(things)))
        yield {}, "", *((thing.name, box_of(thing, scene.size)) for thing in chosen)


def _relations(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Of each other thing, on which side of it one stands."""
    if (scene := one_picture(shown)) and len(things := named(scene)) > 1:
        rng.shuffle(things)
        first, *others = things
        sides = [f"{other.name} {side}" for other in others if (side := side_of(first, other))]
        if sides:
            yield {"first": first.name}, _some(sides, rng)


def _sizes(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Of each other thing, whether it is larger or smaller than one."""
    if (scene := one_picture(shown)) and len(things := named(scene)) > 1:
        rng.shuffle(things)
        first, *others = things
        sizes = [
            f"{other.name} {'larger' if other.size > first.size else 'smaller'}"
            for other in others
            if max(other.size, first.size) >= LARGER * min(other.size, first.size)
        ]
        if sizes:
            yield {"first": first.name}, _some(sizes, rng)


def _counts(shown: Sample, rng: random.Random, split: Split) -> Found:
    """How many there are of some colours and shapes that are there, and of one that is not."""
    if scene := one_picture(shown):
        counts = Counter(name for thing in scene.things for name in (thing.color, thing.shape))
        counts[rng.choice([name for name in (*COLORS, *SHAPES) if name not in counts])] = 0
        yield {}, _some([f"{name} {number}" for name, number in counts.items()], rng)


EXERCISES: dict[str, Asked] = {
    "colours": (_colours, ("Describe the shapes.",), 1.5),
    "places": (_places, ("Where do you see the shapes?",), 1.5),
    "boxes": (boxes, ("Find the shapes.",), 0.3),
    "relations": (_relations, ("On which side of the shapes is the {first}?",), 1.0),
    "sizes": (_sizes, ("Compare the shapes with the {first}.",), 0.7),
    "counts": (_counts, ("Count everything.",), 0.7),
}
"""What training asks besides, and evaluation does not: each answer finds several things by what comes first in it.
Without the first two a fifth of the fine-tuning taught to find things by their colour (`shape` 90 %), and not by their
shape or name (`colour` 45 %, `position` 15 %)."""
