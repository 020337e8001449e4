"""Sentences about a scene, and whether they are true: what NLVR's writers say, from templates.

A sentence is a quantifier over a group of `groups`. Groups know their count, so that truth is arithmetic. What a number
of a generator makes of a scene depends on the scene's kind only; so the same sentence can be said of any scene, and is
said as often where it is true as where it is false. (Without that, words alone tell much about the answer: `exactly` is
mostly false, `at least one` mostly true; a model then learns to read words and not to look.)
"""

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache

from experiments.nlvr.groups import WORDS, Group, article, group, number, number_of, place_color, tower_property
from experiments.nlvr.scenes import COLORS, MAX_HEIGHT, Scene, draw_scene

BANK = 12_000
"""Numbers of sentences to draw from, for each kind of scene."""
_TRIALS = 40
"""Scenes on which it is tried how often a sentence is true."""
_CLEAR = 0.1
"""Sentences that are true, or false, of fewer scenes than this share are not said."""


@dataclass(frozen=True)
class Sentence:
    """A statement with `yes` or `no`, or a question with a number."""

    text: str
    answer: str


def sentences(
    scene: Scene, rng: random.Random, count: int, *, questions: float = 0.3, slips: float = 0.02
) -> list[Sentence]:
    """So many different sentences, half of the statements true.

    questions: share of `how many`. slips: share with two letters swapped.
    """
    found: dict[str, Sentence] = {}
    while len(found) < count:
        if rng.random() < questions:
            asked = group(scene, rng)
            text = f"how many {asked.several()} are there"
            found.setdefault(text, Sentence(text, str(min(9, asked.count))))
            continue
        number, share = rng.choice(_bank(scene.kind))
        text, is_true = statement(scene, number)
        # What remains is true half of the time, whatever the sentence.
        if rng.random() < ((1 - share) / share if is_true else share / (1 - share)):
            found.setdefault(text, Sentence(_worn(text, rng, slips), "yes" if is_true else "no"))
    chosen = list(found.values())
    rng.shuffle(chosen)
    return chosen


def statement(scene: Scene, number: int) -> tuple[str, bool]:
    """Statement `number` about scenes of this kind, and whether it is true of this one."""
    rng = random.Random(number)
    if rng.random() < 0.06:
        return rng.choice(SPECIAL)(scene, rng)
    return _quantified(group(scene, rng), rng)


@cache
def _bank(kind: str) -> list[tuple[int, float]]:
    """Numbers of statements, and of what share of scenes of a kind they are true."""
    drawn = (draw_scene(random.Random(f"bank/{index}")) for index in range(10 * _TRIALS))
    scenes = [scene for scene in drawn if scene.kind == kind][:_TRIALS]
    shares = (sum(statement(scene, number)[1] for scene in scenes) / len(scenes) for number in range(BANK))
    return [(number, share) for number, share in enumerate(shares) if _CLEAR <= share <= 1 - _CLEAR]


# --- quantifiers


def _quantified(counted: Group, rng: random.Random) -> tuple[str, bool]:
    """A statement about how many there are."""
    n, chance = counted.count, rng.random()
    if counted.verbs is not None and chance < 0.2:
        return _predicated(counted, rng)
    if chance < 0.5:
        word, is_true = rng.choice(
            (
                *[(article(counted.one), n >= 1)] * 5,
                *[(word, n >= 1) for word in ("at least one", "at least 1", "atleast one", "at least a")],
                *[(word, n == 1) for word in ("exactly one", "exactly one", "only one", "one", "1", "1", "only 1")],
                *[("no", n == 0)] * 2,
            )
        )
        return f"there is {word} {counted.single()}", is_true
    k = rng.choice((2, 2, 2, 2, 3, 3, 3, 4, 4, 5))
    word = number(k, rng)
    form, is_true = rng.choice(
        (
            *[("there are {}", n == k)] * 4,
            *[("there are exactly {}", n == k)] * 2,
            ("there are only {}", n == k),
            *[("there are at least {}", n >= k)] * 2,
            ("there are atleast {}", n >= k),
            ("there are more than {}", n > k),
            ("there are at most {}", n <= k),
        )
    )
    return form.format(f"{word} {counted.several()}"), is_true


def _predicated(counted: Group, rng: random.Random) -> tuple[str, bool]:
    """`all black circles are touching the edge`, `two of the towers has a blue base`."""
    assert counted.verbs is not None
    n, total = counted.count, counted.total
    one, many = counted.verbs
    k = rng.choice((2, 2, 3))
    forms = [
        (f"all {counted.many} {many}", total > 0 and n == total),
        (f"at least one {counted.one} {one}", n >= 1),
        (f"one {counted.one} {one}", n == 1),
        (f"{number(k, rng)} {counted.many} {many}", n == k),
        (f"none of the {counted.many} {many}", n == 0),
        (f"one of the {counted.one} {one}", n >= 1),
        (f"there is {article(counted.one)} {counted.one} that {one}", n >= 1),
    ]
    if counted.one in ("tower", "box", "grey box", "grey square"):
        forms += [(f"each {counted.one} {one}", n == total)] * 2
        forms += [(f"all 3 {counted.many} {many}", n == total)]
        forms += [(f"{rng.choice(('two', 'at least two'))} of the {counted.many} {rng.choice((one, many))}", n >= 2)]
    return rng.choice(forms)


# --- what no quantifier says


def _same_box(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    color = rng.choice(list(COLORS))
    boxes = sum(number_of(box, color) > 0 for box in scene.boxes)
    return f"all {color} {rng.choice(('items', 'objects'))} are in the same box", boxes == 1


def _same_number(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    most = max(Counter(map(len, scene.boxes)).values())
    if scene.kind == "towers":
        text = rng.choice(("with the same height", "that are the same in height"))
        return f"there are {rng.choice(('', 'at least '))}two towers {text}", most >= 2
    return "there are two boxes that has the same number of objects", most >= 2


def _same_color(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    if scene.kind == "scattered":
        touching = {item.color for item in scene.items if item.walls}
        return rng.choice(
            (
                ("all 3 different colors are touching the wall", len(touching) == 3),
                ("there is only one color touching the wall", len(touching) == 1),
            )
        )
    place, index = rng.choice((("base", 0), ("top", -1)))
    most = max(Counter(box[index].color for box in scene.boxes).values())
    if rng.random() < 0.5:
        return f"the {place} of the three towers are not the same", most < 3
    return f"there are two towers that has the same {place} color", most >= 2


def _the_tower(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """`the tower with four blocks has ...`."""
    if scene.kind == "scattered":
        return _same_color(scene, rng)
    k = rng.randint(1, MAX_HEIGHT)
    text, holds = place_color(rng) if rng.random() < 0.7 else tower_property(rng)
    noun = "block" if k == 1 else "blocks"
    return f"the tower with {WORDS[k]} {noun} has {text}", any(len(box) == k and holds(box) for box in scene.boxes)


def _the_place(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """`the base of a tower is blue`."""
    if scene.kind == "scattered":
        return _same_box(scene, rng)
    (place, index), color, k = rng.choice((("base", 0), ("top", -1))), rng.choice(list(COLORS)), rng.randint(1, 4)
    named, tower = list(scene.boxes), rng.choice(("a tower", "the tower"))
    if rng.random() < 0.6:
        named, tower = [box for box in named if len(box) == k], f"{rng.choice(('a', 'the'))} {WORDS[k]} blocks tower"
    return f"the {place} of {tower} is {color}", any(box[index].color == color for box in named)


SPECIAL = (_same_box, _same_number, _same_color, _the_tower, _the_tower, _the_place)


# --- how people write


def _worn(text: str, rng: random.Random, slips: float) -> str:
    """As it stands in the data set: first letters that got lost, now and then a slip of the pen."""
    text = " ".join(text.split())
    if text.startswith(("all ", "at least ")) and rng.random() < 0.4:
        text = text[1:]
    if rng.random() < slips:
        words = text.split(" ")
        place = rng.randrange(len(words))
        word = words[place]
        if len(word) > 3:
            at = rng.randrange(1, len(word) - 1)
            words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        text = " ".join(words)
    return text
