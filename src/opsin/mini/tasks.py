"""What opsin-mini is asked about one or two pictures or a clip. `evaluation` scores its answers."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from opsin.demo.phrases import ALL_GROUPS, group_counts, listed, single, there_or_not, with_article
from opsin.demo.scene import COLUMNS, ROWS, Scene, Split, Thing
from opsin.mini.scenes import Clip
from opsin.text.grounding import Box

BOX_STEP = 20
"""Coordinates are taught in steps of this many thousandths of a side."""
LARGER = 1.33
"""How many times as large as another a thing must be to be called larger."""
CLEAR = 0.05
"""How far from the borders between thirds a thing must stand, as a share of the side, to be asked for its place."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question."""

    task: str
    text: str
    answer: str
    boxes: tuple[tuple[str, Box], ...] = ()
    """What is shown where, which is then said in place of the answer: names and boxes, in thousandths of the sides."""
    told: tuple[tuple[str, str], ...] = ()
    """The parts of a practised answer: what is asked about, and what is found about it."""

    @property
    def box(self) -> Box | None:
        """The box that is asked for, if one is."""
        return self.boxes[0][1] if self.boxes else None


@dataclass(frozen=True, slots=True)
class Sample:
    """What is shown, and what is asked about it."""

    pictures: tuple[Scene, ...] = ()
    clip: Clip | None = None
    questions: tuple[Question, ...] = field(default=())


Found = Iterator[tuple[Any, ...]]
"""What a wording is filled in with, the answer, and each name and box that is to be said in place of it."""
Maker = Callable[[Sample, random.Random, Split], Found]
Asked = tuple[Maker, tuple[str, ...], float]
"""A maker, the ways its question is put, and how often it is asked."""


def one_picture(shown: Sample) -> Scene | None:
    """The picture, where there is one of things."""
    return shown.pictures[0] if len(shown.pictures) == 1 and shown.pictures[0].kind == "objects" else None


def describe(scene: Scene) -> str:
    """One sentence that says everything the picture shows, from left to right or from top to bottom."""
    if scene.kind == "bars":
        return f"A chart of {listed([f'{bar.color} {bar.value}' for bar in scene.bars])}."
    if scene.kind == "text":
        return f"{listed([f'the {w.kind} {w.text} in {w.color}' for w in scene.writings])}."
    return f"{listed([with_article(thing.name) for thing in scene.things])}."


def _describe(shown: Sample, rng: random.Random, split: Split) -> Found:
    if len(shown.pictures) == 1:
        yield {}, describe(shown.pictures[0])


def _colour(shown: Sample, rng: random.Random, split: Split) -> Found:
    if (scene := one_picture(shown)) and (thing := single(scene.things, rng, lambda t: t.shape)):
        yield {"shape": thing.shape}, thing.color


def _shape(shown: Sample, rng: random.Random, split: Split) -> Found:
    if (scene := one_picture(shown)) and (thing := single(scene.things, rng, lambda t: t.color)):
        yield {"color": thing.color}, thing.shape


def _count(shown: Sample, rng: random.Random, split: Split) -> Found:
    if not (scene := one_picture(shown)):
        return
    if rng.random() < 0.25:
        yield {"group": "shapes"}, str(len(scene.things))
        return
    groups = group_counts(scene.things)
    number = rng.choices(range(6), weights=(2, 2, 3, 3, 3, 3))[0]
    fitting = [group for group in ALL_GROUPS if groups[group] == number]
    if fitting:
        yield {"group": rng.choice(fitting)}, str(number)


def _position(shown: Sample, rng: random.Random, split: Split) -> Found:
    if (scene := one_picture(shown)) and (thing := single(scene.things, rng, lambda t: t.name)):
        shares = (thing.x / scene.size[0], thing.y / scene.size[1])
        if all(abs(share - border) > CLEAR for share in shares for border in (1 / 3, 2 / 3)):
            yield {"name": thing.name}, f"{ROWS[thing.cell[0]]} {COLUMNS[thing.cell[1]]}"


def larger(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Comparison of two things by their size, which differs by a third at least."""
    if not (scene := one_picture(shown)):
        return
    single = named(scene)
    pairs = [(a, b) for a in single for b in single if a.size >= LARGER * b.size]
    if pairs:
        large, small = rng.choice(pairs)
        which = rng.choice(("larger", "smaller"))
        first, second = rng.sample((large.name, small.name), 2)
        answer = large.name if which == "larger" else small.name
        yield {"which": which, "first": first, "second": second}, answer


def _more(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Comparison of two numbers."""
    if not (scene := one_picture(shown)):
        return
    groups = group_counts(scene.things)
    wanted = rng.choice(("more", "fewer", "equal"))
    names = sorted(groups)
    pairs = [
        (a, b)
        for a in names
        for b in names
        if a != b
        and a.endswith(" shapes") == b.endswith(" shapes")
        and (groups[a] > groups[b]) == (wanted == "more")
        and (groups[a] < groups[b]) == (wanted == "fewer")
    ]
    if pairs:
        first, second = rng.choice(pairs)
        yield {"first": first, "second": second}, {"equal": "as many"}.get(wanted, wanted)


def side_of(a: Thing, b: Thing) -> str | None:
    """On which side of `b` the thing `a` stands; None where no side is plain."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(abs(dx) - abs(dy)) <= 12:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _relation(shown: Sample, rng: random.Random, split: Split) -> Found:
    """On which side of one thing another stands."""
    if not (scene := one_picture(shown)):
        return
    single = named(scene)
    found = [(a, b, side) for a in single for b in single if a is not b and (side := side_of(a, b))]
    if found:
        a, b, side = rng.choice(found)
        yield {"first": a.name, "second": b.name}, side


def named(scene: Scene) -> list[Thing]:
    """Things whose name no other has."""
    names = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if names[thing.name] == 1]


def _exists(shown: Sample, rng: random.Random, split: Split) -> Found:
    if (scene := one_picture(shown)) and (found := there_or_not(scene.things, rng, split)):
        yield {"name": found[0]}, found[1]


def _box(shown: Sample, rng: random.Random, split: Split) -> Found:
    if (scene := one_picture(shown)) and (thing := single(scene.things, rng, lambda t: t.name)):
        yield {"name": thing.name}, thing.name, (thing.name, box_of(thing, scene.size))


def box_of(thing: Thing, size: tuple[int, int]) -> Box:
    """The square that a thing is drawn in, in thousandths of the picture's sides, in steps of BOX_STEP."""
    half = thing.size / 2

    def steps(place: float, side: int) -> int:
        return min(1000, max(0, BOX_STEP * round(1000 / BOX_STEP * place / side)))

    (width, height), x, y = size, thing.x, thing.y
    left, right = steps(x - half, width), steps(x + half, width)
    return Box.of(left, steps(y - half, height), right, steps(y + half, height), space="per_1000")


def _written(kind: str) -> Maker:
    def maker(shown: Sample, rng: random.Random, split: Split) -> Found:
        if len(shown.pictures) == 1:
            for writing in shown.pictures[0].writings:
                if writing.kind == kind:
                    yield {}, writing.text

    return maker


def _ink(shown: Sample, rng: random.Random, split: Split) -> Found:
    if len(shown.pictures) == 1 and (writings := shown.pictures[0].writings):
        writing = rng.choice(writings)
        yield {"kind": writing.kind}, writing.color


def _extreme(shown: Sample, rng: random.Random, split: Split) -> Found:
    if len(shown.pictures) == 1 and (bars := shown.pictures[0].bars):
        ranking = sorted(bars, key=lambda bar: bar.value)
        which = rng.choice(("tallest", "shortest"))
        yield {"which": which}, ranking[-1 if which == "tallest" else 0].color


def _value(shown: Sample, rng: random.Random, split: Split) -> Found:
    if len(shown.pictures) == 1 and (bars := shown.pictures[0].bars):
        bar = rng.choice(bars)
        yield {"color": bar.color}, str(bar.value)


def _which(shown: Sample, rng: random.Random, split: Split) -> Found:
    if len(shown.pictures) == 2:
        first, second = ({thing.name for thing in scene.things} for scene in shown.pictures)
        number = rng.choice((0, 1))
        only = sorted((first - second, second - first)[number])
        if only:
            yield {"name": with_article(rng.choice(only))}, ("first", "second")[number]


def _difference(shown: Sample, rng: random.Random, split: Split) -> Found:
    """What only one of the two pictures shows, where that is one thing."""
    if len(shown.pictures) == 2:
        names = [[thing.name for thing in scene.things] for scene in shown.pictures]
        for number, (own, other) in enumerate((names, names[::-1])):
            only = [name for name in own if name not in other]
            if len(only) == 1:
                yield {"which": ("first", "second")[number]}, only[0]


def _direction(shown: Sample, rng: random.Random, split: Split) -> Found:
    if shown.clip:
        yield {"name": shown.clip.mover}, shown.clip.direction


def _moving(shown: Sample, rng: random.Random, split: Split) -> Found:
    if shown.clip and len(shown.clip.frames[0].things) > 1:
        yield {}, shown.clip.mover


TASKS: dict[str, Asked] = {
    "describe": (
        _describe,
        ("Describe the picture.", "What do you see?", "What is in the picture?", "Describe this image."),
        0.1,
    ),
    "colour": (
        _colour,
        ("What colour is the {shape}?", "What color is the {shape}?", "Which colour has the {shape}?"),
        2.0,
    ),
    "shape": (
        _shape,
        ("Which shape is {color}?", "What is the shape of the {color} one?", "What shape is {color}?"),
        0.6,
    ),
    "count": (_count, ("How many {group} are there?", "Count the {group}.", "How many {group} do you see?"), 2.0),
    "position": (
        _position,
        ("Where is the {name}?", "In which place is the {name}?", "Where do you see the {name}?"),
        2.0,
    ),
    "larger": (larger, ("Which is {which}, the {first} or the {second}?",), 1.5),
    "more": (
        _more,
        (
            "Are there more, fewer or as many {first} as {second}?",
            "Compare {first} with {second}: more, fewer or as many?",
        ),
        2.0,
    ),
    "relation": (
        _relation,
        (
            "Is the {first} left of, right of, above or below the {second}?",
            "On which side of the {second} is the {first}?",
        ),
        2.0,
    ),
    "exists": (_exists, ("Is there {name}?", "Do you see {name}?", "Is {name} in the picture?"), 1.5),
    "box": (_box, ("Find the {name}.", "Give the box of the {name}.", "Draw a box around the {name}."), 0.5),
    "word": (_written("word"), ("What word is written?", "Read the word.", "Which word do you see?"), 1.0),
    "number": (_written("number"), ("What number is written?", "Read the number.", "Which number do you see?"), 1.0),
    "ink": (
        _ink,
        ("What colour is the {kind}?", "In which colour is the {kind} written?", "What color is the {kind}?"),
        0.3,
    ),
    "tallest": (_extreme, ("Which bar is the {which}?", "What colour is the {which} bar?"), 0.7),
    "value": (_value, ("How high is the {color} bar?", "What is the value of the {color} bar?"), 0.25),
    "which": (
        _which,
        ("Which picture shows {name}, the first or the second?", "In which of the two pictures is {name}?"),
        4.0,
    ),
    "difference": (
        _difference,
        ("What is only in the {which} picture?", "What does only the {which} picture show?"),
        2.0,
    ),
    "direction": (
        _direction,
        ("In which direction does the {name} move?", "Does the {name} move left, right, up or down?"),
        1.0,
    ),
    "moving": (_moving, ("What moves?", "Which shape is moving?"), 1.0),
}
"""Long answers, which teach many tokens at once, and what is learnt early are asked for less."""
