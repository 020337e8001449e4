"""Conversations before tokenising, and the shapes of records they are read from.

A picture or video is always a part of its own. Only in training records with a list of pictures (LLaVA, ShareGPT) does
the mark `<image>` in a text stand for one, and with a list of videos `<video>`; everywhere else they are ordinary text,
so what people write can never name a file.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from opsin.errors import MessageError, nearest

if TYPE_CHECKING:
    from PIL import Image

Role = Literal["system", "user", "assistant"]
ImageSource = Union[str, Path, bytes, "Image.Image"]
"""Where a picture comes from: a path, a `data:` or web address as text, encoded bytes, or a decoded picture."""

VideoSource = str | Path | bytes | tuple[ImageSource, ...]
"""Where a video comes from: a path, a `data:` or web address as text, an encoded file, or its frames as pictures."""

Standing = Literal["beside", "in_text"]
"""How a picture came into its message: handed over beside the text, or by a mark in it. Formats write something between
a picture and the text beside it; text with marks says itself what stands around them."""

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""What records call the three roles."""


@dataclass(frozen=True)
class TextPart:
    """Text of a message. Raises MessageError for text that no tokenizer can read."""

    text: str

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            half = self.text[error.start]
            raise MessageError(
                f"text is not valid Unicode: half a surrogate pair, {half!a}, at character {error.start}"
            ) from None


@dataclass(frozen=True)
class ImagePart:
    """A picture of a message."""

    index: int
    """Which of `Conversation.images`, from 0."""
    standing: Standing = field(default="beside", compare=False)


@dataclass(frozen=True)
class VideoPart:
    """A video of a message."""

    index: int
    """Which of `Conversation.videos`, from 0."""
    standing: Standing = field(default="beside", compare=False)


MediaPart = ImagePart | VideoPart
Part = TextPart | MediaPart


@dataclass(frozen=True)
class Message:
    """What one side says in one turn."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All text of the message."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[int, ...]:
        """Indices of the pictures of the message."""
        return tuple(part.index for part in self.parts if isinstance(part, ImagePart))

    @property
    def videos(self) -> tuple[int, ...]:
        """Indices of the videos of the message."""
        return tuple(part.index for part in self.parts if isinstance(part, VideoPart))


@dataclass(frozen=True)
class Conversation:
    """Messages and what they show. Raises MessageError unless every picture and video is shown exactly once."""

    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    id: str = ""
    videos: tuple[VideoSource, ...] = ()

    def __post_init__(self) -> None:
        _check_shown("picture", [index for message in self.messages for index in message.images], len(self.images))
        _check_shown("video", [index for message in self.messages for index in message.videos], len(self.videos))


def _check_shown(kind: str, indices: Sequence[int], count: int) -> None:
    shown = Counter(indices)
    for index, times in sorted(shown.items()):
        if not 0 <= index < count:
            raise MessageError(f"a message shows {kind} {index}, but there are {count}, counted from 0")
        if times > 1:
            raise MessageError(f"{kind} {index} is shown {times} times; list it once for each showing")
    for index in range(count):
        if index not in shown:
            raise MessageError(f"{kind} {index} of {count}, counted from 0, is shown in no message")


def system(text: str) -> Message:
    """A system message."""
    return Message("system", _text(text))


def user(text: str, *, images: Sequence[int] = (), videos: Sequence[int] = ()) -> Message:
    """A user message: pictures and videos, by index, then text."""
    return Message("user", (*map(ImagePart, images), *map(VideoPart, videos), *_text(text)))


def assistant(text: str) -> Message:
    """An answer."""
    return Message("assistant", _text(text))


def ask(question: str, *images: ImageSource, videos: Sequence[VideoSource] = ()) -> Conversation:
    """One question about some pictures and videos."""
    message = user(question, images=range(len(images)), videos=range(len(videos)))
    return Conversation((message,), images, videos=tuple(videos))


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
    """
    try:
        return _Reader().read(record)
    except MessageError as error:
        raise MessageError(f"{where}: {error}") from None


def _text(text: str) -> tuple[Part, ...]:
    return (TextPart(text),) if text else ()


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
        raise MessageError(f"{num_listed} {self.kind}(s) but {self.num_marks} {self.mark} mark(s); {hint}")


class _Reader:
    """Reads one record."""

    def __init__(self) -> None:
        self.images = _Shelf("picture", IMAGE_MARK)
        self.videos = _Shelf("video", VIDEO_MARK)
        self.marks: dict[str, type[MediaPart]] = {}
        """What the texts of this record have marks for."""

    def read(self, record: Any) -> Conversation:
        if isinstance(record, Mapping):
            key = next((key for key in ("conversations", "messages") if record.get(key) is not None), None)
            if key is None:
                hint = max(
                    [nearest(str(name), ("conversations", "messages")) for name in list(record)[:20]], default=""
                )
                raise MessageError(f"no 'conversations' or 'messages' among its keys {_keys(record)}{hint}")
            self.images.listed = _listed(record, "image", _source)
            self.videos.listed = _listed(record, "video", _video)
            turns, name = record[key], record.get("id")
        else:
            key, turns, name = "messages", record, None
        if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
            raise MessageError(f"a list of messages is needed, not {type(turns).__name__}")
        if not turns:
            raise MessageError("the list of messages is empty")
        self._choose_marks(key, turns)
        messages = []
        for number, turn in enumerate(turns, start=1):
            try:
                messages.append(self._message(turn))
            except MessageError as error:
                raise MessageError(f"message {number}: {error}") from None
        self.images.check()
        self.videos.check()
        return Conversation(
            tuple(messages),
            tuple(self.images.shown),
            "" if name is None else str(name),
            tuple(self.videos.shown),
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
            raise MessageError(f"an object with 'role' and 'content' is needed, not {type(turn).__name__}")
        role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
        for key in (role_key, content_key):
            if key not in turn:
                raise MessageError(f"no {key!r} among its keys {_keys(turn)}")
        name, content = turn[role_key], turn[content_key]
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            raise MessageError(f"the role {str(name)[:80]!r} is unknown; known: {', '.join(ROLES)}")
        if isinstance(content, str):
            return Message(role, self._marked(content))
        if not isinstance(content, Sequence) or isinstance(content, bytes):
            raise MessageError(f"{content_key!r} is {type(content).__name__}; text or a list of parts is needed")
        parts = []
        for number, part in enumerate(content, start=1):
            try:
                parts.append(self._part(part))
            except MessageError as error:
                raise MessageError(f"part {number}: {error}") from None
        return Message(role, tuple(part for part in parts if part != TextPart("")))

    def _marked(self, text: str) -> tuple[Part, ...]:
        """Text with a picture or video at every mark."""
        if not self.marks:
            return _text(text)
        parts: list[Part] = []
        for piece in re.split(f"({'|'.join(self.marks)})", text):
            parts += [self._take(self.marks[piece], "in_text")] if piece in self.marks else _text(piece)
        return tuple(parts)

    def _part(self, part: Any) -> Part:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise MessageError("an object with a 'type' such as 'text' or 'image' is needed")
        kind = part["type"]
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise MessageError("no text under 'text'")
            return TextPart(part["text"])
        if kind in ("image_url", "video_url"):
            value = part.get(kind)
            # What stands beside the address, such as `detail`, is a hint to servers; clients leave it out or send null.
            address = value.get("url") if isinstance(value, Mapping) else value
            if not isinstance(address, str):
                raise MessageError(f"{kind!r} needs an address: {{'url': ...}} or text")
            if kind == "video_url":
                return VideoPart(self.videos.show(_video(address)))
            return ImagePart(self.images.show(_source(address)))
        if kind in ("image", "video"):
            given = next((part[key] for key in (kind, "url", "path", "source") if part.get(key) is not None), None)
            if given is None:
                return self._take(ImagePart if kind == "image" else VideoPart, "beside")
            if kind == "video":
                return VideoPart(self.videos.show(_video(given)))
            return ImagePart(self.images.show(_source(given)))
        raise MessageError(f"the type {kind[:80]!r} is unknown; known: text, image, image_url, video, video_url")

    def _take(self, kind: type[MediaPart], standing: Standing) -> MediaPart:
        """The next picture or video of the record's list."""
        return kind((self.images if kind is ImagePart else self.videos).take(), standing)


def _listed(record: Mapping[str, Any], name: str, read: Callable[[Any], Any]) -> list[Any] | None:
    """What stands under `name` or its plural; None where neither key is there."""
    keys = [key for key in (name, f"{name}s") if key in record]
    if len(keys) == 2 and record[keys[0]] and record[keys[1]]:
        raise MessageError(f"has both {keys[0]!r} and {keys[1]!r}; keep one of them")
    given = [record[key] for key in keys if record[key] is not None and record[key] != ""]
    if not given:
        return [] if keys else None
    items = given[0] if isinstance(given[0], list | tuple) else [given[0]]
    return [read(item) for item in items]


def _source(value: Any) -> ImageSource:
    """A picture from a path, an address, bytes, a decoded picture, or an object that holds one of them."""
    if isinstance(value, Mapping):
        if value.get("type") == "base64" and isinstance(value.get("data"), str):  # Anthropic's shape
            return f"data:{value.get('media_type', 'image/jpeg')};base64,{value['data']}"
        given = [value[key] for key in ("bytes", "url", "path") if value.get(key) is not None]
        if not given or isinstance(given[0], Mapping):
            raise MessageError(f"a picture needs 'bytes', 'url' or 'path'; its keys are {_keys(value)}")
        return _source(given[0])
    if isinstance(value, str | bytes) and not value:
        raise MessageError("a picture's path, address or bytes are empty")
    # A decoded picture is recognised by what is used of it, so that reading text needs no imaging library.
    if isinstance(value, str | bytes | Path) or (hasattr(value, "convert") and hasattr(value, "size")):
        return value
    raise MessageError(f"a picture is a path, an address, bytes or a decoded picture, not {type(value).__name__}")


def _video(value: Any) -> VideoSource:
    """A video from a path, an address, bytes, an object that holds one of them, or a list of frames."""
    if isinstance(value, list | tuple):
        if not value:
            raise MessageError("a video's list of frames is empty")
        return tuple(_source(frame) for frame in value)
    if isinstance(value, Mapping):
        given = [value[key] for key in ("bytes", "url", "path") if value.get(key) is not None]
        if not given or isinstance(given[0], Mapping):
            raise MessageError(f"a video needs 'bytes', 'url' or 'path'; its keys are {_keys(value)}")
        return _video(given[0])
    if isinstance(value, str | bytes) and not value:
        raise MessageError("a video's path, address or bytes are empty")
    if isinstance(value, str | bytes | Path):
        return value
    raise MessageError(f"a video is a path, an address, bytes or a list of frames, not {type(value).__name__}")
