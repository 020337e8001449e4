"""What sentences count: things by colour, shape and place; towers and boxes by what is in them. In words, and counted.

Wording follows sentences of the training split (the data set's `dev`).
"""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from experiments.nlvr.scenes import COLORS, MAX_HEIGHT, SHAPES, SIZES, Item, Scene

WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
Box = tuple[Item, ...]
Property = tuple[str, Callable[[Box], bool]]
"""What a tower or box has, and whether one does."""


@dataclass(frozen=True)
class Group:
    """What a sentence counts: `yellow circles` + `touching the wall`, `towers` + `with a blue block at the top`."""

    one: str
    many: str
    tail: str
    count: int
    total: int
    """Of these, how many there are without the tail."""
    verbs: tuple[str, str] | None = None
    """The tail as a predicate, of one and of many: `is touching the wall`, `has a blue block at the top`."""

    def single(self) -> str:
        """One of them."""
        return f"{self.one} {self.tail}".strip()

    def several(self) -> str:
        """Many of them."""
        return f"{self.many} {self.tail}".strip()


def group(scene: Scene, rng: random.Random) -> Group:
    chance = rng.random()
    if scene.kind == "towers" and chance < 0.55:
        return _towers(scene, rng)
    if chance < (0.85 if scene.kind == "towers" else 0.6):
        return _things(scene, rng)
    return _boxes(scene, rng)


def number(k: int, rng: random.Random) -> str:
    return WORDS[k] if k < len(WORDS) and rng.random() < 0.5 else str(k)


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# --- things


def _things(scene: Scene, rng: random.Random) -> Group:
    """Items by colour, shape, size and place."""
    items = scene.items
    words, named = [], list(items)
    color = rng.choice((None, *COLORS, *COLORS, *COLORS, *COLORS))
    if color is not None and rng.random() < 0.04:
        other = rng.choice([each for each in COLORS if each != color])
        words.append(f"{color} or {other}")
        named = [item for item in named if item.color in (color, other)]
    elif color is not None:
        words.append(color)
        named = [item for item in named if item.color == color]
    if scene.kind == "towers":
        noun = rng.choice(("block", "block", "block", "block", "block", "item", "object", "square"))
    else:
        noun = rng.choice(("item", "item", "object", "object", *SHAPES, *SHAPES, *SHAPES))
        if rng.random() < 0.06:
            size = rng.choice(list(SIZES))
            words.insert(0, {"big": rng.choice(("big", "large"))}.get(size, size))
            named = [item for item in named if item.size == SIZES[size]]
    if noun in SHAPES:
        named = [item for item in named if item.shape == noun]
    one, many = " ".join([*words, noun]), " ".join([*words, f"{noun}s"])
    if scene.kind == "towers":
        if noun == "block" and rng.random() < 0.6:
            return _blocks(scene, named, one, many, rng)
        return Group(one, many, "", len(named), len(named))
    if rng.random() < 0.3:
        return Group(one, many, "", len(named), len(named))
    tail, holds = touching(rng)
    count = sum(map(holds, named))
    return Group(one, many, tail, count, len(named), (f"is {tail}", f"are {tail}"))


def touching(rng: random.Random) -> tuple[str, Callable[[Item], bool]]:
    """Where an item touches its box."""
    closely = rng.choice(("", "", "closely ", "nearly "))
    edge = rng.choice(("the wall", "the edge", "the edge", "an edge", "any edge", "the side", "a wall", "the walls"))
    bottom = rng.choice(("the bottom of a box", "the bottom of a box", "the base", "the bottom", "the base edge"))
    right = rng.choice(("right wall of a box", "the right wall of a box"))
    corner = rng.choice(("the corner", "a corner", "a corner of a box", "a box corner"))
    return rng.choice(
        (
            *[(f"{closely}touching {edge}", lambda item: bool(item.walls))] * 5,
            *[(f"not {closely}touching {edge}", lambda item: not item.walls)] * 3,
            *[(f"{closely}touching {bottom}", lambda item: "bottom" in item.walls)] * 3,
            (f"{closely}touching {right}", lambda item: "right" in item.walls),
            *[(f"{closely}touching {corner}", lambda item: item.in_corner)] * 2,
        )
    )


def _blocks(scene: Scene, named: list[Item], one: str, many: str, rng: random.Random) -> Group:
    """Blocks by their place in their towers."""
    chance, chosen = rng.random(), set(map(id, named))
    if chance < 0.45:
        color = rng.choice(list(COLORS))
        where = rng.choice(("over", "above", "on", "on", "on top of", "below", "bellow", "under", "attached to"))
        pairs = [(low, high) for box in scene.boxes for low, high in itertools.pairwise(box)]
        if where in ("below", "bellow", "under"):
            found = [low for low, high in pairs if id(low) in chosen and high.color == color]
        elif where == "attached to":
            both = [*pairs, *[(high, low) for low, high in pairs]]
            found = list({id(a): a for a, b in both if id(a) in chosen and b.color == color}.values())
        else:
            found = [high for low, high in pairs if id(high) in chosen and low.color == color]
        return Group(one, many, f"{where} a {color} block", len(found), len(named))
    place = rng.choice(("top", "base"))
    index = -1 if place == "top" else 0
    towers, condition = list(scene.boxes), ""
    if rng.random() < 0.5:
        condition, holds = tower_height(rng)
        towers = [box for box in towers if holds(len(box))]
        condition = f" with {condition}"
    count = sum(id(box[index]) in chosen for box in towers)
    return Group(one, many, f"as the {place} of a tower{condition}", count, len(named))


# --- towers


def tower_height(rng: random.Random) -> tuple[str, Callable[[int], bool]]:
    """`exactly two blocks`, and which heights it means."""
    k = rng.randint(1, MAX_HEIGHT)
    word = number(k, rng)
    noun = "block" if k == 1 else "blocks"
    return rng.choice(
        (
            *[(f"{word} {noun}", lambda height: height == k)] * 3,
            *[(f"exactly {word} {noun}", lambda height: height == k)] * 3,
            *[(f"only {word} {noun}", lambda height: height == k)] * 2,
            *[(f"at least {word} {noun}", lambda height: height >= k)] * 2,
            (f"at most {word} {noun}", lambda height: height <= k),
            (f"more than {word} {noun}", lambda height: height > k),
        )
    )


def _towers(scene: Scene, rng: random.Random) -> Group:
    """Towers by what they are made of."""
    chance = rng.random()
    if chance < 0.08:
        color = rng.choice(list(COLORS))
        named = [box for box in scene.boxes if {item.color for item in box} == {color}]
        if rng.random() < 0.4:
            condition, holds = tower_height(rng)
            count = sum(holds(len(box)) for box in named)
            return Group(f"{color} tower", f"{color} towers", f"with {condition}", count, len(named))
        return Group(f"{color} tower", f"{color} towers", "", len(named), len(named))
    if chance < 0.14:
        k = rng.randint(1, MAX_HEIGHT)
        name = "single block" if k == 1 and rng.random() < 0.5 else f"{WORDS[k]} block{rng.choice(('', 's'))}"
        named = [box for box in scene.boxes if len(box) == k]
        text, holds_of = place_color(rng)
        count = sum(map(holds_of, named))
        return Group(
            f"{name} tower", f"{name} towers", f"with {text}", count, len(named), (f"has {text}", f"have {text}")
        )
    text, holds_of = tower_property(rng)
    if chance < 0.34:
        condition, holds = tower_height(rng)
        second, both = place_color(rng) if rng.random() < 0.75 else (text, holds_of)
        text = f"{condition} {rng.choice(('with', 'having', 'which has', 'and it has', 'with'))} {second}"
        return _with("tower", "towers", text, scene, lambda box: holds(len(box)) and both(box), rng)
    return _with("tower", "towers", text, scene, holds_of, rng)


def _with(one: str, many: str, text: str, scene: Scene, holds: Callable[[Box], bool], rng: random.Random) -> Group:
    count = sum(map(holds, scene.boxes))
    joint = rng.choice(("with", "with", "with", "which has", "that has", "having", "that contain", "which contains"))
    verbs = rng.choice((("has", "have"), ("has", "has"), ("contains", "contain")))
    return Group(one, many, f"{joint} {text}", count, 3, (f"{verbs[0]} {text}", f"{verbs[1]} {text}"))


def place_color(rng: random.Random) -> Property:
    """The colour of one block of a tower."""
    color = rng.choice(list(COLORS))
    noun = rng.choice(("block", "block", "block", "object"))
    article = rng.choice(("a", "a", "1"))
    top = rng.choice((f"{article} {color} {noun} at the top", f"{article} {color} top", f"{color} {noun} at the top"))
    base = rng.choice(
        (
            f"{article} {color} {noun} at the base",
            f"{article} {color} {noun} at the bottom",
            f"a {color} base",
            f"{article} {color} {noun} at base",
        )
    )
    second = rng.choice((f"a {color} second block", f"the second block {color}"))
    return rng.choice(
        (
            *[(top, lambda box: box[-1].color == color)] * 4,
            *[(base, lambda box: box[0].color == color)] * 4,
            (second, lambda box: len(box) > 1 and box[1].color == color),
            (f"a {color} block in the middle", lambda box: len(box) == 3 and box[1].color == color),
        )
    )


def tower_property(rng: random.Random) -> Property:
    color, other = rng.choice(list(COLORS)), rng.choice(list(COLORS))
    k = rng.choice((1, 1, 2, 2, 3))
    blocks = f"{color} block" if k == 1 else f"{color} blocks"
    word = number(k, rng)
    chance = rng.random()
    if chance < 0.33:
        return place_color(rng)
    if chance < 0.47:
        text, holds = tower_height(rng)
        return text, lambda box: holds(len(box))
    if chance < 0.65:
        over = rng.choice(("over", "over", "above", "on", "on top of"))
        if rng.random() < 0.2:
            text = f"a {color} block {rng.choice(('below', 'under'))} a {other} block"
            return text, lambda box: any((a.color, b.color) == (color, other) for a, b in pairs_of(box))
        text = f"a {color} block {over} a {other} block"
        return text, lambda box: any((b.color, a.color) == (color, other) for a, b in pairs_of(box))
    if chance < 0.82:
        if k == 1 and rng.random() < 0.4:
            return f"a {blocks}", lambda box: number_of(box, color) >= 1
        return rng.choice(
            (
                *[(f"{word} {blocks}", lambda box: number_of(box, color) == k)] * 3,
                (f"exactly {word} {blocks}", lambda box: number_of(box, color) == k),
                (f"only {word} {blocks}", lambda box: number_of(box, color) == k),
                *[(f"at least {word} {blocks}", lambda box: number_of(box, color) >= k)] * 2,
                (f"{max(2, k)} {color} blocks stacked together", lambda box: _longest_run(box, color) >= max(2, k)),
            )
        )
    if chance < 0.88 and color != other:
        third = next(each for each in COLORS if each not in (color, other))
        return rng.choice(
            (
                (
                    f"a {color} block and a {other} block",
                    lambda box: number_of(box, color) > 0 and number_of(box, other) > 0,
                ),
                (
                    f"a {color} block and two {other} blocks",
                    lambda box: number_of(box, color) > 0 and number_of(box, other) == 2,
                ),
                (f"only {color} and {other} blocks", lambda box: {i.color for i in box} == {color, other}),
                (
                    f"a {color} block, a {other} block and a {third} block",
                    lambda box: len({i.color for i in box}) == 3,
                ),
            )
        )
    return rng.choice(
        (
            (f"only {color} blocks", lambda box: {i.color for i in box} == {color}),
            (f"blocks of {color} color only", lambda box: {i.color for i in box} == {color}),
            ("blocks of all three colors", lambda box: len({i.color for i in box}) == 3),
            ("blocks of all 3 colours", lambda box: len({i.color for i in box}) == 3),
            ("only one color", lambda box: len({i.color for i in box}) == 1),
            ("blocks of the same color", lambda box: len({i.color for i in box}) == 1 and len(box) > 1),
            ("3 blocks of the same colour", lambda box: max(Counter(i.color for i in box).values()) >= 3),
        )
    )


def pairs_of(box: Box) -> list[tuple[Item, Item]]:
    """(lower, upper) blocks that lie on each other."""
    return list(itertools.pairwise(box))


def number_of(box: Box, color: str) -> int:
    return sum(item.color == color for item in box)


def _longest_run(box: Box, color: str) -> int:
    longest = run = 0
    for item in box:
        run = run + 1 if item.color == color else 0
        longest = max(longest, run)
    return longest


# --- boxes


def _boxes(scene: Scene, rng: random.Random) -> Group:
    """Boxes by what is in them."""
    one, many = rng.choice(
        (
            ("box", "boxes"),
            ("box", "boxes"),
            ("box", "boxes"),
            ("grey box", "grey boxes"),
            ("grey square", "grey squares"),
        )
    )
    text, holds = box_property(scene, rng)
    if rng.random() < 0.15:
        second, also = _content(scene, rng)
        first = holds
        text, holds = f"{text} and {second}", lambda box: first(box) and also(box)
    return _with(one, many, text, scene, holds, rng)


def _content(scene: Scene, rng: random.Random) -> Property:
    """`exactly two blue items`: how many of a box's items are of a kind."""
    nouns = ("item", "item", "item", "object") if scene.kind == "towers" else ("item", "item", "object", *SHAPES)
    noun = rng.choice(nouns)
    color = rng.choice((*COLORS, *COLORS, *COLORS, ""))
    tail, touches = ("", None)
    if scene.kind == "scattered" and rng.random() < 0.2:
        tail, touches = touching(rng)

    def count(box: Box) -> int:
        return sum(
            (not color or item.color == color)
            and (noun not in SHAPES or item.shape == noun)
            and (touches is None or touches(item))
            for item in box
        )

    k = rng.choice((1, 1, 1, 2, 2, 3, 4)) if color else rng.randint(1, 7)
    name = f"{color} {noun}".strip()
    several = f"{name if k == 1 else f'{name}s'} {tail}".strip()
    word = number(k, rng)
    forms: list[Property] = [
        (f"{word} {several}", lambda box: count(box) == k),
        (f"exactly {word} {several}", lambda box: count(box) == k),
        (f"only {word} {several}", lambda box: count(box) == k),
        (f"at least {word} {several}", lambda box: count(box) >= k),
        (f"atleast {word} {several}", lambda box: count(box) >= k),
    ]
    if color or noun in SHAPES:
        forms += [(f"{article(name)} {f'{name} {tail}'.strip()}", lambda box: count(box) >= 1)] * 4
        forms += [(f"no {name}s {tail}".strip(), lambda box: count(box) == 0)]
        forms += [(f"{name}s {tail}".strip(), lambda box: count(box) >= 1)]
    return rng.choice(forms)


def box_property(scene: Scene, rng: random.Random) -> Property:
    chance = rng.random()
    color, other = rng.sample(list(COLORS), 2)
    items = rng.choice(("items", "items", "objects"))
    if chance < 0.55:
        return _content(scene, rng)
    if chance < 0.75:
        k = rng.choice((2, 2, 3))
        return rng.choice(
            (
                (f"only {color} {items}", lambda box: {i.color for i in box} == {color}),
                (f"{items} of only {color} color", lambda box: {i.color for i in box} == {color}),
                (f"{items} of only one color", lambda box: len({i.color for i in box}) == 1),
                (f"only {color} and {other} {items}", lambda box: {i.color for i in box} == {color, other}),
                (f"{items} of only {color} and {other} color", lambda box: {i.color for i in box} == {color, other}),
                (f"{items} of {k} different colors", lambda box: len({i.color for i in box}) == k),
                (f"{items} of all 3 different colors", lambda box: len({i.color for i in box}) == 3),
                ("all 3 different colors", lambda box: len({i.color for i in box}) == 3),
            )
        )
    k = rng.randint(1, MAX_HEIGHT if scene.kind == "towers" else 7)
    many = f"{number(k, rng)} {'item' if k == 1 else 'items'}"
    if chance < 0.9:
        item = rng.choice(("item", "one", "item"))
        with_count = rng.random() < 0.4
        text = f"{many} and a {color} {item} on top" if with_count else f"a {color} item on top"
        return text, lambda box: (not with_count or len(box) == k) and _topmost(box).color == color
    if chance < 0.95:
        j = rng.randint(1, min(k, 3))
        text = f"{many} of which {number(j, rng)} {'is' if j == 1 else 'are'} {color}"
        return text, lambda box: len(box) == k and number_of(box, color) == j
    return f"{many} of all 3 different colors", lambda box: len(box) == k and len({i.color for i in box}) == 3


def _topmost(box: Box) -> Item:
    return min(box, key=lambda item: item.y)
