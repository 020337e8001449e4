"""What the last stage asks besides the tasks: one thing about each of several names, with only that taught."""

import random
from collections import Counter
from collections.abc import Callable

from opsin.demo.scene import COLORS, COLUMNS, ROWS, SHAPES, Split, Thing
from opsin.mini.exercises import boxes
from opsin.mini.tasks import LARGER, TASKS, Asked, Found, Maker, Sample, box_of, larger, named, one_picture, side_of

TWO, STILL = "two", "place"
"""What is said of a thing that both pictures show, and of one that does not move: the vocabulary is made before this
stage, of the words of tasks and exercises."""
APART = 6
"""How many pixels two things must differ in x or y to be told apart by it."""


def _colours(shown: Sample, rng: random.Random, split: Split) -> Found:
    """The colour of each shape that is there once. Names say the colour first, which teaches to find things by it."""
    scenes = shown.clip.frames[:1] if shown.clip else shown.pictures
    things = [thing for scene in scenes for thing in scene.things]
    counts = Counter(thing.shape for thing in things)
    yield from _parts([(thing.shape, thing.color) for thing in things if counts[thing.shape] == 1], least=2)


def _parts(parts: list[tuple[str, str]], *, least: int = 1, **target: str) -> Found:
    if len(parts) >= least:
        yield target, parts


def _each(say: Callable[[Thing, tuple[int, int]], str]) -> Maker:
    """What is to be said of each thing in a picture of that size."""

    def maker(shown: Sample, rng: random.Random, split: Split) -> Found:
        if scene := one_picture(shown):
            yield from _parts([(thing.name, say(thing, scene.size)) for thing in named(scene)])

    return maker


def _beside(say: Callable[[Thing, Thing], str | None]) -> Maker:
    """What is to be said of each thing beside one of them; None where nothing is."""

    def maker(shown: Sample, rng: random.Random, split: Split) -> Found:
        if (scene := one_picture(shown)) and (things := named(scene)):
            one = rng.choice(things)
            said = [(other.name, say(other, one)) for other in things if other is not one]
            yield from _parts([(name, each) for name, each in said if each], first=one.name)

    return maker


def _apart(distance: float, names: tuple[str, str]) -> str | None:
    """The second name for what is further right or down, the first for what is further left or up; None if neither."""
    return None if abs(distance) <= APART else names[distance > 0]


def _size_beside(thing: Thing, one: Thing) -> str | None:
    if max(thing.size, one.size) < LARGER * min(thing.size, one.size):
        return None
    return "larger" if thing.size > one.size else "smaller"


def _compared(shown: Sample, rng: random.Random, split: Split) -> Found:
    """How large one thing is beside another: what the task asks of the two in a word, without the choice of a name."""
    for target, _ in larger(shown, rng, split):
        scene = one_picture(shown)
        assert scene is not None
        by_name = {thing.name: thing for thing in named(scene)}
        said = _size_beside(by_name[target["first"]], by_name[target["second"]])
        assert said is not None
        yield target, said


def _edges(shown: Sample, rng: random.Random, split: Split) -> Found:
    """One of the four numbers of each thing's box."""
    if scene := one_picture(shown):
        side = rng.randrange(4)
        parts = [(thing.name, f"{box_of(thing, scene.size).sides[side]:.0f}") for thing in named(scene)]
        yield from _parts(parts, side=("left", "top", "right", "bottom")[side])


def _counts(shown: Sample, rng: random.Random, split: Split) -> Found:
    """How many there are of each colour and shape, and of one that is not there."""
    if scene := one_picture(shown):
        counts = Counter(name for thing in scene.things for name in (thing.color, thing.shape))
        counts[rng.choice([name for name in (*COLORS, *SHAPES) if name not in counts])] = 0
        parts = [(name, str(number)) for name, number in counts.items()]
        yield {}, rng.sample(parts, min(6, len(parts)))


def _pictures(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Which of two pictures shows each thing."""
    if len(shown.pictures) == 2:
        first, second = ({thing.name for thing in scene.things} for scene in shown.pictures)
        where = {
            name: TWO if name in first & second else "first" if name in first else "second"
            for name in sorted(first | second)
        }
        yield {}, list(where.items())


def _moves(shown: Sample, rng: random.Random, split: Split) -> Found:
    """Where each thing of a clip moves."""
    if clip := shown.clip:
        names = [thing.name for thing in clip.frames[0].things]
        yield {}, [(name, clip.direction if name == clip.mover else STILL) for name in names]


PRACTICE: dict[str, Asked] = {
    "colours": (_colours, ("Describe the shapes.",), 3.0),
    "rows": (_each(lambda thing, _: ROWS[thing.cell[0]]), ("How high are the shapes?",), 2.0),
    "columns": (_each(lambda thing, _: COLUMNS[thing.cell[1]]), ("How far right are the shapes?",), 3.0),
    "places": (
        _each(lambda thing, _: f"{ROWS[thing.cell[0]]} {COLUMNS[thing.cell[1]]}"),
        ("Where do you see the shapes?",),
        1.5,
    ),
    "edges": (_edges, ("Where is the {side} of the shapes?",), 2.5),
    "outlines": (boxes, ("Find the shapes.",), 2.5),
    "across": (
        _beside(lambda thing, one: _apart(thing.x - one.x, ("left", "right"))),
        ("Which shapes are left and right of the {first}?",),
        1.5,
    ),
    "down": (
        _beside(lambda thing, one: _apart(thing.y - one.y, ("above", "below"))),
        ("Which shapes are above and below the {first}?",),
        1.0,
    ),
    "relations": (
        _beside(lambda thing, one: side_of(thing, one)),
        ("On which side of the {first} are the shapes?",),
        1.5,
    ),
    "widths": (_each(lambda thing, _: str(thing.size)), ("How large are the shapes?",), 1.5),
    "sizes": (_beside(_size_beside), ("Compare the shapes with the {first}.",), 4.0),
    "compared": (_compared, ("Compare the {first} with the {second}.",), 3.0),
    "larger of two": (*TASKS["larger"][:2], 3.0),
    "counts": (_counts, ("Count everything.",), 1.5),
    "pictures": (_pictures, ("Which picture shows the shapes?",), 4.0),
    "moves": (_moves, ("Where do the shapes move?",), 3.0),
}
"""They say in a few words what a whole question says, and each says one thing alone. Asked only for a place of two
words, whose second is to be found once the first is said, the language model never learnt columns (37 % of them right
after 2,200 steps, where heights were 91 %). Names that nobody can foresee are not taught (`talk.encoded`): after 200
steps from the same start 71 % of columns were right without them, 43 % with them."""
