"""Long conversations cut to a window: old turns are left out whole, the newest stay."""

from collections.abc import Sequence
from dataclasses import replace

from opsin.spec.chat import ChatFormat
from opsin.text.messages import BoxPart, Conversation, ImagePart, Message, Part, VideoPart
from opsin.text.render import render
from opsin.text.tokenise import IMAGE, tokenise
from opsin.text.tokenizer import Tokenizer

WINDOW = 6144
"""Qwen-VL-Chat's `max_window_size` (generation_config.json)."""


def newest_turns(
    chat: ChatFormat,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    slots_per_picture: int,
    max_tokens: int = WINDOW,
) -> list[Message]:
    """The system text, as many of the newest exchanges as fit below `max_tokens` with it, and the last question.

    As the authors' make_context counts: the question itself is not part of the sum, and the first exchange that does
    not fit ends the search. An exchange is a question and its answer.
    """

    def count(turns: Sequence[Message]) -> int:
        ids = tokenise(render(chat, [*head, *turns], mode="train"), tokenizer).ids
        return len(ids) + ids.count(IMAGE) * (slots_per_picture - 1)

    head = [message for message in messages[:1] if message.role == "system"]
    *history, question = messages[len(head) :]
    kept: list[Message] = []
    line_break = 1  # the authors count it before each turn, the format writes it after: one less at the system's end
    while len(history) >= 2 and count([*history[-2:], *kept]) - line_break < max_tokens:
        kept = [*history[-2:], *kept]
        history = history[:-2]
    return [*head, *kept, question]


def only(conversation: Conversation, messages: Sequence[Message]) -> tuple[Conversation, list[int], list[int]]:
    """A conversation with some of its messages, and what these show; which pictures and which videos are left."""
    images = [index for message in messages for index in message.images]
    videos = [index for message in messages for index in message.videos]

    def numbered(part: Part) -> Part:
        if isinstance(part, ImagePart):
            return replace(part, index=images.index(part.index))
        if isinstance(part, VideoPart):
            return replace(part, index=videos.index(part.index))
        return replace(part, image=images.index(part.image)) if isinstance(part, BoxPart) else part

    left = replace(
        conversation,
        messages=tuple(replace(each, parts=tuple(map(numbered, each.parts))) for each in messages),
        images=tuple(conversation.images[index] for index in images),
        videos=tuple(conversation.videos[index] for index in videos),
    )
    return left, images, videos
