"""Accuracy at IoU 0.5 (RefCOCO, RefCOCO+, RefCOCOg): is the box that a model writes the one that is meant?

The first box of an answer that can be read counts, and it is right where intersection over union with the true one is
at least 0.5. An answer without such a box is wrong, and counted.

Traps. A box says nothing without its space. Families write shares of the padded square (LLaVA-1.5), 0 to 999 of each
axis (Qwen-VL, Qwen2-VL), 0 to 1000 (InternVL); harnesses expect shares of the picture (lmms-eval's refcoco_bbox_rec)
or pixels (refcoco_grounding). Taking one for another costs nearly all accuracy and raises no error. So the parser's
name says which space is read, both boxes become pixels of the same picture first, and a coordinate outside its space
makes a box unreadable rather than wrapped or cut; only `first-four:unit` takes numbers as they come, as lmms-eval does.
COCO's boxes are left, top, width, height; `Box` has two corners.
"""

import re
from collections.abc import Sequence

from opsin.spec.grounding import Grounding, Space
from opsin.spec.plan import Size
from opsin.text.grounding import Box, read

THRESHOLD = 0.5
_FOUR = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")
Sides = Sequence[float]

SPACES: tuple[Space, ...] = ("pixels", "unit", "per_1000", "per_999")
PLAIN: dict[str, Grounding] = {space: Grounding(space=space, form="bare") for space in SPACES}
"""Ways to read `[left, top, right, bottom]` where a task names the space itself."""


def iou(one: Sides, other: Sides) -> float:
    """Intersection over union of two rectangles (left, top, right, bottom) of one space; 0 for two without area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 else 0.0


def _area(sides: Sides) -> float:
    return (sides[2] - sides[0]) * (sides[3] - sides[1])


def first_box(text: str, grounding: Grounding, size: Size) -> Box | None:
    """The first box that can be read, in pixels of a picture of `size`; None where there is none."""
    return next(iter(read(text, grounding, size).boxes), None)


def first_four(text: str, size: Size) -> tuple[float, float, float, float] | None:
    """The first `[a, b, c, d]` as shares of the sides of a picture of `size`, in its pixels, wherever they lie.

    lmms-eval's refcoco_bbox_rec, which takes numbers outside the picture and reversed corners as they are.
    """
    found = _FOUR.search(text)
    if found is None:
        return None
    left, top, right, bottom = map(float, found.groups())
    return left * size[0], top * size[1], right * size[0], bottom * size[1]


def moved(box: Box, before: Size, after: Size) -> Box:
    """The box at the same shares of another picture's sides, in its pixels."""
    return box.to("unit", before).to("pixels", after)


def describe(grounding: Grounding) -> str:
    """A grounding in words, for the parser's name: `points of per_1000`."""
    frame = " of the padded square" if grounding.frame == "square" else ""
    largest = "" if grounding.largest is None else f" to {grounding.largest}"
    return f"{grounding.form}, {grounding.space}{largest}{frame}"
