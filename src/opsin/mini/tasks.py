"""What opsin-mini is asked. `evaluation` scores its answers.

A sample is one or two pictures, or a clip, with questions of several tasks and their answers, all from a seed.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from opsin.demo.phrases import ALL_GROUPS, group_counts, listed, single, there_or_not, with_article
from opsin.demo.scene import COLORS, COLUMNS, ROWS, SHAPES, Scene, Split, Thing
from opsin.mini.scenes import Clip, chart, clip, objects, reading, two_pictures
from opsin.text.grounding import Box

BOX_STEP = 20
"""Coordinates are taught in steps of this many thousandths of a side."""
NUM_PARTS = 4
"""Of an exercise's answer, at most."""
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


SHARES = (0.42, 0.22, 0.09, 0.14, 0.13)
"""How often a sample is a picture of things, of writing, or of bars, two pictures, or a clip."""


def sample(
    seed: int, index: int, split: Split, *, num_questions: int = 8, shares: tuple[float, ...] = SHARES
) -> Sample:
    """Sample `index` of a split: a pure function of its arguments."""
    rng = random.Random(f"mini/{seed}/{split}/{index}")
    while True:
        shown = _show(rng, split, shares)
        if questions := ask(shown, rng, split, num_questions=num_questions):
            return replace(shown, questions=questions)


def _show(rng: random.Random, split: Split, shares: tuple[float, ...]) -> Sample:
    things, writing, bars, two, _ = accumulate(shares)
    dice = rng.random()
    if dice < things:
        return Sample(pictures=(objects(rng, split),))
    if dice < writing:
        return Sample(pictures=(reading(rng, split),))
    if dice < bars:
        return Sample(pictures=(chart(rng, split),))
    if dice < two:
        return Sample(pictures=two_pictures(rng, split))
    return Sample(clip=clip(rng, split))


def ask(shown: Sample, rng: random.Random, split: Split, *, num_questions: int) -> tuple[Question, ...]:
    """Questions of as many tasks as the sample allows; of those with a larger weight more often, up to four of each."""
    found: list[tuple[float, Question]] = []
    seen: set[str] = set()
    tasks = {**TASKS, **EXERCISES} if split == "train" else TASKS
    for round_ in range(4):
        for task, (maker, phrasings, weight) in tasks.items():
            for target, answer, *boxes in maker(shown, rng, split):
                text = rng.choice(phrasings).format(**target)
                # Drawn without replacement, in proportion to the weights (Efraimidis and Spirakis, 2006).
                rank = rng.random() ** (1 / weight) / (1 + round_)
                if (key := f"{task} {target}") not in seen:
                    seen.add(key)
                    found.append((rank, Question(task, text, answer, tuple(boxes))))
    best = sorted(found, key=lambda each: -each[0])[:num_questions]
    questions = [question for _, question in best]
    rng.shuffle(questions)
    # Long answers tell what others ask for, which can then be read in the text; so every other time they come last.
    if rng.random() < 0.5:
        questions.sort(key=lambda question: question.task in TELLING)
    return tuple(questions)


Found = Iterator[tuple[Any, ...]]
"""What a wording is filled in with, the answer, and each name and box that is to be said in place of it."""
Maker = Callable[[Sample, random.Random, Split], Found]


def _one(shown: Sample) -> Scene | None:
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
    if (scene := _one(shown)) and (thing := single(scene.things, rng, lambda t: t.shape)):
        yield {"shape": thing.shape}, thing.color


def _shape(shown: Sample, rng: random.Random, split: Split) -> Found:
    if (scene := _one(shown)) and (thing := single(scene.things, rng, lambda t: t.color)):
        yield {"color": thing.color}, thing.shape


def _count(shown: Sample, rng: random.Random, split: Split) -> Found:
    if not (scene := _one(shown)):
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
    if (scene := _one(shown)) and (thing := single(scene.things, rng, lambda t: t.name)):
        shares = (thing.x / scene.size[0], thing.y / scene.size[1])
        if all(abs(share - border) > CLEAR for share in shares for border in (1 / 3, 2 / 3)):
            yield {"name": thing.name}, f"{ROWS[thing.cell[0]]} {COLUMNS[thing.cell[1]]}"


def _larger(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Comparison of two things by their size, which differs by a third at least."""
    if not (scene := _one(shown)):
        return
    single = _named(scene)
    pairs = [(a, b) for a in single for b in single if a.size >= LARGER * b.size]
    if pairs:
        large, small = rng.choice(pairs)
        which = rng.choice(("larger", "smaller"))
        first, second = rng.sample((large.name, small.name), 2)
        answer = large.name if which == "larger" else small.name
        yield {"which": which, "first": first, "second": second}, answer


def _more(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Comparison of two numbers."""
    if not (scene := _one(shown)):
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
    if not (scene := _one(shown)):
        return
    single = _named(scene)
    found = [(a, b, side) for a in single for b in single if a is not b and (side := side_of(a, b))]
    if found:
        a, b, side = rng.choice(found)
        yield {"first": a.name, "second": b.name}, side


def _named(scene: Scene) -> list[Thing]:
    """Things whose name no other has."""
    names = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if names[thing.name] == 1]


def _exists(shown: Sample, rng: random.Random, split: Split) -> Found:
    if (scene := _one(shown)) and (found := there_or_not(scene.things, rng, split)):
        yield {"name": found[0]}, found[1]


def _box(shown: Sample, rng: random.Random, split: Split) -> Found:
    if (scene := _one(shown)) and (thing := single(scene.things, rng, lambda t: t.name)):
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


TASKS: dict[str, tuple[Maker, tuple[str, ...], float]] = {
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
    "larger": (_larger, ("Which is {which}, the {first} or the {second}?",), 1.5),
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
"""Each task's maker, the ways its question is put, and how often it is asked: long answers, which teach many tokens at
once, and what is learnt early are asked for less."""


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
    if scene := _one(shown):
        names = [f"{thing.name} {ROWS[thing.cell[0]]} {COLUMNS[thing.cell[1]]}" for thing in scene.things]
        yield {}, _some(names, rng)


def _boxes(shown: Sample, rng: random.Random, split: Split) -> Found:
    """The boxes of one or two things."""
    if (scene := _one(shown)) and (things := _named(scene)):
        chosen = rng.sample(things, min(2, len(things)))
        yield {}, "", *((thing.name, box_of(thing, scene.size)) for thing in chosen)


def _relations(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Of each other thing, on which side of it one stands."""
    if (scene := _one(shown)) and len(things := _named(scene)) > 1:
        rng.shuffle(things)
        first, *others = things
        sides = [f"{other.name} {side}" for other in others if (side := side_of(first, other))]
        if sides:
            yield {"first": first.name}, _some(sides, rng)


def _sizes(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Of each other thing, whether it is larger or smaller than one."""
    if (scene := _one(shown)) and len(things := _named(scene)) > 1:
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
    if scene := _one(shown):
        counts = Counter(name for thing in scene.things for name in (thing.color, thing.shape))
        counts[rng.choice([name for name in (*COLORS, *SHAPES) if name not in counts])] = 0
        yield {}, _some([f"{name} {number}" for name, number in counts.items()], rng)


EXERCISES: dict[str, tuple[Maker, tuple[str, ...], float]] = {
    "colours": (_colours, ("Describe the shapes.",), 1.5),
    "places": (_places, ("Where do you see the shapes?",), 1.5),
    "boxes": (_boxes, ("Find the shapes.",), 0.3),
    "relations": (_relations, ("On which side of the shapes is the {first}?",), 1.0),
    "sizes": (_sizes, ("Compare the shapes with the {first}.",), 0.7),
    "counts": (_counts, ("Count everything.",), 0.7),
}
"""What training asks besides, and evaluation does not: each answer finds several things by what comes first in it.
Without the first two a fifth of the fine-tuning taught to find things by their colour (`shape` 90 %), and not by their
shape or name (`colour` 45 %, `position` 15 %)."""
TELLING = {"describe", *EXERCISES}
"""Whose answers say much."""
