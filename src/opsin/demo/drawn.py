"""From a scene to pixels: shapes, letters and bars blended onto a grainy background."""

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from opsin.demo.fonts import Mask, glyph
from opsin.demo.scene import BAR_STEP, MAX_BAR, Ground, Rgb, Scene, Thing, Writing

Canvas = NDArray[np.float32]
"""(height, width, 3), 0 to 255."""

_OVERSAMPLING = 4


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB. The same scene always gives the same pixels."""
    canvas = _background(scene.ground, scene.size)
    if scene.bars:
        _draw_chart(canvas, scene)
    for thing in scene.things:
        _draw_thing(canvas, thing)
    for writing in scene.writings:
        _draw_writing(canvas, writing)
    return Image.fromarray(canvas.astype(np.uint8))


@cache
def _grain() -> NDArray[np.float32]:
    """(2 * 128, 2 * 128, 3) fixed noise in -1..1, from which every picture cuts its own window."""
    return np.random.default_rng(0).uniform(-1, 1, (256, 256, 3)).astype(np.float32)


@cache
def _ramp(length: int) -> NDArray[np.float32]:
    return np.linspace(-0.5, 0.5, length, dtype=np.float32)


def _background(ground: Ground, size: tuple[int, int]) -> Canvas:
    (width, height), (across, down) = size, ground.gradient
    slope = _ramp(height)[:, None] * down + _ramp(width)[None, :] * across
    canvas = slope[:, :, None] + np.array(ground.rgb, np.float32)
    if ground.noise:
        x, y = ground.noise_offset
        canvas += _grain()[y : y + height, x : x + width] * np.float32(ground.noise)
    # Room for grain and slope at both ends: nothing drawn later leaves 0..255.
    return np.clip(canvas, 0, 255, out=canvas)


def _blend(canvas: Canvas, mask: Mask, left: int, top: int, rgb: Rgb) -> None:
    """Lay `rgb` over the canvas where the mask is, cutting what lies outside the picture."""
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = min(canvas.shape[1], left + mask.shape[1]), min(canvas.shape[0], top + mask.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    cover = mask[y0 - top : y1 - top, x0 - left : x1 - left, None].astype(np.float32) * np.float32(1 / 255)
    view = canvas[y0:y1, x0:x1]
    view += cover * (np.array(rgb, np.float32) - view)


def _draw_thing(canvas: Canvas, thing: Thing) -> None:
    mask = shape_mask(thing.shape, thing.size, thing.turn)
    _blend(canvas, mask, round(thing.x - thing.size / 2), round(thing.y - thing.size / 2), thing.rgb)


def _draw_writing(canvas: Canvas, writing: Writing) -> None:
    for char, center in zip(writing.text, writing.pitch, strict=True):
        mask = glyph(writing.style, writing.height, char)
        _blend(canvas, mask, round(center - mask.shape[1] / 2), writing.baseline - writing.height, writing.rgb)


def _draw_chart(canvas: Canvas, scene: Scene) -> None:
    dark = sum(scene.ground.rgb) < 3 * 128
    ink = np.array((200, 200, 200) if dark else (70, 70, 70), np.float32)
    foot, width = scene.baseline, scene.size[0]
    if scene.gridlines:
        for value in range(1, MAX_BAR + 1):
            line = canvas[foot - value * BAR_STEP, 3 : width - 3]
            line += 0.3 * (ink - line)
    for bar in scene.bars:
        canvas[foot - bar.value * BAR_STEP : foot, bar.left : bar.right] = bar.rgb
    canvas[foot, 2 : width - 2] = ink


@cache
def shape_mask(shape: str, size: int, turn: int) -> Mask:
    """(size, size) coverage of a shape turned by `turn` degrees."""
    side = size * _OVERSAMPLING
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)

    def turned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        """Points in -1..1 around the centre, turned, in pixels."""
        cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
        return [((x * cos + y * sin + 1) * side / 2, (y * cos - x * sin + 1) * side / 2) for x, y in points]

    def disc(x: float, y: float, radius: float, fill: int) -> None:
        [(px, py)] = turned([(x, y)])
        r = radius * side / 2
        pen.ellipse((px - r, py - r, px + r, py + r), fill=fill)

    if shape == "circle":
        disc(0, 0, 0.95, 255)
    elif shape == "ring":
        disc(0, 0, 0.95, 255)
        disc(0, 0, 0.55, 0)
    elif shape == "moon":
        disc(0, 0, 0.95, 255)
        disc(0.45, -0.1, 0.75, 0)
    elif shape == "heart":
        disc(-0.42, -0.3, 0.48, 255)
        disc(0.42, -0.3, 0.48, 255)
        pen.polygon(turned([(-0.84, -0.07), (0, 0.9), (0.84, -0.07), (0, -0.4)]), fill=255)
    else:
        pen.polygon(turned(_OUTLINES[shape]), fill=255)
    return np.asarray(image.reduce(_OVERSAMPLING))


def _star() -> list[tuple[float, float]]:
    points = []
    for index in range(10):
        radius = 0.98 if index % 2 == 0 else 0.42
        angle = math.pi * index / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return points


_ARM = 0.33
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)],
    "triangle": [(0, -0.9), (0.88, 0.72), (-0.88, 0.72)],
    "diamond": [(0, -0.98), (0.66, 0), (0, 0.98), (-0.66, 0)],
    "star": _star(),
    "cross": [
        *((-_ARM, -0.9), (_ARM, -0.9), (_ARM, -_ARM), (0.9, -_ARM), (0.9, _ARM), (_ARM, _ARM)),
        *((_ARM, 0.9), (-_ARM, 0.9), (-_ARM, _ARM), (-0.9, _ARM), (-0.9, -_ARM), (-_ARM, -_ARM)),
    ],
    "arrow": [(0, -0.95), (0.75, 0), (0.28, 0), (0.28, 0.9), (-0.28, 0.9), (-0.28, 0), (-0.75, 0)],
}
"""Corners in -1..1 around the centre, y downwards."""
