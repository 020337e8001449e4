"""Letters and digits as masks, without font files of the system: Pillow's own two fonts and one drawn from strokes."""

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Mask = NDArray[np.uint8]
"""(height, width) coverage, 0 to 255."""

_OVERSAMPLING = 4

# Stroke letters on a grid 4 wide and 6 high, y downwards: polylines, each "xy xy ..." in tenths where needed.
_STROKES: dict[str, tuple[tuple[float, ...], ...]] = {
    "A": ((0, 6, 2, 0, 4, 6), (0.7, 4, 3.3, 4)),
    "B": ((0, 0, 0, 6, 2.7, 6, 4, 5.2, 4, 3.8, 2.8, 3, 0, 3), (2.8, 3, 3.7, 2.3, 3.7, 0.8, 2.6, 0, 0, 0)),
    "C": ((4, 1, 3, 0, 1, 0, 0, 1, 0, 5, 1, 6, 3, 6, 4, 5),),
    "D": ((0, 0, 0, 6, 2.4, 6, 4, 4.5, 4, 1.5, 2.4, 0, 0, 0),),
    "E": ((4, 0, 0, 0, 0, 6, 4, 6), (0, 3, 3, 3)),
    "F": ((4, 0, 0, 0, 0, 6), (0, 3, 3, 3)),
    "G": ((4, 1, 3, 0, 1, 0, 0, 1, 0, 5, 1, 6, 3, 6, 4, 5, 4, 3.2, 2.3, 3.2),),
    "H": ((0, 0, 0, 6), (4, 0, 4, 6), (0, 3, 4, 3)),
    "I": ((2, 0, 2, 6), (1, 0, 3, 0), (1, 6, 3, 6)),
    "J": ((3.6, 0, 3.6, 5, 2.6, 6, 1, 6, 0, 5),),
    "K": ((0, 0, 0, 6), (4, 0, 0, 3.6), (1.3, 2.5, 4, 6)),
    "L": ((0, 0, 0, 6, 4, 6),),
    "M": ((0, 6, 0, 0, 2, 3.2, 4, 0, 4, 6),),
    "N": ((0, 6, 0, 0, 4, 6, 4, 0),),
    "O": ((1, 0, 3, 0, 4, 1, 4, 5, 3, 6, 1, 6, 0, 5, 0, 1, 1, 0),),
    "P": ((0, 6, 0, 0, 3, 0, 4, 0.9, 4, 2.3, 3, 3.2, 0, 3.2),),
    "Q": ((1, 0, 3, 0, 4, 1, 4, 5, 3, 6, 1, 6, 0, 5, 0, 1, 1, 0), (2.3, 4, 4.2, 6.3)),
    "R": ((0, 6, 0, 0, 3, 0, 4, 0.9, 4, 2.3, 3, 3.2, 0, 3.2), (2, 3.2, 4, 6)),
    "S": ((4, 1, 3, 0, 1, 0, 0, 1, 0, 2, 1, 3, 3, 3, 4, 4, 4, 5, 3, 6, 1, 6, 0, 5),),
    "T": ((0, 0, 4, 0), (2, 0, 2, 6)),
    "U": ((0, 0, 0, 5, 1, 6, 3, 6, 4, 5, 4, 0),),
    "V": ((0, 0, 2, 6, 4, 0),),
    "W": ((0, 0, 0.9, 6, 2, 2.4, 3.1, 6, 4, 0),),
    "X": ((0, 0, 4, 6), (4, 0, 0, 6)),
    "Y": ((0, 0, 2, 3, 4, 0), (2, 3, 2, 6)),
    "Z": ((0, 0, 4, 0, 0, 6, 4, 6),),
    "0": ((1, 0, 3, 0, 4, 1, 4, 5, 3, 6, 1, 6, 0, 5, 0, 1, 1, 0), (3.2, 1.4, 0.8, 4.6)),
    "1": ((1, 1.2, 2.3, 0, 2.3, 6), (1, 6, 3.6, 6)),
    "2": ((0, 1, 1, 0, 3, 0, 4, 1, 4, 2.2, 0, 6, 4, 6),),
    "3": ((0, 0.8, 1, 0, 3, 0, 4, 0.9, 4, 2.1, 3, 3, 1.5, 3), (3, 3, 4, 3.9, 4, 5.1, 3, 6, 1, 6, 0, 5.2)),
    "4": ((3, 6, 3, 0, 0, 4.2, 4, 4.2),),
    "5": ((4, 0, 0.4, 0, 0.2, 2.6, 2.8, 2.4, 4, 3.4, 4, 5, 3, 6, 1, 6, 0, 5.2),),
    "6": ((3.6, 0.6, 2.6, 0, 1.2, 0, 0, 1.6, 0, 5, 1, 6, 3, 6, 4, 5, 4, 3.8, 3, 2.8, 1, 2.8, 0, 3.8),),
    "7": ((0, 0, 4, 0, 1.5, 6),),
    "8": (
        (1, 3, 0, 2.1, 0, 0.9, 1, 0, 3, 0, 4, 0.9, 4, 2.1, 3, 3, 1, 3),
        (1, 3, 0, 3.9, 0, 5.1, 1, 6, 3, 6, 4, 5.1, 4, 3.9, 3, 3),
    ),
    "9": ((0.4, 5.4, 1.4, 6, 2.8, 6, 4, 4.4, 4, 1, 3, 0, 1, 0, 0, 1, 0, 2.2, 1, 3.2, 3, 3.2, 4, 2.2),),
}

# Seven-segment digits: which of the segments a (top) to g (middle) are lit.
_SEGMENTS = {
    "0": "abcdef",
    "1": "bc",
    "2": "abged",
    "3": "abgcd",
    "4": "fgbc",
    "5": "afgcd",
    "6": "afgedc",
    "7": "abc",
    "8": "abcdefg",
    "9": "abcdfg",
}
_SEGMENT_LINES = {
    "a": (0, 0, 4, 0),
    "b": (4, 0, 4, 3),
    "c": (4, 3, 4, 6),
    "d": (0, 6, 4, 6),
    "e": (0, 3, 0, 6),
    "f": (0, 0, 0, 3),
    "g": (0, 3, 4, 3),
}
_THICKNESS = {"stroke": 0.11, "bold": 0.2, "slanted": 0.14, "segments": 0.15}
"""Width of a stroke as a share of the letter's height."""


def heights(style: str) -> tuple[int, ...]:
    """Letter heights in pixels that a style is drawn at, ascending."""
    if style == "bitmap":
        return (14, 21)  # the bitmap font's capitals are 7 pixels high, and only whole multiples keep its pixels square
    return (13, 16, 19, 22, 25)


def advance(style: str, height: int, char: str) -> int:
    """Width of a character's mask in pixels."""
    return int(glyph(style, height, char).shape[1])


@cache
def glyph(style: str, height: int, char: str) -> Mask:
    """The mask of a character, cut to its ink on the left and right; its last row but a quarter is the baseline.

    The mask is 1.25 * height high (rounded up), so that the tail of a Q has room below the line.
    """
    if style == "outline":
        mask = _outline(height, char)
    elif style == "bitmap":
        mask = _bitmap(height, char)
    else:
        mask = _stroked(style, height, char)
    columns = np.flatnonzero(mask.max(axis=0) > 40)
    return np.ascontiguousarray(mask[:, columns[0] : columns[-1] + 1])


def mask_height(height: int) -> int:
    """Rows of a mask of letters of `height` pixels."""
    return height + -(-height // 4)


@cache
def _outline_font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's built-in Aileron has capitals of about 0.69 of its size.
    return ImageFont.load_default(height / 0.69)


def _outline(height: int, char: str) -> Mask:
    font = _outline_font(height)
    if not isinstance(font, ImageFont.FreeTypeFont):
        return _stroked("stroke", height, char)  # a Pillow built without FreeType has no outlines
    image = Image.new("L", (2 * height, mask_height(height)))
    ImageDraw.Draw(image).text((height // 4, height), char, fill=255, font=font, anchor="ls")
    return np.asarray(image)


def _bitmap(height: int, char: str) -> Mask:
    scale = height // 7
    image = Image.new("L", (12, 11))
    ImageDraw.Draw(image).text((2, 0), char, fill=255, font=ImageFont.load_default_imagefont())
    rows = np.asarray(image)[2:]  # two empty rows stand above the capitals
    large = rows.repeat(scale, axis=0).repeat(scale, axis=1)
    out = np.zeros((mask_height(height), large.shape[1]), np.uint8)
    kept = min(len(out), len(large))
    out[:kept] = large[:kept]
    return out


def _stroked(style: str, height: int, char: str) -> Mask:
    scale = _OVERSAMPLING
    thickness = _THICKNESS[style] * height * scale
    if style == "segments":
        lines: tuple[tuple[float, ...], ...] = tuple(_SEGMENT_LINES[name] for name in _SEGMENTS[char])
    else:
        lines = _STROKES[char]
    unit = (height * scale - thickness) / 6
    slant = 0.22 if style == "slanted" else 0.0
    size = (2 * height * scale, mask_height(height) * scale)
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    radius = thickness / 2
    for line in lines:
        points = []
        for x, y in zip(line[::2], line[1::2], strict=True):
            points.append((height * scale / 3 + (x * 0.9 + slant * (6 - y)) * unit, radius + y * unit))
        draw.line(points, fill=255, width=round(thickness), joint="curve")
        for x, y in points if style != "segments" else ():
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(image.reduce(scale))
