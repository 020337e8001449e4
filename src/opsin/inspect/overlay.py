"""The tiles and the token slots of a picture, drawn: what the tower sees, and which part fills which slot.

Both functions take the picture and its `ImagePlan`; nothing is measured or guessed, every line is one of the plan's
integers.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from opsin.media.prepare import draw_canvas
from opsin.spec.plan import NEWLINE, Color, ImagePlan, Size

MAX_SIDE = 1344
"""Longest side of a drawing, in pixels: four tiles of 336."""
_MARGIN_COLOR = (27, 31, 40)
_LABEL_COLOR = (232, 234, 240)
_BORDER_COLOR = (255, 176, 32)
_DARK = (15, 17, 22)
# Dark blue over teal to yellow: lightness rises with the slot's number, so the order survives without colour vision.
_RAMP = ((46, 32, 110), (44, 90, 160), (30, 145, 150), (60, 190, 110), (170, 215, 60), (252, 230, 70))
_TINT = 0.36
"""Share of a slot's colour over the picture."""
_LABEL_SIZE = 12
"""Pixels of the numbers in the margins and of tile numbers."""


@dataclass(frozen=True)
class SlotCounts:
    """What some slots of a picture look at."""

    picture: int
    """Slots whose row covers a part of the picture."""
    padding: int
    """Slots whose row sees only the padding around it."""
    newline: int
    """Slots that hold the learned newline row."""


def slot_layers(plan: ImagePlan) -> tuple[NDArray[np.int64], ...]:
    """The slots that each canvas fills, ascending, leaving out canvases that fill none: one drawing is made of each."""
    owners = _slot_canvases(plan)
    layers = [np.flatnonzero(owners == canvas) for canvas in range(len(plan.canvases))]
    return tuple(slots for slots in layers if len(slots))


def count_slots(plan: ImagePlan, slots: NDArray[np.int64] | None = None) -> SlotCounts:
    """How many slots (all, or those given) look at the picture, at padding, and mark the end of a line."""
    boxes = plan.slot_boxes() if slots is None else plan.slot_boxes()[slots]
    newline = int(np.isnan(boxes[:, 0]).sum())
    picture = int(((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).sum())
    return SlotCounts(picture, len(boxes) - picture - newline, newline)


def slot_color(index: int, num_slots: int) -> Color:
    """The colour of slot `index`: the same in every drawing of that picture."""
    place = index / max(1, num_slots - 1) * (len(_RAMP) - 1)
    low = min(int(place), len(_RAMP) - 2)
    start, end = _RAMP[low], _RAMP[low + 1]
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in zip(start, end, strict=True))
    return red, green, blue


def draw_tiles(picture: Image.Image, plan: ImagePlan, *, min_side: int = 480) -> tuple[Image.Image, ...]:
    """Each canvas as the tower sees it (padded, resized, cropped), with tile borders and the patch grid.

    picture: the source, `plan.size` large. min_side: small canvases are enlarged by a whole factor to at least this
    many pixels. Returns one RGB picture per canvas.
    """
    _check(picture, plan)
    drawings = []
    for number, canvas in enumerate(plan.canvases):
        scale = max(1, math.ceil(min_side / max(canvas.size)))
        view = draw_canvas(picture.convert("RGB"), canvas)
        drawing = view.resize((view.width * scale, view.height * scale), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(drawing, "RGBA")
        tiles = [(index, tile) for index, tile in enumerate(plan.tiles) if tile.canvas == number]
        for _, tile in tiles:
            left, top, right, bottom = (side * scale for side in tile.box)
            _, rows, columns = tile.grid
            for x in np.linspace(left, right, columns + 1)[1:-1]:
                _hairline(pen, (round(x), top, round(x), bottom))
            for y in np.linspace(top, bottom, rows + 1)[1:-1]:
                _hairline(pen, (left, round(y), right, round(y)))
        for index, tile in tiles:
            left, top, right, bottom = (side * scale for side in tile.box)
            pen.rectangle((left, top, right - 1, bottom - 1), outline=_DARK, width=4)
            pen.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=_BORDER_COLOR, width=2)
            _badge(pen, (left + 8, top + 8), f"tile {index + 1}")
        drawings.append(drawing)
    return tuple(drawings)


def draw_slots(picture: Image.Image, plan: ImagePlan, *, min_side: int = 540) -> tuple[Image.Image, ...]:
    """The token slots drawn back on the source picture: which part of it fills which slot.

    A slot is shaded by its place among the picture's slots, dark (first) to bright (last), and numbered from 0 where
    its box has room; else the first slot of each line is numbered in the left margin. A newline slot, which covers no
    part of the picture, is a mark in the right margin at the end of its line; one that sees only padding is not drawn.
    Returns one RGB picture per layer of `slot_layers`: the whole picture first, then (anyres) its tiles.
    """
    _check(picture, plan)
    return tuple(_draw_layer(picture, plan, slots, min_side) for slots in slot_layers(plan))


def slot_rectangles(plan: ImagePlan, size: Size) -> NDArray[np.int64]:
    """(num_slots, 4) slot boxes on the picture drawn at `size` pixels, right and bottom exclusive.

    Slots that cover nothing there (newline, padding) get an empty box at 0.
    """
    boxes = plan.slot_boxes()
    scale = np.array([size[0] / plan.size[0], size[1] / plan.size[1]] * 2)
    rectangles = np.rint(np.nan_to_num(boxes) * scale).astype(np.int64)
    empty = (rectangles[:, 2] <= rectangles[:, 0]) | (rectangles[:, 3] <= rectangles[:, 1])
    rectangles[empty] = 0
    return rectangles


def _check(picture: Image.Image, plan: ImagePlan) -> None:
    assert picture.size == plan.size, f"a picture of {picture.size} px with the plan of one of {plan.size} px"


def _slot_canvases(plan: ImagePlan) -> NDArray[np.int64]:
    """(num_slots,) canvas that each slot's row comes from; newline slots belong to the last one, the mosaic."""
    tile_canvases = np.array([tile.canvas for tile in plan.tiles], np.int64)
    row_canvases = tile_canvases[plan.row_tiles]
    resample = plan.layout.resample
    if resample is not None:
        height, width = resample.grid_out
        # A raster never mixes canvases, so its first row speaks for all.
        row_canvases = np.concatenate([row_canvases, np.full(height * width, row_canvases[resample.rows[0]])])
    order = plan.layout.order
    owners = np.full(len(order), tile_canvases[-1])
    filled = order != NEWLINE
    owners[filled] = row_canvases[order[filled]]
    return owners


def _draw_layer(picture: Image.Image, plan: ImagePlan, slots: NDArray[np.int64], min_side: int) -> Image.Image:
    """Draw the given slots (ascending numbers) on the picture."""
    drawn = _fit(picture.convert("RGB"), min_side)
    rectangles = slot_rectangles(plan, drawn.size)
    newlines = slots[plan.layout.order[slots] == NEWLINE]
    filled = [int(slot) for slot in slots if rectangles[slot, 2]]
    font = _number_font(rectangles[filled], plan.num_slots)
    left = 0 if font or not filled else _text_width(_font(_LABEL_SIZE), str(plan.num_slots)) + 12
    right = _text_width(_font(_LABEL_SIZE), str(plan.num_slots)) + 34 if len(newlines) else 0

    tint = drawn.copy()
    pen = ImageDraw.Draw(tint)
    for slot in filled:
        x0, y0, x1, y1 = rectangles[slot].tolist()
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=slot_color(slot, plan.num_slots))
    drawn = Image.blend(drawn, tint, _TINT)
    pen = ImageDraw.Draw(drawn, "RGBA")
    for slot in filled:
        x0, y0, x1, y1 = rectangles[slot].tolist()
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=(*_DARK, 90))
        if font and _text_width(font, str(slot)) + 4 <= x1 - x0:
            middle = ((x0 + x1) / 2, (y0 + y1) / 2)
            pen.text(middle, str(slot), font=font, anchor="mm", fill="white", stroke_width=1, stroke_fill=_DARK)

    framed = Image.new("RGB", (left + drawn.width + right, drawn.height), _MARGIN_COLOR)
    framed.paste(drawn, (left, 0))
    pen = ImageDraw.Draw(framed)
    if left:
        _label_lines(pen, rectangles, filled, left)
    if right:
        _mark_newlines(pen, _line_extents(rectangles, filled, newlines, drawn.height), left + drawn.width, plan)
    return framed


def _label_lines(pen: ImageDraw.ImageDraw, rectangles: NDArray[np.int64], filled: list[int], margin: int) -> None:
    """Number the first slot of each line in the left margin, as many as fit."""
    edge = min(rectangles[slot, 0] for slot in filled)
    free_from = 0.0
    for slot in sorted((slot for slot in filled if rectangles[slot, 0] == edge), key=lambda slot: rectangles[slot, 1]):
        middle = max(_LABEL_SIZE / 2, float(rectangles[slot, 1] + rectangles[slot, 3]) / 2)
        if middle - _LABEL_SIZE / 2 >= free_from:
            pen.text((margin - 6, middle), str(slot), font=_font(_LABEL_SIZE), anchor="rm", fill=_LABEL_COLOR)
            free_from = middle + _LABEL_SIZE


def _line_extents(
    rectangles: NDArray[np.int64], filled: list[int], newlines: NDArray[np.int64], height: int
) -> dict[int, tuple[float, float]]:
    """(top, bottom) of the line that each newline slot ends: that of the slot before it."""
    drawn = set(filled)
    # Where a plan cuts every row of a line, no slot stands before its newline: those marks share the height evenly.
    step = height / len(newlines)
    return {
        slot: (rectangles[slot - 1, 1], rectangles[slot - 1, 3])
        if slot - 1 in drawn
        else (place * step, (place + 1) * step)
        for place, slot in enumerate(newlines.tolist())
    }


def _mark_newlines(
    pen: ImageDraw.ImageDraw, extents: dict[int, tuple[float, float]], edge: int, plan: ImagePlan
) -> None:
    """A hooked arrow in the right margin, which begins at `edge`, for each newline slot; numbers where they fit."""
    free_from = 0.0
    for slot, (top, bottom) in extents.items():
        middle = (top + bottom) / 2
        arm = min(5.0, max(1.5, (bottom - top) / 3))
        color = slot_color(slot, plan.num_slots)
        x0, x1 = edge + 6, edge + 20
        pen.line((x1, middle - arm, x1, middle, x0, middle), fill=color, width=2)
        pen.polygon((x0 - 3, middle, x0 + 3, middle - arm / 1.5, x0 + 3, middle + arm / 1.5), fill=color)
        middle = max(_LABEL_SIZE / 2, middle)
        if middle - _LABEL_SIZE / 2 >= free_from:
            pen.text((edge + 27, middle), str(slot), font=_font(_LABEL_SIZE), anchor="lm", fill=_LABEL_COLOR)
            free_from = middle + _LABEL_SIZE


def _fit(picture: Image.Image, min_side: int) -> Image.Image:
    """Enlarge by a whole factor to at least `min_side`, or shrink to MAX_SIDE (longest sides)."""
    longest = max(picture.size)
    if longest > MAX_SIDE:
        size = tuple(max(1, round(side * MAX_SIDE / longest)) for side in picture.size)
        return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    scale = max(1, math.ceil(min_side / longest))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _number_font(rectangles: NDArray[np.int64], num_slots: int) -> ImageFont.FreeTypeFont | None:
    """The largest readable font in which slot numbers fit their boxes; None when none does."""
    if not len(rectangles):
        return None
    # The middle one speaks for all: boxes that padding or a crop cuts are narrower, and go without a number.
    width = float(np.median(rectangles[:, 2] - rectangles[:, 0]))
    height = float(np.median(rectangles[:, 3] - rectangles[:, 1]))
    for size in (18, 16, 14, 12, 10):
        if _text_width(_font(size), str(num_slots - 1)) + 6 <= width and size + 4 <= height:
            return _font(size)
    return None


def _hairline(pen: ImageDraw.ImageDraw, line: tuple[int, int, int, int]) -> None:
    """A thin line that shows on dark and on light ground: one dark pixel beside one light pixel."""
    x0, y0, x1, y1 = line
    beside = (x0 - 1, y0, x1 - 1, y1) if x0 == x1 else (x0, y0 - 1, x1, y1 - 1)
    pen.line(line, fill=(255, 255, 255, 110))
    pen.line(beside, fill=(*_DARK, 90))


def _badge(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    font = _font(_LABEL_SIZE)
    left, top = corner
    pen.rounded_rectangle((left, top, left + _text_width(font, text) + 12, top + _LABEL_SIZE + 8), 4, fill=_DARK)
    pen.text((left + 6, top + _LABEL_SIZE / 2 + 4), text, font=font, anchor="lm", fill=_BORDER_COLOR)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own outline font."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _text_width(font: ImageFont.FreeTypeFont, text: str) -> int:
    return math.ceil(font.getlength(text))
