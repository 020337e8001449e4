"""Names and boxes in messages: the `objects` of a record, and their spelling in a family's words.

The neutral form is ms-swift's. Marks in the texts take what `objects` lists, in order:

    {"messages": [{"role": "user", "content": "<image>Where is <ref-object>?"},
                  {"role": "assistant", "content": "<bbox>"}],
     "images": ["street.jpg"],
     "objects": {"ref": ["the red car"], "bbox": [[31, 40, 220, 180]], "bbox_type": "real"}}

`bbox` are left, top, right, bottom, or the four corners of a quadrilateral; a list of them stands for several boxes in
one place. `bbox_type`: `real`, pixels of the picture (when not given), or `norm1`, shares of its sides. `image_id`: on
which picture each box is, from 0; on the first when not given.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

from opsin.errors import MessageError
from opsin.spec.grounding import Grounding, Space
from opsin.spec.plan import Size
from opsin.text.grounding import Box, write
from opsin.text.messages import BoxPart, ControlPart, Conversation, Message, NamePart, Part, TextPart

NAME_MARK, BOX_MARK = "<ref-object>", "<bbox>"
BOX_TYPES: dict[str, Space] = {"real": "pixels", "norm1": "unit"}


class Objects:
    """The names and boxes that one record lists, taken one by one."""

    def __init__(self, names: Sequence[str], boxes: Sequence[tuple[Box, ...]], images: Sequence[int]) -> None:
        self.names, self.boxes, self.images = names, boxes, images
        self.num_names = 0
        self.num_boxes = 0

    @classmethod
    def read(cls, given: Any) -> "Objects | None":
        """From a record's `objects`; None where it has none. Raises MessageError."""
        if not given:
            return None
        if not isinstance(given, Mapping):
            raise MessageError(f"'objects' is {type(given).__name__}; an object with 'bbox' is needed", kind="objects")
        names, corners, images = (_list(given, key) for key in ("ref", "bbox", "image_id"))
        if not names and not corners:
            return None
        kind = given.get("bbox_type") or "real"
        if not isinstance(kind, str) or kind not in BOX_TYPES:
            raise MessageError(
                f"bbox_type {str(kind)[:80]!r} is unknown", kind="objects", fix=f"known: {', '.join(BOX_TYPES)}"
            )
        boxes = []
        for number, each in enumerate(corners, start=1):
            several = each if isinstance(each, list | tuple) and each and isinstance(each[0], list | tuple) else [each]
            try:
                boxes.append(tuple(_box(numbers, BOX_TYPES[kind]) for numbers in several))
            except MessageError as error:
                raise MessageError(f"bbox {number}: {error.message}", kind="box", fix=error.fix) from None
        for key, items, of in (("ref", names, str), ("image_id", images, int)):
            if not all(isinstance(item, of) for item in items):
                raise MessageError(
                    f"objects: {key!r} is {str(items)[:80]}; a list of {of.__name__} is needed", kind="objects"
                )
        if images and len(images) != len(boxes):
            raise MessageError(f"{len(images)} image_id for {len(boxes)} bbox; give one for each", kind="objects")
        return cls(names, boxes, images or [0] * len(boxes))

    def take_name(self) -> NamePart:
        """The next name. Where there is none, `check` says so, once for all."""
        self.num_names += 1
        return NamePart(self.names[self.num_names - 1] if self.num_names <= len(self.names) else "")

    def take_box(self) -> BoxPart:
        """The next box or boxes."""
        self.num_boxes += 1
        if self.num_boxes > len(self.boxes):
            return BoxPart((), 0)
        return BoxPart(self.boxes[self.num_boxes - 1], self.images[self.num_boxes - 1])

    def check(self, num_images: int) -> None:
        """Whether marks and lists are equally many, and every box is on a picture of the record."""
        for key, mark, listed, marked in (
            ("ref", NAME_MARK, len(self.names), self.num_names),
            ("bbox", BOX_MARK, len(self.boxes), self.num_boxes),
        ):
            # Names without any mark are a list of what there is to see, which ms-swift allows.
            if listed != marked and not (key == "ref" and marked == 0):
                raise MessageError(
                    f"objects list {listed} {key} but the texts have {marked} {mark} mark(s)",
                    kind="marks",
                    fix="put one mark where each belongs",
                )
        for image in self.images:
            if not 0 <= image < num_images:
                raise MessageError(
                    f"a box is on picture {image} (image_id), but there are {num_images}, counted from 0",
                    kind="objects",
                )


def _list(given: Mapping[str, Any], key: str) -> list[Any]:
    value = given.get(key)
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise MessageError(f"objects: {key!r} is {type(value).__name__}; a list is needed", kind="objects")
    return list(value)


def _box(numbers: Any, space: Space) -> Box:
    if not isinstance(numbers, list | tuple) or not all(
        isinstance(each, int | float) and not isinstance(each, bool) for each in numbers
    ):
        raise MessageError(f"{str(numbers)[:80]} are not numbers")
    if len(numbers) not in (4, 8):
        raise MessageError(f"{len(numbers)} numbers; 4 are needed (left, top, right, bottom), or 8 of four corners")
    values = [float(each) for each in numbers]
    return Box(tuple(zip(values[::2], values[1::2], strict=True)), space)


def write_objects(conversation: Conversation) -> dict[str, Any] | None:
    """What `Objects.read` reads; None without names and boxes. Raises MessageError for boxes in more than one space."""
    parts = [part for message in conversation.messages for part in message.parts]
    names = [part.text for part in parts if isinstance(part, NamePart)]
    places = [part for part in parts if isinstance(part, BoxPart)]
    if not names and not places:
        return None
    kinds = {space: kind for kind, space in BOX_TYPES.items()}
    spaces = {box.space for part in places for box in part.boxes} or {"pixels"}
    if len(spaces) > 1 or not spaces <= kinds.keys():
        raise MessageError(f"boxes in {', '.join(sorted(spaces))}; one of {', '.join(kinds)} is needed for all of them")
    corners = [[[value for point in box.points for value in point] for box in part.boxes] for part in places]
    written: dict[str, Any] = {
        "ref": names,
        "bbox": [several[0] if len(several) == 1 else several for several in corners],
        "bbox_type": kinds[spaces.pop()],
    }
    if any(part.image for part in places):
        written["image_id"] = [part.image for part in places]
    return written


def spell(
    messages: Sequence[Message],
    grounding: Grounding | None,
    size_of: Callable[[int], Size],
    *,
    controls: Container[str] = (),
) -> Sequence[Message]:
    """The messages with their names and boxes as a family's text. Raises MessageError where it has none for them.

    size_of: (width, height) of a picture of the conversation, asked only for those that boxes are on. controls: the
    tokenizer's control tokens; marks that are among them become such.
    """
    if not any(isinstance(part, NamePart | BoxPart) for message in messages for part in message.parts):
        return messages
    if grounding is None:
        raise MessageError(
            "it has boxes, and this model's chat format has no way to write them. Leave such records out, write the "
            "coordinates as text, or give the format a `grounding`",
            kind="grounding",
        )
    return [
        replace(
            message,
            parts=joined([each for part in message.parts for each in _spelled(part, grounding, size_of, controls)]),
        )
        for message in messages
    ]


def _spelled(
    part: Part, grounding: Grounding, size_of: Callable[[int], Size], controls: Container[str]
) -> Sequence[Part]:
    if isinstance(part, NamePart):
        before, after = ("", "") if grounding.form == "bare" else grounding.ref
        if any(mark in part.text for mark in grounding.marks):
            raise MessageError(f"the name {part.text[:80]!r} contains a mark of boxes", kind="objects")
        text = f"{before}{part.text}{after}"
    elif isinstance(part, BoxPart):
        try:
            size = size_of(part.image)
            text = write([_inside(box, size) for box in part.boxes], grounding, size)
        except MessageError as error:
            raise MessageError(error.message, kind="box", fix=error.fix) from None
    else:
        return [part]
    marks = [mark for mark in grounding.marks if mark in controls]
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
    return [ControlPart(piece) if piece in marks else TextPart(piece) for piece in pieces if piece]


def _inside(box: Box, size: Size) -> Box:
    """The box without the part of a pixel by which annotations, being rounded, often leave their picture."""
    if box.space != "pixels":
        return box
    width, height = size
    return replace(
        box,
        points=tuple(
            (width if width < x <= width + 1 else x, height if height < y <= height + 1 else y) for x, y in box.points
        ),
    )


def joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one."""
    found: list[Part] = []
    for part in parts:
        if found and isinstance(part, TextPart) and isinstance(found[-1], TextPart):
            found[-1] = TextPart(found[-1].text + part.text)
        else:
            found.append(part)
    return tuple(found)
