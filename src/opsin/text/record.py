"""Conversations as records of the neutral form: messages, parallel lists of pictures and videos, objects."""

from collections.abc import Callable
from typing import Any

from opsin.errors import MessageError
from opsin.text.messages import (
    IMAGE_MARK,
    VIDEO_MARK,
    BoxPart,
    Conversation,
    ImagePart,
    ImageSource,
    Message,
    NamePart,
    TextPart,
    VideoPart,
    VideoSource,
)
from opsin.text.objects import BOX_MARK, NAME_MARK, write_objects

_MARKS = {ImagePart: IMAGE_MARK, VideoPart: VIDEO_MARK, NamePart: NAME_MARK, BoxPart: BOX_MARK}


def to_record(
    conversation: Conversation, *, place: Callable[[ImageSource | VideoSource], Any] = lambda source: source
) -> dict[str, Any]:
    """A record that `text.parse.parse` reads as the same conversation. Raises MessageError where none can say it.

    place: what stands for a picture or video, such as its path as text; JSON has no bytes.
    """
    objects = write_objects(conversation)
    marks = {part: mark for part, mark in _MARKS.items() if part in (ImagePart, VideoPart) or objects is not None}
    record: dict[str, Any] = {"id": conversation.id} if conversation.id else {}
    record["messages"] = [_message(message, conversation, marks) for message in conversation.messages]
    if conversation.images:
        record["images"] = [place(image) for image in conversation.images]
    if conversation.videos:
        record["videos"] = [place(video) for video in conversation.videos]
    if objects is not None:
        record["objects"] = objects
    if conversation.max_pixels is not None:
        record["chat_template_kwargs"] = {"max_pixels": conversation.max_pixels}
    return record


def _message(message: Message, conversation: Conversation, marks: dict[type, str]) -> dict[str, Any]:
    # In records of videos alone `<image>` may stand for them, so any mark in a text could be taken for a place.
    shown = (IMAGE_MARK, VIDEO_MARK) if conversation.images or conversation.videos else ()
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    if any(mark in text for text in texts for kind, mark in marks.items() if kind in (NamePart, BoxPart)):
        raise MessageError(f"a text holds {NAME_MARK} or {BOX_MARK}, which stand for its names and boxes", kind="marks")
    beside = any(isinstance(part, ImagePart | VideoPart) and part.standing == "beside" for part in message.parts)
    neighbours = any(
        isinstance(one, TextPart) and isinstance(other, TextPart)
        for one, other in zip(message.parts, message.parts[1:], strict=False)
    )
    content: Any = "".join(part.text if isinstance(part, TextPart) else marks[type(part)] for part in message.parts)
    if beside or neighbours or any(mark in text for text in texts for mark in shown):
        content = [_part(part, marks) for part in message.parts]
    return {"role": message.role, "content": content, **({} if message.loss else {"loss": False})}


def _part(part: Any, marks: dict[type, str]) -> dict[str, Any]:
    if isinstance(part, ImagePart | VideoPart):
        in_text = {"in_text": True} if part.standing == "in_text" else {}
        return {"type": "image" if isinstance(part, ImagePart) else "video", **in_text}
    return {"type": "text", "text": part.text if isinstance(part, TextPart) else marks[type(part)]}
