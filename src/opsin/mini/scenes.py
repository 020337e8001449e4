"""What opsin-mini's pictures and clips show, chosen by a seed: the demo's scenes, at any size and with things anywhere.

`demo.drawn.draw` paints a scene. Held-out combinations are the demo's (`demo.scene.is_heldout`): the `heldout` split
shows pairs of shape and colour, words, numbers and charts that `train` never shows.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

from opsin.demo.fonts import advance, heights
from opsin.demo.scene import (
    BAR_STEP,
    COLORS,
    INK_STYLES,
    MAX_BAR,
    Bar,
    Scene,
    Split,
    Thing,
    Writing,
    draw_ground,
    pick_bars,
    pick_number,
    pick_pair,
    pick_pairs,
    pick_word,
    tint,
)

SIDES = (64, 80, 96, 112, 128)
"""Sides of most pictures, in pixels; one picture in eight has sides that the model has to round."""
MAX_AREA = 112 * 112
CHART_HEIGHT = 112
CLIP_SIDES = (64, 80)
GAP = 3
"""Least distance of two things, in pixels."""
MAX_THINGS = 6
Direction = Literal["left", "right", "up", "down"]
STEPS: dict[Direction, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip: frames of one size, in which one thing moves and the others stand still."""

    frames: tuple[Scene, ...]
    """An even number."""
    mover: str
    """Name of the thing that moves; no other has it."""
    direction: Direction

    def between(self, pair: int) -> Scene:
        """The scene half-way between the two frames that share the patches of one time."""
        first, second = self.frames[2 * pair : 2 * pair + 2]
        things = tuple(
            replace(a, x=(a.x + b.x) / 2, y=(a.y + b.y) / 2) for a, b in zip(first.things, second.things, strict=True)
        )
        return replace(first, things=things)


def any_size(rng: random.Random) -> tuple[int, int]:
    """(width, height) of a picture."""
    while True:
        if rng.random() < 0.125:
            width, height = rng.randint(60, 128), rng.randint(60, 128)
        else:
            width, height = rng.choice(SIDES), rng.choice(SIDES)
        if width * height <= MAX_AREA:
            return width, height


def objects(
    rng: random.Random, split: Split, *, size: tuple[int, int] | None = None, count: int | None = None
) -> Scene:
    """Things anywhere."""
    size = size or any_size(rng)
    room = max(1, min(MAX_THINGS, size[0] * size[1] // 1400))
    count = min(count, room) if count else max(rng.randint(1, room), rng.randint(1, room))  # rather many than few
    pairs = pick_pairs(rng, split, count)
    rng.shuffle(pairs)
    return Scene("objects", draw_ground(rng), things=place(rng, size, pairs), size=size)


def place(rng: random.Random, size: tuple[int, int], pairs: list[tuple[str, str]]) -> tuple[Thing, ...]:
    """Things of these (shape, colour) that do not touch, from left to right; one that finds no room is left out."""
    width, height = size
    things: list[Thing] = []
    for shape, color in pairs:
        for attempt in range(40):
            side = rng.randrange(16, 36 - attempt // 4, 2)
            x, y = rng.uniform(side / 2, width - side / 2), rng.uniform(side / 2, height - side / 2)
            clear = all(max(abs(x - t.x), abs(y - t.y)) >= (side + t.size) / 2 + GAP for t in things)
            if clear:
                things.append(thing(rng, shape, color, x, y, side, size))
                break
    return tuple(sorted(things, key=lambda t: t.x))


def thing(rng: random.Random, shape: str, color: str, x: float, y: float, side: int, size: tuple[int, int]) -> Thing:
    """One thing; its cell is the third of the picture that its centre lies in, across and down."""
    cell = (min(2, int(3 * y / size[1])), min(2, int(3 * x / size[0])))
    return Thing(shape, color, cell, x, y, side, rng.choice((-16, -8, 0, 8, 16)), tint(rng, color))


def writing(rng: random.Random, text: str, size: tuple[int, int], *, top: int, bottom: int) -> Writing | None:
    """`text` in one line between two heights; None where it does not fit."""
    style = rng.choice(INK_STYLES if text.isdigit() else INK_STYLES[:-1])
    fitting = [h for h in heights(style) if 1.25 * h + 2 <= bottom - top]
    rng.shuffle(fitting)
    gap = rng.randint(2, 4)
    for height in fitting:
        steps = [max(10, advance(style, height, char) + gap) for char in text]
        if sum(steps) > size[0] - 4:
            continue
        left = rng.uniform(2, size[0] - 2 - sum(steps))
        pitch = tuple(left + sum(steps[:i]) + step / 2 for i, step in enumerate(steps))
        baseline = rng.randint(top + height, bottom - height // 4 - 1)
        color = rng.choice(list(COLORS))
        row = min(2, int(3 * (baseline - height / 2) / size[1]))
        return Writing(text, color, row, style, height, pitch, baseline, tint(rng, color))
    return None


def reading(rng: random.Random, split: Split) -> Scene:
    """A word, a number, or one above the other."""
    kinds = rng.choice((("word",), ("word", "number"), ("word", "number"), ("number", "word"), ("number", "word")))
    while True:
        width, height = rng.choice((80, 96, 112, 128)), rng.choice(SIDES)
        if width * height > MAX_AREA:
            continue
        cuts = [round(height * i / len(kinds)) for i in range(len(kinds) + 1)]
        texts = [pick_word(rng, split) if kind == "word" else pick_number(rng, split) for kind in kinds]
        lines = [writing(rng, text, (width, height), top=cuts[i], bottom=cuts[i + 1]) for i, text in enumerate(texts)]
        found = tuple(line for line in lines if line is not None)
        if len(found) == len(kinds):
            return Scene("text", draw_ground(rng), writings=found, size=(width, height))


def chart(rng: random.Random, split: Split, *, width: int | None = None) -> Scene:
    """Bars of different colours; one unit is ten pixels."""
    width = width or rng.choice((80, 96, 112))
    count = rng.randint(2, width // 18)
    chosen = pick_bars(rng, split, count)
    room = (width - 8) // count
    broad = rng.randint(10, min(room - 3, 20))
    first = 4 + rng.randint(0, room - broad) + rng.randint(0, width - 8 - room * count)
    bars = tuple(
        Bar(color, value, first + i * room, first + i * room + broad, tint(rng, color))
        for i, (color, value) in enumerate(chosen)
    )
    foot = CHART_HEIGHT - rng.randint(4, CHART_HEIGHT - MAX_BAR * BAR_STEP - 6)
    return Scene(
        "bars", draw_ground(rng), bars=bars, baseline=foot, gridlines=rng.random() < 0.7, size=(width, CHART_HEIGHT)
    )


def two_pictures(rng: random.Random, split: Split) -> tuple[Scene, Scene]:
    """Two pictures of a few things each. Every second time one shows what the other does, and one thing more."""
    sizes = [(rng.choice(SIDES[:3]), rng.choice(SIDES[:3])) for _ in range(2)]
    first = objects(rng, split, size=sizes[0], count=rng.randint(1, 3))
    if rng.random() < 0.5:
        return first, objects(rng, split, size=sizes[1], count=rng.randint(1, 3))
    pairs = [(t.shape, t.color) for t in first.things]
    while (extra := pick_pair(rng, split)) in pairs:
        pass
    pairs.append(extra)
    rng.shuffle(pairs)
    second = Scene("objects", draw_ground(rng), things=place(rng, sizes[1], pairs), size=sizes[1])
    return (first, second) if rng.random() < 0.5 else (second, first)


def clip(rng: random.Random, split: Split) -> Clip:
    """One thing moves straight, by more than a third of the picture; one or none stands still."""
    side = rng.choice(CLIP_SIDES)
    num_frames = rng.choice((4, 4, 6))
    ground = draw_ground(rng)
    while True:
        pairs = [pick_pair(rng, split) for _ in range(rng.choice((1, 2, 2, 2)))]
        if len(set(pairs)) < len(pairs):
            continue
        direction: Direction = rng.choice(list(STEPS))
        across, down = STEPS[direction]
        width = rng.randrange(16, 28, 2)
        far = rng.uniform(0.36 * side, side - width)
        x = rng.uniform(width / 2, side - width / 2 - far) if across else rng.uniform(width / 2, side - width / 2)
        y = rng.uniform(width / 2, side - width / 2 - far) if down else rng.uniform(width / 2, side - width / 2)
        if across < 0:
            x += far
        if down < 0:
            y += far
        mover = thing(rng, *pairs[0], x, y, width, (side, side))
        path = [
            replace(mover, x=x + across * far * i / (num_frames - 1), y=y + down * far * i / (num_frames - 1))
            for i in range(num_frames)
        ]
        still: tuple[Thing, ...] = ()
        if len(pairs) > 1:
            size = rng.randrange(16, 28, 2)
            sx, sy = rng.uniform(size / 2, side - size / 2), rng.uniform(size / 2, side - size / 2)
            if any(max(abs(sx - t.x), abs(sy - t.y)) < (size + width) / 2 + 1 for t in path):
                continue
            still = (thing(rng, *pairs[1], sx, sy, size, (side, side)),)
        frames = tuple(Scene("objects", ground, things=(each, *still), size=(side, side)) for each in path)
        return Clip(frames, mover.name, direction)
