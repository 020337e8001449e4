"""Captions, questions and answers about a scene; the seeded samples of training and evaluation; how answers are scored.

Eighteen tasks. Counting, comparing, reading whole rows, words and numbers is hard for a small model and stays in the
mix.
Where one scene allows several questions of a task, answers that are rare are asked for as often as common ones, so that
always giving a task's commonest answer earns little.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from PIL import Image

from opsin.demo.drawn import draw
from opsin.demo.phrases import ALL_GROUPS, group_counts, listed, single, there_or_not, with_article
from opsin.demo.scene import (
    COLUMNS,
    ROWS,
    Cell,
    Scene,
    Split,
    draw_scene,
)

NOTHING = "nothing"
ORDINALS = ("first", "second", "third", "fourth", "fifth")
NEIGHBOURS: dict[str, Cell] = {
    "to the left of": (0, -1),
    "to the right of": (0, 1),
    "above": (-1, 0),
    "below": (1, 0),
}


ANSWER_SCAN = 500
"""Held-out scenes that are looked through to learn which answers a task has."""


class Question(NamedTuple):
    """One question about one picture."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture with what can be said and asked about it."""

    picture: Image.Image
    caption: str
    questions: tuple[Question, ...]
    scene: Scene


def sample(seed: int, index: int, split: Split, *, num_questions: int = 8) -> Sample:
    """Sample `index` of a split: a pure function of its arguments.

    Up to `num_questions` questions in random order, of as many tasks as the scene allows.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    scene = draw_scene(rng, split)
    return Sample(draw(scene), caption(scene, rng), ask(scene, rng, split, num_questions=num_questions), scene)


def text_sample(seed: int, index: int, split: Split, *, num_questions: int) -> Sample:
    """The same without painting: the picture is a single blank pixel. For work on the text alone."""
    rng = random.Random(f"{seed}/{split}/{index}")
    scene = draw_scene(rng, split)
    blank = Image.new("RGB", (1, 1))
    return Sample(blank, caption(scene, rng), ask(scene, rng, split, num_questions=num_questions), scene)


@dataclass(frozen=True, slots=True)
class HeldOutQuestion:
    """A question of the evaluation, with the number of its picture in the `heldout` split."""

    index: int
    question: Question


def heldout_questions(seed: int, *, per_task: int) -> list[HeldOutQuestion]:
    """`per_task` questions of every task from the first pictures of the `heldout` split (`balanced`)."""

    def asked(index: int) -> Sequence[Question]:
        return text_sample(seed, index, "heldout", num_questions=12).questions

    return [HeldOutQuestion(*each) for each in balanced(asked, TASKS, per_task=per_task)]


class Asked(Protocol):
    """A question of a task, with its answer."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def answer(self) -> str:
        """The right answer."""


AnyQuestion = TypeVar("AnyQuestion", bound=Asked)


def balanced(
    asked: Callable[[int], Sequence[AnyQuestion]], tasks: Iterable[str], *, per_task: int
) -> list[tuple[int, AnyQuestion]]:
    """`per_task` questions of every task with the numbers of their scenes, at most two of a task about each.

    The answers of a task are nearly even: none is taken more often than a tenth above its fair share, so that the
    baseline of always giving the commonest answer is what the number of answers makes it, not what scenes happen to
    show. That makes the questions harder: counts of four weigh as much as counts of one.
    asked: the questions about scene 0, 1, 2, ...
    """
    answers: dict[str, set[str]] = {task: set() for task in tasks}
    for index in range(ANSWER_SCAN):
        for question in asked(index):
            answers[question.task].add(question.answer)
    most = {task: math.ceil(1.1 * per_task / len(known)) for task, known in answers.items()}
    found: dict[str, list[tuple[int, AnyQuestion]]] = {task: [] for task in answers}
    taken: Counter[tuple[str, str]] = Counter()
    index = 0
    while any(len(questions) < per_task for questions in found.values()):
        here: Counter[str] = Counter()
        for question in asked(index):
            task, answer = question.task, question.answer
            if len(found[task]) < per_task and here[task] < 2 and taken[task, answer] < most[task]:
                found[task].append((index, question))
                here[task] += 1
                taken[task, answer] += 1
        index += 1
    return [item for questions in found.values() for item in questions]


def normalise(answer: str) -> str:
    """Lower case, one space between words, no article in front, no full stop behind."""
    words = answer.lower().strip().removesuffix(".").split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words)


def is_right(given: str, answer: str) -> bool:
    """Whether two answers are the same after `normalise`."""
    return normalise(given) == normalise(answer)


def caption(scene: Scene, rng: random.Random) -> str:
    """Full sentences that say everything the picture shows."""
    sentences = []
    if scene.bars:
        bars = listed([f"{bar.color} {bar.value}" for bar in scene.bars])
        opening = rng.choice(("A bar chart with", "This chart has", "The picture shows a chart with"))
        sentences.append(f"{opening} {len(scene.bars)} bars. From left to right: {bars}.")
    for writing in scene.writings:
        opening = rng.choice((f"The {writing.kind}", f"In {writing.color}, the {writing.kind}"))
        ink = "" if opening.startswith("In") else f" in {writing.color}"
        sentences.append(f"{opening} {writing.text} is written{ink} at the {ROWS[writing.row]}.")
    if scene.things:
        things = listed([f"{with_article(thing.name)} at the {_place(thing.cell)}" for thing in scene.things])
        count = len(scene.things)
        noun = "shape" if count == 1 else "shapes"
        sentences.append(rng.choice((f"There is {things}.", f"A picture of {things}.", f"{count} {noun}: {things}.")))
    return " ".join(sentences)


def ask(scene: Scene, rng: random.Random, split: Split, *, num_questions: int) -> tuple[Question, ...]:
    """Questions about a scene: one of every task it allows, then second ones of other targets, then shuffled."""
    questions: list[Question] = []
    seen: set[str] = set()
    for _ in range(3):
        round_ = []
        for task, (maker, phrasings) in TASKS.items():
            for target, answer in maker(scene, rng, split):
                text = rng.choice(phrasings).format(**target)
                if f"{task} {target}" not in seen:
                    seen.add(f"{task} {target}")
                    round_.append(Question(task, text, answer))
        rng.shuffle(round_)
        questions += round_
        if len(questions) >= num_questions:
            break
    questions = questions[:num_questions]
    rng.shuffle(questions)
    return tuple(questions)


def _place(cell: Cell) -> str:
    return f"{ROWS[cell[0]]} {COLUMNS[cell[1]]}"


# Each maker yields at most one (what fills the question's blanks, answer); nothing where a scene has no such question.
Found = Iterator[tuple[dict[str, str], str]]
Maker = Callable[[Scene, random.Random, Split], Found]


def _color(scene: Scene, rng: random.Random, split: Split) -> Found:
    if thing := single(scene.things, rng, lambda t: t.shape):
        yield {"shape": thing.shape}, thing.color


def _shape(scene: Scene, rng: random.Random, split: Split) -> Found:
    if thing := single(scene.things, rng, lambda t: t.color):
        yield {"color": thing.color}, thing.shape


def _count(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.kind != "objects":
        return
    groups = {**dict.fromkeys(ALL_GROUPS, 0), **group_counts(scene.things)}
    # First the number, then what has that number, if anything: most groups are of none or one.
    number = rng.choices(range(6), weights=(1, 2, 2, 3, 3, 3))[0]
    fitting = [group for group, count in groups.items() if count == number]
    if fitting:
        yield {"group": rng.choice(fitting)}, str(number)


def _total(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.kind == "objects":
        yield {}, str(len(scene.things))


def _position(scene: Scene, rng: random.Random, split: Split) -> Found:
    if thing := single(scene.things, rng, lambda t: t.name):
        yield {"name": thing.name}, _place(thing.cell)


def _at(scene: Scene, rng: random.Random, split: Split) -> Found:
    taken = {thing.cell: thing.name for thing in scene.things}
    writing_rows = {writing.row for writing in scene.writings}
    free = [(r, c) for r in range(3) for c in range(3) if (r, c) not in taken and r not in writing_rows]
    if not taken:
        return
    cell = rng.choice(free) if free and rng.random() < 0.08 else rng.choice(list(taken))
    yield {"place": _place(cell)}, taken.get(cell, NOTHING)


def _neighbour(scene: Scene, rng: random.Random, split: Split) -> Found:
    taken = {thing.cell: thing.name for thing in scene.things}
    names = Counter(taken.values())
    writing_rows = {writing.row for writing in scene.writings}
    full: list[tuple[dict[str, str], str]] = []
    empty: list[tuple[dict[str, str], str]] = []
    for (row, column), name in taken.items():
        if names[name] > 1:
            continue
        for side, (down, across) in NEIGHBOURS.items():
            cell = (row + down, column + across)
            if not (0 <= cell[0] < 3 and 0 <= cell[1] < 3) or cell[0] in writing_rows:
                continue
            (full if cell in taken else empty).append(({"side": side, "name": name}, taken.get(cell, NOTHING)))
    if full and not (empty and rng.random() < 0.08):
        yield rng.choice(full)
    elif full and empty:
        yield rng.choice(empty)


def _most(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.kind != "objects":
        return
    found = []
    for kind, names in (
        ("colour", [thing.color for thing in scene.things]),
        ("shape", [thing.shape for thing in scene.things]),
    ):
        ranking = Counter(names).most_common(2)
        if ranking[0][1] > 1 and (len(ranking) == 1 or ranking[0][1] > ranking[1][1]):
            found.append(({"kind": kind}, ranking[0][0]))
    if found:
        yield rng.choice(found)


def _more(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.kind != "objects":
        return
    groups = group_counts(scene.things)
    names = sorted(groups)
    answer = rng.choice(("more", "more", "more", "fewer", "fewer", "fewer", "as many", "as many"))
    pairs = [(a, b) for a in names for b in names if a != b and _compared(groups[a], groups[b]) == answer]
    # Two colours or two shapes; a colour against a shape would count things twice.
    pairs = [(a, b) for a, b in pairs if a.endswith(" shapes") == b.endswith(" shapes")]
    if pairs:
        first, second = rng.choice(pairs)
        yield {"first": first, "second": second}, answer


def _compared(first: int, second: int) -> str:
    return "as many" if first == second else "more" if first > second else "fewer"


def _exists(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.things and (found := there_or_not(scene.things, rng, split)):
        yield {"name": found[0]}, found[1]


def _row(scene: Scene, rng: random.Random, split: Split) -> Found:
    lengths = Counter(thing.cell[0] for thing in scene.things)
    if lengths:
        # A row of one thing is another way to ask what is at a place: mostly ask for longer ones.
        rows = sorted(row for row in lengths if lengths[row] > 1 or rng.random() < 0.15)
        if not rows:
            return
        row = rng.choice(rows)
        yield {"row": ROWS[row]}, ", ".join(thing.name for thing in scene.things if thing.cell[0] == row)


def _word(scene: Scene, rng: random.Random, split: Split) -> Found:
    for writing in scene.writings:
        if writing.kind == "word":
            yield {}, writing.text


def _number(scene: Scene, rng: random.Random, split: Split) -> Found:
    for writing in scene.writings:
        if writing.kind == "number":
            yield {}, writing.text


def _letter(scene: Scene, rng: random.Random, split: Split) -> Found:
    for writing in scene.writings:
        if writing.kind == "word":
            place = rng.randrange(len(writing.text))
            last = place == len(writing.text) - 1 and rng.random() < 0.5
            yield {"ordinal": "last" if last else ORDINALS[place]}, writing.text[place]


def _ink(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.writings:
        writing = rng.choice(scene.writings)
        yield {"kind": writing.kind}, writing.color


def _extreme(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.bars:
        ranking = sorted(scene.bars, key=lambda bar: bar.value)
        which = rng.choice(("tallest", "shortest"))
        yield {"which": which}, ranking[-1 if which == "tallest" else 0].color


def _height(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.bars:
        bar = rng.choice(scene.bars)
        yield {"color": bar.color}, str(bar.value)


def _bars(scene: Scene, rng: random.Random, split: Split) -> Found:
    if scene.bars:
        yield {}, str(len(scene.bars))


TASKS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "colour": (_color, ("What colour is the {shape}?", "What color is the {shape}?", "Which colour has the {shape}?")),
    "shape": (_shape, ("Which shape is {color}?", "What is the shape of the {color} one?", "What shape is {color}?")),
    "count": (_count, ("How many {group} are there?", "Count the {group}.", "What is the number of {group}?")),
    "total": (_total, ("How many shapes are there?", "Count all shapes.", "How many shapes are in the picture?")),
    "position": (_position, ("Where is the {name}?", "In which place is the {name}?", "Where do you see the {name}?")),
    "at": (_at, ("What is at the {place}?", "What do you see at the {place}?", "Which shape is at the {place}?")),
    "neighbour": (_neighbour, ("What is {side} the {name}?", "Which shape is {side} the {name}?")),
    "most": (_most, ("Which {kind} is most frequent?", "What is the most common {kind}?")),
    "more": (
        _more,
        (
            "Are there more, fewer or as many {first} as {second}?",
            "Compare {first} with {second}: more, fewer or as many?",
        ),
    ),
    "exists": (_exists, ("Is there {name}?", "Do you see {name}?", "Is {name} in the picture?")),
    "row": (
        _row,
        ("Which shapes are in the {row} row, from left to right?", "List the shapes in the {row} row from the left."),
    ),
    "word": (_word, ("What word is written?", "Read the word.", "Which word do you see?")),
    "number": (_number, ("What number is written?", "Read the number.", "Which number do you see?")),
    "letter": (_letter, ("What is the {ordinal} letter of the word?", "Which letter of the word is the {ordinal}?")),
    "ink": (
        _ink,
        ("What colour is the {kind}?", "In which colour is the {kind} written?", "What color is the {kind}?"),
    ),
    "extreme": (_extreme, ("Which bar is the {which}?", "What colour is the {which} bar?")),
    "height": (_height, ("How high is the {color} bar?", "What is the value of the {color} bar?")),
    "bars": (_bars, ("How many bars are there?", "Count the bars.", "How many bars does the chart have?")),
}
"""Each task's maker and the ways its question is put."""
