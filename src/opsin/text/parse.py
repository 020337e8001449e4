"""The shapes of records that conversations are read from.

Only in training records with a list of pictures (LLaVA, ShareGPT) does the mark `<image>` in a text stand for one, with
a list of videos `<video>`, with objects `<ref-object>` and `<bbox>`; everywhere else they are ordinary text, so what
people write can never name a file.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opsin.errors import MessageError, nearest
from opsin.text.messages import (
    IMAGE_MARK,
    ROLES,
    VIDEO_MARK,
    Conversation,
    ImagePart,
    ImageSource,
    MediaPart,
    Message,
    Part,
    Standing,
    VideoPart,
    VideoSource,
    as_parts,
)
from opsin.text.objects import BOX_MARK, NAME_MARK, Objects


def parse(record: Any, *, where: str) -> Conversation:
    """Read a conversation. Raises MessageError, which begins with `where`, for anything that is not one.

    Shapes, told apart by their keys (other keys may stand beside them):
    - LLaVA: `{"image": path or list, "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}`; a text-only
      record has no `image`
    - ShareGPT: `{"messages": [{"role": "user", "content": "<image>..."}, ...], "images": [...]}`
    - HF: content is a list of `{"type": "text", "text": ...}` and `{"type": "image", "image" | "url" | "path": ...}`;
      an image part without a picture of its own takes the next of `images`
    - OpenAI: content is a text or a list with `{"type": "image_url", "image_url": {"url": ...} or text}`
    The last two also as a bare list of messages.

    Videos likewise: `"video"`, `"videos"`, `<video>`, `{"type": "video", ...}`, `{"type": "video_url", ...}`; a list in
    the place of one video holds its frames. In records of videos alone `<image>` may stand for them (LLaVA-Video).

    Boxes as in ms-swift (`text.objects`); a message's `"loss": false` keeps it from being taught, and
    `"chat_template_kwargs": {"max_pixels": ...}` bounds the record's pictures.
    """
    try:
        return read(record)
    except MessageError as error:
        raise error.within(where) from None


def read(record: Any) -> Conversation:
    """`parse`, whose errors do not say where."""
    return _Reader().read(record)


def _keys(record: Mapping[Any, Any]) -> str:
    """The keys of a record for an error, cut where a record is absurd."""
    names = [str(key)[:80] for key in record]
    return repr(names) if len(names) <= 20 else f"{names[:20]!r} and {len(names) - 20} more"


class _Shelf:
    """The pictures or the videos of one record: those it lists, and those that messages show so far."""

    def __init__(self, kind: str, mark: str) -> None:
        self.kind, self.mark = kind, mark
        self.shown: list[Any] = []
        """In the order in which messages show them."""
        self.listed: list[Any] | None = None
        """The record's own list, which marks and bare parts take from; None without such a list."""
        self.num_marks = 0
        """Marks and bare parts so far."""

    def take(self) -> int:
        """Show the next of the record's list. Where there is none, `check` says so, once for all."""
        if self.num_marks < len(self.listed or ()):
            self.shown.append((self.listed or [])[self.num_marks])
        self.num_marks += 1
        return len(self.shown) - 1

    def show(self, source: Any) -> int:
        """Show one that a message brings along."""
        self.shown.append(source)
        return len(self.shown) - 1

    def check(self) -> None:
        """Whether marks and list are equally many."""
        num_listed = len(self.listed or ())
        if self.num_marks == num_listed:
            return
        hint = (
            f"put {self.mark} where each {self.kind} belongs, usually at the front of the first question"
            if self.num_marks < num_listed
            else f"list one {self.kind} for each mark, or take the surplus marks out"
        )
        raise MessageError(
            f"{num_listed} {self.kind}(s) but {self.num_marks} {self.mark} mark(s)", kind="marks", fix=hint
        )


class _Reader:
    """Reads one record."""

    def __init__(self) -> None:
        self.images = _Shelf("picture", IMAGE_MARK)
        self.videos = _Shelf("video", VIDEO_MARK)
        self.objects: Objects | None = None
        self.marks: dict[str, type[MediaPart]] = {}
        """Pictures and videos that the texts of this record have marks for."""

    def read(self, record: Any) -> Conversation:
        if isinstance(record, Mapping):
            key = next((key for key in ("conversations", "messages") if record.get(key) is not None), None)
            if key is None:
                hint = max(
                    [nearest(str(name), ("conversations", "messages")) for name in list(record)[:20]], default=""
                )
                message = f"no 'conversations' or 'messages' among its keys {_keys(record)}{hint}"
                raise MessageError(message, kind="shape")
            self.images.listed = _listed(record, "image", _source)
            self.videos.listed = _listed(record, "video", _video)
            self.objects = Objects.read(record.get("objects"))
            turns, name = record[key], record.get("id")
            max_pixels = _max_pixels(record)
        else:
            key, turns, name, max_pixels = "messages", record, None, None
        if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
            raise MessageError(f"a list of messages is needed, not {type(turns).__name__}", kind="turns")
        if not turns:
            raise MessageError("the list of messages is empty", kind="turns")
        self._choose_marks(key, turns)
        messages = []
        for number, turn in enumerate(turns, start=1):
            try:
                messages.append(self._message(turn))
            except MessageError as error:
                raise error.within(f"message {number}") from None
        self.images.check()
        self.videos.check()
        if self.objects is not None:
            self.objects.check(len(self.images.shown))
        return Conversation(
            tuple(messages),
            tuple(self.images.shown),
            "" if name is None else str(name),
            tuple(self.videos.shown),
            max_pixels,
        )

    def _choose_marks(self, key: str, turns: Sequence[Any]) -> None:
        # A conversation of LLaVA's always speaks of pictures by marks, even where it has none to show.
        if key == "conversations" or self.images.listed is not None:
            self.marks[IMAGE_MARK] = ImagePart
        if self.videos.listed is not None:
            self.marks[VIDEO_MARK] = VideoPart
            texts = [str(turn.get("value", turn.get("content"))) for turn in turns if isinstance(turn, Mapping)]
            if self.videos.listed and not self.images.listed and not any(VIDEO_MARK in text for text in texts):
                self.marks[IMAGE_MARK] = VideoPart

    def _message(self, turn: Any) -> Message:
        if not isinstance(turn, Mapping):
            raise MessageError(f"an object with 'role' and 'content' is needed, not {type(turn).__name__}", kind="turn")
        role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
        for key in (role_key, content_key):
            if key not in turn:
                raise MessageError(f"no {key!r} among its keys {_keys(turn)}", kind="turn")
        name, content = turn[role_key], turn[content_key]
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise MessageError(f"the role {str(name)[:80]!r} is unknown", kind="role", fix=f"known: {', '.join(ROLES)}")
        loss = turn.get("loss")
        if loss is not None and (not isinstance(loss, bool) or (loss and role != "assistant")):
            raise MessageError(
                f"'loss' of a message of the {role}'s is {str(loss)[:80]!r}",
                kind="loss",
                fix="it is true or false, and only answers of the assistant's can be taught",
            )
        taught = role != "assistant" or loss is not False
        if isinstance(content, str):
            return Message(role, self._marked(content, media=True), taught)
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise MessageError(
                f"{content_key!r} is {type(content).__name__}", kind="content", fix="text or a list of parts is needed"
            )
        parts: list[Part] = []
        for number, part in enumerate(content, start=1):
            try:
                parts += self._part(part)
            except MessageError as error:
                raise error.within(f"part {number}") from None
        return Message(role, tuple(parts), taught)

    def _marked(self, text: str, *, media: bool) -> tuple[Part, ...]:
        """Text with a name or box, and with `media` a picture or video, at every mark."""
        marks = [*(self.marks if media else ()), *((NAME_MARK, BOX_MARK) if self.objects is not None else ())]
        if not marks:
            return as_parts(text)
        parts: list[Part] = []
        for piece in re.split(f"({'|'.join(marks)})", text):
            if piece not in marks:
                parts += as_parts(piece)
            elif piece in self.marks:
                parts.append(self._take(self.marks[piece], "in_text"))
            elif self.objects is not None:
                parts.append(self.objects.take_name() if piece == NAME_MARK else self.objects.take_box())
        return tuple(parts)

    def _part(self, part: Any) -> tuple[Part, ...]:
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
            return self._marked(part["text"], media=False)
        return (self._media_part(part),)

    def _media_part(self, part: Any) -> Part:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise MessageError("an object with a 'type' such as 'text' or 'image' is needed", kind="part")
        kind = part["type"]
        if kind == "text":
            raise MessageError("no text under 'text'", kind="part")
        if kind in ("image_url", "video_url"):
            value = part.get(kind)
            # What stands beside the address, such as `detail`, is a hint to servers; clients leave it out or send null.
            address = value.get("url") if isinstance(value, Mapping) else value
            if not isinstance(address, str):
                raise MessageError(f"{kind!r} needs an address: {{'url': ...}} or text", kind="part")
            if kind == "video_url":
                return VideoPart(self.videos.show(_video(address)))
            return ImagePart(self.images.show(_source(address)))
        if kind in ("image", "video"):
            given = next((part[key] for key in (kind, "url", "path", "source") if part.get(key) is not None), None)
            if given is None:
                standing: Standing = "in_text" if part.get("in_text") is True else "beside"
                return self._take(ImagePart if kind == "image" else VideoPart, standing)
            if kind == "video":
                return VideoPart(self.videos.show(_video(given)))
            return ImagePart(self.images.show(_source(given)))
        raise MessageError(
            f"the type {kind[:80]!r} is unknown", kind="part", fix="known: text, image, image_url, video, video_url"
        )

    def _take(self, kind: type[MediaPart], standing: Standing) -> MediaPart:
        """The next picture or video of the record's list."""
        return kind((self.images if kind is ImagePart else self.videos).take(), standing)


def _listed(record: Mapping[str, Any], name: str, read: Callable[[Any], Any]) -> list[Any] | None:
    """What stands under `name` or its plural; None where neither key is there."""
    keys = [key for key in (name, f"{name}s") if key in record]
    if len(keys) == 2 and record[keys[0]] and record[keys[1]]:
        raise MessageError(f"has both {keys[0]!r} and {keys[1]!r}", kind="keys", fix="keep one of them")
    given = [record[key] for key in keys if record[key] is not None and record[key] != ""]
    if not given:
        return [] if keys else None
    items = given[0] if isinstance(given[0], list | tuple) else [given[0]]
    return [read(item) for item in items]


def _max_pixels(record: Mapping[str, Any]) -> int | None:
    """Most pixels of a picture of this record; other settings for chat templates are not ours to know."""
    given = record.get("chat_template_kwargs")
    limit = given.get("max_pixels") if isinstance(given, Mapping) else None
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise MessageError(f"max_pixels is {str(limit)[:80]!r}; a whole number above 0 is needed", kind="max_pixels")
    return limit


def _source(value: Any) -> ImageSource:
    """A picture from a path, an address, bytes, a decoded picture, or an object that holds one of them."""
    if isinstance(value, Mapping):
        if value.get("type") == "base64" and isinstance(value.get("data"), str):  # Anthropic's shape
            return f"data:{value.get('media_type', 'image/jpeg')};base64,{value['data']}"
        return _source(_held(value, "picture"))
    if isinstance(value, str | bytes) and not value:
        raise MessageError("a picture's path, address or bytes are empty", kind="picture")
    # A decoded picture is recognised by what is used of it, so that reading text needs no imaging library.
    if isinstance(value, str | bytes | Path) or (hasattr(value, "convert") and hasattr(value, "size")):
        return value
    raise MessageError(
        f"a picture is a path, an address, bytes or a decoded picture, not {type(value).__name__}", kind="picture"
    )


def _held(value: Mapping[str, Any], what: str) -> Any:
    """What an object holds a picture or video in: bytes, or where they are."""
    given = [value[key] for key in ("bytes", "url", "path") if value.get(key) is not None]
    if not given or isinstance(given[0], Mapping):
        raise MessageError(f"a {what} needs 'bytes', 'url' or 'path'; its keys are {_keys(value)}", kind=what)
    return given[0]


def _video(value: Any) -> VideoSource:
    """A video from a path, an address, bytes, an object that holds one of them, or a list of frames."""
    if isinstance(value, list | tuple):
        if not value:
            raise MessageError("a video's list of frames is empty", kind="video")
        return tuple(_source(frame) for frame in value)
    if isinstance(value, Mapping):
        return _video(_held(value, "video"))
    if isinstance(value, str | bytes) and not value:
        raise MessageError("a video's path, address or bytes are empty", kind="video")
    if isinstance(value, str | bytes | Path):
        return value
    raise MessageError(
        f"a video is a path, an address, bytes or a list of frames, not {type(value).__name__}", kind="video"
    )
