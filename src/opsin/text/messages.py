"""Conversations before tokenising: messages of text, pictures, videos, and names and boxes of what pictures show."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Union

from opsin.errors import MessageError
from opsin.text.grounding import Box

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
                f"text is not valid Unicode: half a surrogate pair, {half!a}, at character {error.start}", kind="text"
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


@dataclass(frozen=True)
class NamePart:
    """The name of what a box shows, which many formats set apart from other text (`<ref>a red car</ref>`)."""

    text: str


@dataclass(frozen=True)
class BoxPart:
    """Boxes on a picture, written as the model's family writes them (`text.objects.spell`)."""

    boxes: tuple[Box, ...]
    image: int
    """Which of `Conversation.images`, from 0."""


@dataclass(frozen=True)
class ControlPart:
    """A control token around a name or box. Only `text.objects.spell` makes these: what people write stays text."""

    token: str


MediaPart = ImagePart | VideoPart
Part = TextPart | MediaPart | NamePart | BoxPart | ControlPart


@dataclass(frozen=True)
class Message:
    """What one side says in one turn."""

    role: Role
    parts: tuple[Part, ...]
    loss: bool = True
    """Whether training teaches it, where it is the assistant's."""

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
    max_pixels: int | None = None
    """Most pixels that one of its pictures is shown at, for models that read pictures at their own size."""

    def __post_init__(self) -> None:
        _check_shown("picture", [index for message in self.messages for index in message.images], len(self.images))
        _check_shown("video", [index for message in self.messages for index in message.videos], len(self.videos))
        for part in (part for message in self.messages for part in message.parts if isinstance(part, BoxPart)):
            if not 0 <= part.image < len(self.images):
                raise MessageError(
                    f"a box is on picture {part.image}, but there are {len(self.images)}, counted from 0",
                    kind="objects",
                )


def _check_shown(kind: str, indices: Sequence[int], count: int) -> None:
    if sorted(indices) == list(range(count)):
        return
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
    return Message("system", as_parts(text))


def user(text: str, *, images: Sequence[int] = (), videos: Sequence[int] = ()) -> Message:
    """A user message: pictures and videos, by index, then text."""
    return Message("user", (*map(ImagePart, images), *map(VideoPart, videos), *as_parts(text)))


def assistant(text: str) -> Message:
    """An answer."""
    return Message("assistant", as_parts(text))


def ask(question: str, *images: ImageSource, videos: Sequence[VideoSource] = ()) -> Conversation:
    """One question about some pictures and videos."""
    message = user(question, images=range(len(images)), videos=range(len(videos)))
    return Conversation((message,), images, videos=tuple(videos))


def as_parts(text: str) -> tuple[Part, ...]:
    """A text as the parts of a message: one, or none where it is empty."""
    return (TextPart(text),) if text else ()
