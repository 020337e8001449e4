"""Conversations before tokenising, and the shapes of records they are read from.

A picture is always a part of its own. Only in training records with a list of pictures (LLaVA, ShareGPT) does the mark
`<image>` in a text stand for one; everywhere else it is ordinary text, so what people write can never name a file.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from opsin.errors import MessageError, nearest

if TYPE_CHECKING:
    from PIL import Image

Role = Literal["system", "user", "assistant"]
ImageSource = Union[str, Path, bytes, "Image.Image"]
"""Where a picture comes from: a path, a `data:` or web address as text, encoded bytes, or a decoded picture."""

IMAGE_MARK = "<image>"
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


Part = TextPart | ImagePart


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


@dataclass(frozen=True)
class Conversation:
    """Messages and the pictures they show. Raises MessageError unless every picture is shown exactly once."""

    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        shown = Counter(index for message in self.messages for index in message.images)
        for index, times in sorted(shown.items()):
            if not 0 <= index < len(self.images):
                raise MessageError(f"a message shows picture {index}, but there are {len(self.images)}, counted from 0")
            if times > 1:
                raise MessageError(f"picture {index} is shown {times} times; list it once for each showing")
        for index in range(len(self.images)):
            if index not in shown:
                raise MessageError(f"picture {index} of {len(self.images)}, counted from 0, is shown in no message")


def system(text: str) -> Message:
    """A system message."""
    return Message("system", _text(text))


def user(text: str, *, images: Sequence[int] = ()) -> Message:
    """A user message: pictures, by index, then text."""
    return Message("user", (*map(ImagePart, images), *_text(text)))


def assistant(text: str) -> Message:
    """An answer."""
    return Message("assistant", _text(text))


def ask(question: str, *images: ImageSource) -> Conversation:
    """One question about some pictures."""
    return Conversation((user(question, images=range(len(images))),), images)


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


class _Reader:
    """Reads one record, collecting pictures in the order in which messages show them."""

    def __init__(self) -> None:
        self.images: list[ImageSource] = []
        """Pictures shown so far."""
        self.column: list[ImageSource] | None = None
        """The record's own list of pictures, which marks and bare image parts take from; None without such a list."""
        self.num_marks = 0
        """Marks and bare image parts so far."""

    def read(self, record: Any) -> Conversation:
        if isinstance(record, Mapping):
            key = next((key for key in ("conversations", "messages") if record.get(key) is not None), None)
            if key is None:
                hint = max(
                    [nearest(str(name), ("conversations", "messages")) for name in list(record)[:20]], default=""
                )
                raise MessageError(f"no 'conversations' or 'messages' among its keys {_keys(record)}{hint}")
            for video in ("video", "videos"):
                if record.get(video):
                    raise MessageError(f"has {video!r}; videos cannot be read, only pictures")
            self.column = self._read_column(record)
            # A conversation of LLaVA's always speaks of pictures by marks, even where it has none to show.
            has_marks = key == "conversations" or self.column is not None
            turns, name = record[key], record.get("id")
        else:
            has_marks, turns, name = False, record, None
        if not isinstance(turns, Sequence) or isinstance(turns, str | bytes):
            raise MessageError(f"a list of messages is needed, not {type(turns).__name__}")
        if not turns:
            raise MessageError("the list of messages is empty")
        messages = []
        for number, turn in enumerate(turns, start=1):
            try:
                messages.append(self._message(turn, has_marks=has_marks))
            except MessageError as error:
                raise MessageError(f"message {number}: {error}") from None
        self._check_counts()
        return Conversation(tuple(messages), tuple(self.images), "" if name is None else str(name))

    def _read_column(self, record: Mapping[str, Any]) -> list[ImageSource] | None:
        keys = [key for key in ("image", "images") if key in record]
        if len(keys) == 2 and record["image"] and record["images"]:
            raise MessageError("has both 'image' and 'images'; keep one of them")
        given = [record[key] for key in keys if record[key] is not None and record[key] != ""]
        if not given:
            return [] if keys else None
        items = given[0] if isinstance(given[0], list | tuple) else [given[0]]
        return [_source(item) for item in items]

    def _message(self, turn: Any, *, has_marks: bool) -> Message:
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
            return Message(role, self._marked(content) if has_marks else _text(content))
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
        """Text with a picture at every mark."""
        first, *others = text.split(IMAGE_MARK)
        parts: list[Part] = [*_text(first)]
        for other in others:
            parts += [self._take(), *_text(other)]
        return tuple(parts)

    def _part(self, part: Any) -> Part:
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise MessageError("an object with a 'type' such as 'text' or 'image' is needed")
        kind = part["type"]
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise MessageError("no text under 'text'")
            return TextPart(part["text"])
        if kind == "image_url":
            value = part.get("image_url")
            # What stands beside the address, such as `detail`, is a hint to servers; clients leave it out or send null.
            address = value.get("url") if isinstance(value, Mapping) else value
            if not isinstance(address, str):
                raise MessageError("'image_url' needs an address: {'url': ...} or text")
            return self._show(_source(address))
        if kind == "image":
            given = next((part[key] for key in ("image", "url", "path", "source") if part.get(key) is not None), None)
            return self._take() if given is None else self._show(_source(given))
        raise MessageError(f"the type {kind[:80]!r} is unknown; known: text, image, image_url")

    def _take(self) -> ImagePart:
        """The next picture of the record's list. Where there is none, `_check_counts` says so, once for all."""
        column = self.column or []
        if self.num_marks < len(column):
            self.images.append(column[self.num_marks])
        self.num_marks += 1
        return ImagePart(len(self.images) - 1)

    def _show(self, source: ImageSource) -> ImagePart:
        self.images.append(source)
        return ImagePart(len(self.images) - 1)

    def _check_counts(self) -> None:
        num_given = len(self.column or ())
        if self.num_marks == num_given:
            return
        hint = (
            f"put {IMAGE_MARK} where each picture belongs, usually at the front of the first question"
            if self.num_marks < num_given
            else "list one picture for each mark, or take the surplus marks out"
        )
        raise MessageError(f"{num_given} picture(s) but {self.num_marks} {IMAGE_MARK} mark(s); {hint}")


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
