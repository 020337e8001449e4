"""Pictures in NLVR's layout, drawn by this file: three grey boxes of scattered shapes, or of one tower each.

Sizes, places and colours were read off pictures of the training split (the data set's `dev`). Nothing here is the data
set's own code, and no picture of it is used.
"""

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 400, 100
BOX = 100
"""Side of a box in pixels."""
BOX_LEFTS = (0, 150, 300)
BACKGROUND, GAP = (211, 211, 211), (128, 128, 128)
COLORS = {"black": (0, 0, 0), "blue": (0, 153, 255), "yellow": (255, 255, 0)}
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": 10, "medium": 20, "big": 30}
BLOCK = 20
MAX_HEIGHT = 4
MAX_ITEMS = 7
_OVERSAMPLING = 4

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Item:
    """One shape; x and y are the left and top of its square, in pixels of its box."""

    shape: str
    color: str
    x: int
    y: int
    size: int

    @property
    def walls(self) -> frozenset[str]:
        """Sides of the box that it touches."""
        touched = {"left": self.x == 0, "right": self.x + self.size == BOX}
        touched |= {"top": self.y == 0, "bottom": self.y + self.size == BOX}
        return frozenset(side for side, is_touched in touched.items() if is_touched)

    @property
    def in_corner(self) -> bool:
        """Whether it touches two sides."""
        return len(self.walls) > 1


@dataclass(frozen=True, slots=True)
class Scene:
    """Three boxes from left to right; in towers, items from the base up."""

    kind: str
    """`towers` or `scattered`."""
    boxes: tuple[tuple[Item, ...], ...]

    @property
    def items(self) -> tuple[Item, ...]:
        """All items."""
        return tuple(item for box in self.boxes for item in box)


def draw_scene(rng: random.Random) -> Scene:
    """A random scene. In the training split, seven in ten pictures show towers."""
    palette = _palette(rng)
    if rng.random() < 0.6:
        return Scene("towers", tuple(_tower(rng, palette) for _ in BOX_LEFTS))
    shapes = _shapes(rng)
    return Scene("scattered", tuple(_scattered(rng, palette, shapes) for _ in BOX_LEFTS))


def _palette(rng: random.Random) -> list[str]:
    """Colours to draw from: mostly all alike, sometimes one more often, or only two."""
    colors = list(COLORS)
    rng.shuffle(colors)
    chance = rng.random()
    if chance < 0.5:
        return colors
    if chance < 0.75:
        return [*colors, colors[0], colors[0]]
    return colors[:2]


def _box_palette(rng: random.Random, palette: list[str]) -> list[str]:
    """What `only` and `all` are about: now and then a box has one colour, or two."""
    chance = rng.random()
    if chance < 0.2:
        return [rng.choice(palette)]
    if chance < 0.4:
        return [rng.choice(palette), rng.choice(palette)]
    return palette


def _shapes(rng: random.Random) -> list[str]:
    return [*SHAPES, rng.choice(SHAPES), rng.choice(SHAPES)] if rng.random() < 0.5 else list(SHAPES)


def _tower(rng: random.Random, palette: list[str]) -> tuple[Item, ...]:
    palette = _box_palette(rng, palette)
    height = rng.choices(range(1, MAX_HEIGHT + 1), weights=(3, 3, 3, 3))[0]
    return tuple(
        Item("square", rng.choice(palette), 40, BOX - BLOCK - level * (BLOCK + 1), BLOCK) for level in range(height)
    )


def _scattered(rng: random.Random, palette: list[str], shapes: list[str]) -> tuple[Item, ...]:
    palette = _box_palette(rng, palette)
    wall_share = rng.choice((0.0, 0.3, 0.5, 0.7))
    items: list[Item] = []
    for _ in range(rng.randint(1, MAX_ITEMS)):
        for _ in range(20):
            size = rng.choice(tuple(SIZES.values()))
            x, y = _place(rng, size, wall_share, items)
            if all(_apart(x, y, size, other) for other in items):
                items.append(Item(rng.choice(shapes), rng.choice(palette), x, y, size))
                break
    return tuple(items)


def _place(rng: random.Random, size: int, wall_share: float, items: list[Item]) -> tuple[int, int]:
    most = BOX - size
    x, y = rng.randint(1, most - 1), rng.randint(1, most - 1)
    if rng.random() < wall_share:
        side = rng.choice(("left", "right", "top", "bottom", "bottom", "corner"))
        if side in ("left", "right", "corner"):
            x = 0 if side == "left" or (side == "corner" and rng.random() < 0.5) else most
        if side in ("top", "bottom", "corner"):
            y = 0 if side == "top" or (side == "corner" and rng.random() < 0.5) else most
    elif items and rng.random() < 0.1:  # right on top of another
        below = rng.choice(items)
        x, y = min(most, max(0, below.x + (below.size - size) // 2)), below.y - size
    return x, y


def _apart(x: int, y: int, size: int, other: Item) -> bool:
    inside = 0 <= x <= BOX - size and 0 <= y <= BOX - size
    return inside and (
        x + size <= other.x or other.x + other.size <= x or y + size <= other.y or other.y + other.size <= y
    )


def render(scene: Scene) -> Pixels:
    """(HEIGHT, WIDTH, 3) pixels."""
    canvas = _empty().copy()
    for left, box in zip(BOX_LEFTS, scene.boxes, strict=True):
        for item in box:
            view = canvas[item.y : item.y + item.size, left + item.x : left + item.x + item.size]
            mask = shape_mask(item.shape, item.size)
            view += mask * (np.array(COLORS[item.color], np.float32) - view)
    return np.rint(canvas).astype(np.uint8)


def blank() -> Image.Image:
    """The three boxes with nothing in them."""
    return Image.fromarray(_empty().astype(np.uint8))


@cache
def _empty() -> NDArray[np.float32]:
    canvas = np.empty((HEIGHT, WIDTH, 3), np.float32)
    canvas[:] = GAP
    for left in BOX_LEFTS:
        canvas[:, left : left + BOX] = BACKGROUND
    return canvas


@cache
def shape_mask(shape: str, size: int) -> NDArray[np.float32]:
    """(size, size, 1) coverage from 0 to 1."""
    side = size * _OVERSAMPLING
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
    elif shape == "square":
        pen.rectangle((0, 0, side - 1, side - 1), fill=255)
    else:
        pen.polygon([((side - 1) / 2, 0), (side - 1, side - 1), (0, side - 1)], fill=255)
    covered: NDArray[np.float32] = np.asarray(image.reduce(_OVERSAMPLING)).astype(np.float32) / np.float32(255)
    return covered[:, :, None]
