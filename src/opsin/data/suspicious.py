"""What a loader takes and nobody meant: checks of a record or conversation that find no error, but a likely slip."""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from opsin.spec.grounding import Grounding
from opsin.spec.plan import Size
from opsin.text.grounding import read
from opsin.text.messages import IMAGE_MARK, VIDEO_MARK, Conversation, Message, TextPart

Found = tuple[str, str]
"""A kind of `data.defects` and a message."""

KNOWN_KEYS = ("image", "images", "video", "videos", "conversations", "messages", "objects")
MEDIA_KEYS = ("image", "images", "video", "videos")
ALIASES = ("img", "imgs", "picture", "pictures", "photo", "photos", "image_path", "image_paths", "image_file")
"""What people call pictures; nothing reads it."""

CONTROLS = re.compile(
    r"<\|(?!box_|quad_|object_ref_)\w{2,40}\|>|</s>|<(?:start|end)_of_turn>|<\uff5c\w[^<>]{0,40}\uff5c>|\[/?INST\]|"
    r"<</?SYS>>|</?im_(?:start|end)>"
)
"""What spells a control token of one of the usual models, where the model's own are not known."""

DAMAGED = re.compile("[\ufffd\x00-\x08\x0b\x0e-\x1f\x7f]|\u00c3[\u00a0-\u00bf]|\u00e2\u20ac[\u2122\u0153\u201c\u201d]")
"""A replacement character, control characters, and UTF-8 that was read as Latin-1 or Windows-1252."""

POINTS = Grounding(space="per_1000", form="points", quad=("<quad>", "</quad>"))
LISTS = Grounding(space="per_1000", form="lists")
BARE = re.compile(r"\[\s*(\d*\.\d+|[01])(?:\s*,\s*(?:\d*\.\d+|[01])){3}\s*\]")
"""Four numbers with decimals in brackets: a box of LLaVA's."""


def suspicious_json(text: str) -> Iterator[Found]:
    """Of a record as it is written: what plain data no longer shows."""
    found: list[Found] = []

    def constant(name: str) -> float:
        found.append(("not_finite", f"it holds the number {name}"))
        return math.nan

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            found.append(("duplicate_key", f"the key {twice[:80]!r} stands {keys.count(twice)} times in one object"))
        return result

    try:
        json.loads(text, parse_constant=constant, object_pairs_hook=pairs)
    except ValueError:
        return  # the loader says so
    yield from found


def suspicious_record(record: Any) -> Iterator[Found]:
    """Of a record as plain data: keys that nothing reads and that look like those that are read."""
    if not isinstance(record, Mapping) or not ("conversations" in record or "messages" in record):
        return
    shows = any(record.get(key) for key in MEDIA_KEYS)
    for key in map(str, record):
        if key in KNOWN_KEYS:
            continue
        near = [known for known in KNOWN_KEYS if known not in record and _similar(key, known)]
        if not near and key.lower() in ALIASES and not shows:
            near = ["image"]
        if near:
            yield "unknown_key", f"the key {key[:80]!r} is not read; did you mean {near[0]!r}?"


def shape_of(record: Any) -> str:
    """What tells the shapes of records apart."""
    if not isinstance(record, Mapping):
        return "a bare list of messages" if isinstance(record, list) else type(record).__name__
    keys = [key for key in ("conversations", "messages", "texts", "caption", "question") if record.get(key) is not None]
    return repr(keys[0]) if keys else "other keys"


def suspicious_talk(
    conversation: Conversation, sizes: Sequence[Size | None], grounding: Grounding | None, controls: Collection[str]
) -> Iterator[Found]:
    """Of a conversation. sizes: of its pictures, as far as known. controls: of the model; usual ones where empty."""
    messages = conversation.messages
    for number, message in enumerate(messages, start=1):
        text = message.text
        if not text.strip() and not any(not isinstance(part, TextPart) for part in message.parts):
            if message.role != "system":
                kind = "empty_answer" if message.role == "assistant" else "empty_question"
                yield kind, f"message {number}, the {message.role}'s, is empty"
            continue
        yield from ((kind, f"message {number}: {told}") for kind, told in _suspicious_text(text, controls))
        size = next((size for size in sizes if size is not None), None)
        if size is not None and len(sizes) == 1:
            yield from ((kind, f"message {number}: {told}") for kind, told in _boxes(text, size, grounding))
    if messages and messages[-1].role == "user" and any(message.role == "assistant" for message in messages):
        yield "no_answer", f"message {len(messages)}, the last one, is the user's: nothing is learnt from it"
    if not conversation.images and not conversation.videos:
        yield from _marks(messages)


def _marks(messages: Sequence[Message]) -> Iterator[Found]:
    """Marks in conversations that show nothing."""
    for number, message in enumerate(messages, start=1):
        mark = next((mark for mark in (IMAGE_MARK, VIDEO_MARK) if message.text.lstrip().startswith(mark)), None)
        if mark is not None:
            yield "mark_text", f"message {number} begins with {mark}, but the record lists none: it is read as text"


def _suspicious_text(text: str, controls: Collection[str]) -> Iterator[Found]:
    spelt = next((each for each in controls if each in text), None) or next(iter(CONTROLS.findall(text)), None)
    if spelt:
        yield "control_text", f"its text spells the control token {spelt[:80]!r}, which is read as ordinary text"
    damaged = DAMAGED.search(text)
    if damaged:
        yield "damaged_text", f"its text holds {damaged[0]!a} at character {damaged.start()}"


def _boxes(text: str, size: Size, grounding: Grounding | None) -> Iterator[Found]:
    """Boxes in a text that cannot be read, in the model's own format or in one that shows by its marks."""
    if grounding is not None and grounding.form != "bare":
        formats = [grounding] if any(mark in text for mark in grounding.marks) else []
    else:
        formats = [POINTS if "<box>(" in text else LISTS] if "<box>" in text and "</box>" in text else []
    for each in formats:
        yield from (("box_text", told) for told in read(text, each, size).unread)
    for found in BARE.finditer(text):
        left, top, right, bottom = (float(value) for value in found[0].strip("[]").split(","))
        if "." in found[0] and (max(left, top, right, bottom) > 1 or left > right or top > bottom):
            yield "box_text", f"{found[0]} is no box, which is left, top, right, bottom from 0 to 1"


def _similar(key: str, known: str) -> bool:
    """Whether a key is a known one with a slip: other letters' case, one letter more, less or exchanged."""
    if key.lower() == known or key.strip() == known:
        return True
    return abs(len(key) - len(known)) <= 1 and SequenceMatcher(None, key.lower(), known).ratio() >= 0.8
