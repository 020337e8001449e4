"""Pictures and boxes that Qwen-VL's and InternVL's training data write into the text itself, as lists beside it.

    Qwen-VL     Picture 1: <img>a.jpg</img>\\n<ref>a dog</ref><box>(12,34),(567,890)</box>
    InternVL    <ref>a dog</ref><box>[[12, 34, 567, 890]]</box>

Their numbers count thousandths of each side. As objects they are written again in the words of whichever family trains.
Anything that is not exactly of this form stays the text that it is: `<ref>` alone is no box.
"""

import re
from collections.abc import Mapping
from typing import Any

from opsin.errors import MessageError
from opsin.text.objects import BOX_MARK, NAME_MARK

_NUMBER = r"\s*(\d{1,4}(?:\.\d+)?)\s*"
_POINT = rf"\({_NUMBER},{_NUMBER}\)"
_CORNERS = rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
_BOX = re.compile(
    rf"<box>\s*{_POINT}\s*,?\s*{_POINT}\s*</box>"
    rf"|<quad>\s*{_POINT}\s*,?\s*{_POINT}\s*,?\s*{_POINT}\s*,?\s*{_POINT}\s*</quad>"
    rf"|<box>\s*\[\s*({_CORNERS}(?:\s*,\s*{_CORNERS})*)\s*\]\s*</box>"
)
_REF = re.compile(r"<ref>(.*?)</ref>", re.DOTALL)
_PIECE = re.compile(rf"{_REF.pattern}|(?P<box>{_BOX.pattern})", re.DOTALL)
_PICTURE = re.compile(r"<img>(.*?)</img>", re.DOTALL)


def with_objects(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record with the pictures and boxes of its texts in `images` and `objects`; itself where it has none."""
    key = "conversations" if record.get("conversations") is not None else "messages"
    turns = record[key]
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        return record
    texts = [turn.get("value", turn.get("content")) for turn in turns]
    # Most data has no such texts, and looking for the marks is quick.
    shows = not any(record.get(name) for name in ("image", "images")) and any(
        isinstance(text, str) and "</img>" in text for text in texts
    )
    boxed = not record.get("objects") and any(
        isinstance(text, str) and ("</box>" in text or "</quad>" in text) and _BOX.search(text) for text in texts
    )
    if not shows and not boxed:
        return record
    images: list[str] = []
    objects: dict[str, Any] = {"ref": [], "bbox": [], "bbox_type": "norm1"}
    written = []
    for turn, text in zip(turns, texts, strict=True):
        if isinstance(text, str):
            if shows:
                text = _take_pictures(text, images)
            if boxed:
                text = _take_boxes(text, objects)
            turn = {**turn, ("value" if "value" in turn else "content"): text}
        written.append(turn)
    changed = {**record, key: written}
    if shows:
        changed = {name: value for name, value in changed.items() if name != "image"} | {"images": images}
    return {**changed, "objects": objects} if boxed else changed


def _take_pictures(text: str, images: list[str]) -> str:
    if "<image>" in text:
        raise MessageError(
            "has both <img>...</img> and <image>", kind="marks", fix="name pictures in one of the two ways"
        )

    def take(found: re.Match[str]) -> str:
        images.append(found[1].strip())
        return "<image>"

    return _PICTURE.sub(take, text)


def _take_boxes(text: str, objects: dict[str, Any]) -> str:
    if BOX_MARK in text or NAME_MARK in text:
        raise MessageError(f"has both <box>...</box> and {BOX_MARK} or {NAME_MARK}", kind="marks")

    def take(found: re.Match[str]) -> str:
        if found["box"] is None:
            objects["ref"].append(found[1])
            return NAME_MARK
        boxes = [_corners(found["box"])] if "[" not in found["box"] else []
        boxes += [_corners(each) for each in re.findall(r"\[[^\[\]]*\]", found["box"])]
        objects["bbox"].append(boxes[0] if len(boxes) == 1 else boxes)
        return BOX_MARK

    return _PIECE.sub(take, text)


def _corners(text: str) -> list[float]:
    values = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]
    if max(values) > 1000:
        raise MessageError(
            f"the box {text[:80]} has a coordinate above 1000", kind="box", fix="boxes in texts count thousandths"
        )
    return [value / 1000 for value in values]
