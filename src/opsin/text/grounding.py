"""Boxes on a picture: spaces of coordinates, and the text in which each family writes and answers them.

Box (pixels) --to--> Box (the family's space) --write--> text
answer's ids --spell--> text with marks --read--> Reading: boxes in pixels, and what could not be read
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opsin.errors import MessageError
from opsin.spec.grounding import Grounding, Space
from opsin.spec.plan import Size
from opsin.text.tokenizer import TextStream, Tokenizer

Point = tuple[float, float]
_LIMITS: dict[Space, float] = {"pixels": math.inf, "unit": 1, "per_1000": 1000, "per_999": 999}


@dataclass(frozen=True)
class Box:
    """A rectangle, or with four `points` a quadrilateral. Raises MessageError for coordinates that make no sense."""

    points: tuple[Point, ...]
    """Left top and right bottom corner; or four corners, in any order."""
    space: Space = "pixels"
    label: str = ""

    def __post_init__(self) -> None:
        if len(self.points) not in (2, 4):
            raise MessageError(f"a box of {len(self.points)} points; 2 corners are needed, or 4 of a quadrilateral")
        most = _LIMITS[self.space]
        for value in (value for point in self.points for value in point):
            if not math.isfinite(value):
                raise MessageError(f"box {self._numbers()}: {value} is not a finite number")
            if not 0 <= value <= most:
                raise MessageError(
                    f"box {self._numbers()}: {value:g} lies outside 0 to {most:g} ({self.space}). Give coordinates of "
                    "that space, or name another"
                )
        if len(self.points) == 2 and (self.points[0][0] > self.points[1][0] or self.points[0][1] > self.points[1][1]):
            raise MessageError(f"box {self._numbers()}: its corners are reversed; give left, top, right, bottom")

    @classmethod
    def of(
        cls, left: float, top: float, right: float, bottom: float, space: Space = "pixels", label: str = ""
    ) -> "Box":
        """A rectangle by its sides."""
        return cls(((left, top), (right, bottom)), space, label)

    @property
    def sides(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom); of a quadrilateral those of the rectangle around it."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def to(self, space: Space, size: Size) -> "Box":
        """The same box in another space, for a picture of `size`. Raises MessageError where it leaves the picture."""
        spans = _spans(self.space, size)
        if any(value > span for point in self.points for value, span in zip(point, spans, strict=True)):
            raise MessageError(f"box {self._numbers()} leaves the picture of {size[0]}x{size[1]} px")
        if space == self.space:
            return self
        targets = _spans(space, size)
        # Not above the span, which rounding could pass by one last digit.
        points = tuple(
            (min(x / spans[0] * targets[0], targets[0]), min(y / spans[1] * targets[1], targets[1]))
            for x, y in self.points
        )
        return replace(self, points=points, space=space)

    def _numbers(self) -> str:
        return ", ".join(f"({', '.join(f'{value:g}' for value in point)})" for point in self.points)


def _spans(space: Space, size: Size) -> tuple[float, float]:
    """How far the axes of a space go on a picture of `size`."""
    if min(size) < 1:
        raise MessageError(f"a picture of {size[0]}x{size[1]} px has no pixels")
    return size if space == "pixels" else (_LIMITS[space], _LIMITS[space])


@dataclass(frozen=True)
class Reading:
    """What an answer says about places."""

    boxes: tuple[Box, ...]
    """In source pixels."""
    unread: tuple[str, ...] = ()
    """What looks like a box and cannot be read, with the reason."""


def square_offset(size: Size) -> tuple[int, int]:
    """Where a picture's left top corner lies on the square that it is padded to."""
    side = max(size)
    return (side - size[0]) // 2, (side - size[1]) // 2


def to_square(box: Box, size: Size) -> Box:
    """A box on a picture of `size` as pixels of its padded square."""
    left, top = square_offset(size)
    pixels = box.to("pixels", size)
    return replace(pixels, points=tuple((x + left, y + top) for x, y in pixels.points))


def from_square(box: Box, size: Size) -> Box:
    """A box on the padded square as pixels of the picture, cut to it. Raises MessageError where nothing is left."""
    (left, top), side = square_offset(size), max(size)
    inside = box.to("pixels", (side, side))
    moved = tuple(
        (min(max(x - left, 0.0), float(size[0])), min(max(y - top, 0.0), float(size[1]))) for x, y in inside.points
    )
    found = replace(inside, points=moved)
    was, now = inside.sides, found.sides
    if (now[0] == now[2] and was[0] < was[2]) or (now[1] == now[3] and was[1] < was[3]):
        raise MessageError("lies in the padding around the picture")
    return found


def write(boxes: Sequence[Box], grounding: Grounding, size: Size, *, label: str = "") -> str:
    """The text that a family writes for boxes of one label on a picture of `size`. Raises MessageError.

    label: what they show; the first box's own where it is empty. `bare` formats write none.
    """
    if not boxes:
        raise MessageError("no box to write")
    label = label or boxes[0].label
    for mark in grounding.marks:
        if mark in label:
            raise MessageError(f"the label {label[:80]!r} contains the mark {mark!r}")
    corners = [_written(box, grounding, size) for box in boxes]
    if grounding.form == "bare":
        return ", ".join(f"[{', '.join(each)}]" for each in corners)
    named = f"{grounding.ref[0]}{label}{grounding.ref[1]}" if label else ""
    if grounding.form == "lists":
        lists = ", ".join(f"[{', '.join(each)}]" for each in corners)
        return f"{named}{grounding.box[0]}[{lists}]{grounding.box[1]}"
    for each in corners:
        marks = grounding.box if len(each) == 4 else grounding.quad
        assert marks is not None
        pairs = ",".join(f"({x},{y})" for x, y in zip(each[::2], each[1::2], strict=True))
        named += f"{marks[0]}{pairs}{marks[1]}"
    return named


def _written(box: Box, grounding: Grounding, size: Size) -> list[str]:
    if len(box.points) == 4 and grounding.quad is None:
        raise MessageError("this model's format has rectangles only; give left, top, right, bottom")
    if grounding.frame == "square":
        box, size = to_square(box, size), (max(size), max(size))
    values = [value for point in box.to(grounding.space, size).points for value in point]
    if grounding.space == "unit":
        return [f"{value:.2f}" for value in values]
    largest = _LIMITS[grounding.space] if grounding.largest is None else grounding.largest
    return [str(int(min(round(value), largest))) for value in values]


def spell(ids: Sequence[int], tokenizer: Tokenizer, grounding: Grounding) -> str:
    """The text of an answer, with the marks of boxes where they are control tokens; others are left out."""
    marks = {tokenizer.controls[mark]: mark for mark in grounding.marks if mark in tokenizer.controls}
    stream = TextStream(tokenizer)
    return "".join(marks[each] if each in marks else stream.push(each) for each in ids) + stream.finish()


def read(text: str, grounding: Grounding, size: Size) -> Reading:
    """The boxes of an answer about a picture of `size`, in pixels. Never raises for what a model wrote."""
    found: list[Box] = []
    unread: list[str] = []
    for written, label, count, content in _bare(text) if grounding.form == "bare" else _marked(text, grounding):
        try:
            found += [_placed(points, label, grounding, size) for points in _points(content, count, grounding)]
        except MessageError as error:
            unread.append(f"{written[:120]}: {error}")
    return Reading(tuple(found), tuple(unread))


_Found = tuple[str, str, int, str | None]
"""What is written, its label, corners, and what stands between the marks; None where the marks do not pair up."""


def _bare(text: str) -> list[_Found]:
    """Brackets that hold numbers alone; brackets around words are ordinary text."""
    pattern = r"\[([-+\d.,;\s]*\d[-+\d.,;eE\s]*|[^\[\]]*\b(?:nan|inf)\b[^\[\]]*)(\]|(?=\[)|$)"
    return [(each[0], "", 2, f"[{each[1]}]" if each[2] == "]" else None) for each in re.finditer(pattern, text, re.I)]


def _marked(text: str, grounding: Grounding) -> list[_Found]:
    pieces = re.split(f"({'|'.join(map(re.escape, grounding.marks))})", text)
    found: list[_Found] = []
    label, place = "", 1
    while place < len(pieces):
        mark, after = pieces[place], pieces[place + 1]
        following = pieces[place + 2] if place + 2 < len(pieces) else ""
        pairs = {grounding.box: 2, **({grounding.quad: 4} if grounding.quad else {})}
        opened = next((marks for marks in (grounding.ref, *pairs) if mark == marks[0]), None)
        if opened is None:
            found.append((mark, label, 2, None))  # an end without a beginning
            place += 2
        elif following != opened[1]:
            found.append((mark + after, label, 2, None))
            label = ""
            place += 2
        else:
            if opened == grounding.ref:
                label = after
            else:
                found.append((mark + after + following, label, pairs[opened], after))
            # A label names the boxes right after it.
            if pieces[place + 3].strip(" ,\n"):
                label = ""
            place += 4
    return found


_NUMBER = r"\s*([-+]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}))\s*"


def _points(content: str | None, count: int, grounding: Grounding) -> list[tuple[Point, ...]]:
    """The corners of every box between two marks."""
    if content is None:
        raise MessageError("its marks do not pair up; the answer may be cut off")
    if grounding.form == "points":
        match = re.fullmatch(r"\s*,?\s*".join([rf"\s*\({_NUMBER},{_NUMBER}\)\s*"] * count), content)
        found = [match.groups()] if match else []
    else:
        one = rf"\s*\[{','.join([_NUMBER] * 4)}\]\s*"
        inner = content.strip()
        if grounding.form == "lists" and inner.startswith("[") and inner[1:].lstrip().startswith("["):
            inner = inner[1:-1] if inner.endswith("]") else ""
        bare = re.sub(r"\s*\[[^\[\]]*\]\s*", "[]", inner)
        found = [match.groups() for match in re.finditer(one, inner)]
        if bare != ",".join(["[]"] * len(found)):
            found = []
    if not found:
        raise MessageError(f"not {count * 2} numbers in the form of this model")
    return [tuple((float(x), float(y)) for x, y in zip(each[::2], each[1::2], strict=True)) for each in found]


def _placed(points: tuple[Point, ...], label: str, grounding: Grounding, size: Size) -> Box:
    box = Box(points, grounding.space, label)
    return from_square(box, size) if grounding.frame == "square" else box.to("pixels", size)
