"""From messages to spans: the one place that knows how a conversation is written, for training and for inference."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from opsin.errors import MessageError
from opsin.spec.chat import Break, ChatFormat, Pieces, Text
from opsin.text.messages import ControlPart, ImagePart, MediaPart, Message, Part, TextPart, VideoPart
from opsin.text.objects import joined

Source = Literal["template", "user", "assistant", "system"]
Mode = Literal["prompt", "train"]


@dataclass(frozen=True)
class TextSpan:
    """A stretch of text. Neighbouring text spans are tokenised together, as one text."""

    text: str
    supervised: bool
    source: Source
    is_closed: bool = False
    """Whether the text after it is tokenised apart from it."""


@dataclass(frozen=True)
class ControlSpan:
    """One control token. Only templates make these: what people write stays text."""

    token: str
    supervised: bool
    source: Literal["begin", "template", "decoder"] = "template"
    """`begin`: stands where the tokenizer adds its own begin-of-sequence token, so that a text starts after it.
    `decoder`: from here on the tokens are a decoder's, those before it an encoder's."""


@dataclass(frozen=True)
class ImageSpan:
    """One picture or video: the place of its slots."""

    index: int
    """Which of the conversation's pictures, or of its videos."""
    kind: Literal["image", "video"] = "image"


Span = TextSpan | ControlSpan | ImageSpan


def render(chat: ChatFormat, messages: Sequence[Message], *, mode: Mode) -> list[Span]:
    """Write a conversation down as `chat` says.

    `prompt` ends where the answer to the last user turn begins; `train` writes every turn. The spans of a prompt are a
    prefix of the training spans of the same conversation with its answer. Raises MessageError for a conversation that
    the format cannot say.
    """
    system, turns = _arrange(chat, messages, mode)
    if chat.outer_space == "cut":
        turns = [replace(message, parts=_cut(message.parts)) for message in turns]
    head: list[Span] = []
    if system:
        head = [*_pieces(chat.system_prefix), TextSpan(system, False, "system"), *_pieces(chat.system_suffix)]
    numbers = _numbers(turns)
    opening, turns = _take_opening(chat, turns)
    spans = [*_content(chat, opening, numbers), *_pieces(chat.begin, source="begin")]
    if chat.system_place == "before":
        spans += head
        head = []
    for role, text in chat.example:
        spans += _example(chat, role, text)
    seen_user = False
    for place, message in enumerate(turns):
        if message.role == "assistant":
            written = bool(chat.decoder_start) and mode == "train" and place == len(turns) - 1
            spans += _decoder_turn(chat, message) if written else _assistant_turn(chat, message)
            continue
        # Where a question's first mark ends the answer before it, it is taught with that answer.
        follows = turns[place - 1].loss if place else True
        spans += _user_turn(
            chat, message, numbers, is_first=not seen_user, head=[] if seen_user else head, teach=follows
        )
        seen_user = True
    if mode == "prompt":
        return spans + (
            _decoder_turn(chat, Message("assistant", ())) if chat.decoder_start else _pieces(chat.assistant.prefix)
        )
    return spans + _pieces(chat.end, teach=turns[-1].loss)


def check_order(messages: Sequence[Message]) -> None:
    """Raise MessageError for what no format can say: who speaks first, who shows pictures."""
    for number, message in enumerate(messages, start=1):
        if message.role == "system" and number > 1:
            raise MessageError(f"message {number} is a system message; only the first message can be one", kind="order")
        if message.role != "user" and (message.images or message.videos):
            kind = "picture" if message.images else "video"
            raise MessageError(
                f"message {number} ({message.role}) holds a {kind}; only user messages can hold one", kind="order"
            )
    if not any(message.role == "user" for message in messages):
        raise MessageError(
            f"no user message among {len(messages)} message(s); a conversation needs at least one", kind="order"
        )


def _arrange(chat: ChatFormat, messages: Sequence[Message], mode: Mode) -> tuple[str, list[Message]]:
    """The system text and the turns to write, checked. Errors number messages from 1."""
    check_order(messages)
    if mode == "prompt" and messages[-1].role != "user":
        raise MessageError(
            f"message {len(messages)}, the last one, is the assistant's, so there is nothing to answer; "
            "end with a user message"
        )
    if mode == "train" and chat.decoder_start and messages[-1].role != "assistant":
        raise MessageError(
            f"message {len(messages)}, the last one, is no answer of the assistant's, which is what format "
            f"{chat.name!r} teaches; end with one",
            kind="order",
        )
    system, turns, first = chat.system, list(messages), 1
    if turns[0].role == "system":
        system, turns, first = turns[0].text, turns[1:], 2
    if chat.turns == "alternate":
        if turns[0].role == "assistant":
            turns, first = turns[1:], first + 1
        for place, message in enumerate(turns):
            expected = "assistant" if place % 2 else "user"
            if message.role != expected:
                raise MessageError(
                    f"message {first + place} is the {message.role}'s, and format {chat.name!r} needs the {expected}'s "
                    f"there: user and assistant take turns; join neighbouring {message.role} messages into one",
                    kind="order",
                )
    if chat.system_place == "in_first_user" and system and not turns[0].parts:
        raise MessageError(
            f"the first user message is empty; format {chat.name!r} writes the system text inside it",
            kind="order",
        )
    return system, turns


def _cut(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts without white space at their two ends; what stands beside a picture stays."""
    cut = list(parts)
    if cut and isinstance(cut[0], TextPart):
        cut[0] = TextPart(cut[0].text.lstrip())
    if cut and isinstance(cut[-1], TextPart):
        cut[-1] = TextPart(cut[-1].text.rstrip())
    return tuple(part for part in cut if part != TextPart(""))


def _take_opening(chat: ChatFormat, turns: list[Message]) -> tuple[Message, list[Message]]:
    """What stands before everything, and the turns without it: the pictures of the first turn, where formats say so."""
    first, *others = turns
    if chat.markup.placement != "first" or first.role != "user":
        return Message("user", ()), turns
    pictures = tuple(part for part in first.parts if isinstance(part, MediaPart))
    text = first.text.strip() if pictures else first.text
    return Message("user", pictures), [Message("user", (TextPart(text),) if text else ()), *others]


def _pieces(pieces: Pieces, *, source: Literal["begin", "template"] = "template", teach: bool = True) -> list[Span]:
    spans: list[Span] = []
    for piece in pieces:
        if isinstance(piece, Break):
            last = spans.pop()
            assert isinstance(last, TextSpan), "a break stands after a text"
            spans.append(replace(last, is_closed=True))
            continue
        supervised = piece.supervised and teach
        if isinstance(piece, Text):
            spans.append(TextSpan(piece.text, supervised, "template"))
        else:
            spans.append(ControlSpan(piece.token, supervised, source))
    return spans


def _numbers(turns: Sequence[Message]) -> dict[MediaPart, int]:
    """For each picture and video, how many of its kind the conversation has shown with it."""
    shown = [part for message in turns for part in message.parts if isinstance(part, MediaPart)]
    return {
        part: number
        for kind in (ImagePart, VideoPart)
        for number, part in enumerate((part for part in shown if isinstance(part, kind)), start=1)
    }


def _user_turn(
    chat: ChatFormat, message: Message, numbers: dict[MediaPart, int], *, is_first: bool, head: list[Span], teach: bool
) -> list[Span]:
    """head: the system text, for formats that write it inside the first user turn. teach: whether marks are taught."""
    turn = chat.user
    content = _content(chat, message, numbers)
    if not content and chat.empty_turn == "prefix":
        return _pieces(turn.prefix, teach=teach)
    between = () if is_first else chat.between
    before = [span for part in (between, turn.prefix, turn.lead) for span in _pieces(part, teach=teach)]
    return [*before, *head, *content, *_pieces(turn.suffix)]


def _content(chat: ChatFormat, message: Message, numbers: dict[MediaPart, int]) -> list[Span]:
    """The pictures and the text of a user turn, in the order they are written."""
    parts = [part for part in message.parts if chat.user.text == "keep" or isinstance(part, MediaPart)]
    in_front = chat.markup.placement != "inline" and bool(message.images or message.videos)
    if in_front:
        said = _cut(joined([part for part in parts if not isinstance(part, MediaPart)]))
        parts = [*(part for part in parts if isinstance(part, MediaPart)), *said]
    beside = [part for part in parts if isinstance(part, MediaPart) and part.standing == "beside"]
    spans: list[Span] = []
    for place, part in enumerate(parts):
        if not isinstance(part, MediaPart):
            spans += _said(chat, part, taught=False, source="user")
            continue
        is_beside = part.standing == "beside"
        enough = {"all": True, "beside": is_beside, "several_beside": is_beside and len(beside) > 1}
        if enough[chat.markup.labelled]:
            spans += _label(chat, part, numbers[part])
        slots = ImageSpan(part.index, "video" if isinstance(part, VideoPart) else "image")
        spans += [*_pieces(chat.markup.before), slots, *_pieces(chat.markup.after)]
        following = parts[place + 1 : place + 2]
        if chat.markup.separated == "last":
            following = [part for part in following if not isinstance(part, MediaPart)]
        if (following or chat.markup.separated == "always") and (in_front or is_beside):
            spans += _pieces(chat.markup.separator)
    return spans


def _said(chat: ChatFormat, part: Part, *, taught: bool, source: Source) -> list[Span]:
    """What people or the model say, its tags as control tokens where the format has such."""
    if isinstance(part, ControlPart):
        return [ControlSpan(part.token, taught)]
    assert isinstance(part, TextPart), "names and boxes are spelled before"
    text = part.text
    if not chat.tags:
        return [TextSpan(text, taught, source)] if text else []
    parts = re.split(f"({'|'.join(map(re.escape, chat.tags))})", text)
    return [ControlSpan(p, taught) if p in chat.tags else TextSpan(p, taught, source) for p in parts if p]


def _label(chat: ChatFormat, part: MediaPart, number: int) -> list[Span]:
    label = chat.markup.video_label if isinstance(part, VideoPart) else chat.markup.label
    return [TextSpan(label.replace("{}", str(number)), False, "template")] if label else []


def _assistant_turn(chat: ChatFormat, message: Message) -> list[Span]:
    turn = chat.assistant
    taught = message.loss and not chat.decoder_start  # an answer that an encoder reads is no target
    answer = [span for part in message.parts for span in _said(chat, part, taught=taught, source="assistant")]
    if not answer and chat.empty_turn == "prefix":
        return _pieces(turn.prefix)
    pieces = (_pieces(part, teach=taught) for part in (turn.prefix, turn.lead, turn.suffix))
    prefix, lead, suffix = pieces
    return [*prefix, *lead, *answer, *suffix]


def _decoder_turn(chat: ChatFormat, answer: Message) -> list[Span]:
    """The last answer of a model with an encoder, or where it is to begin."""
    start = [*_pieces(chat.assistant.prefix), *_pieces(chat.encoder_end)]
    text: list[Span] = [TextSpan(answer.text, answer.loss, "assistant")] if answer.text else []
    return [*start, ControlSpan(chat.decoder_start, False, "decoder"), *text]


def _example(chat: ChatFormat, role: Literal["user", "assistant"], text: str) -> list[Span]:
    turn = chat.user if role == "user" else chat.assistant
    before = [*_pieces(turn.prefix, teach=False), *_pieces(turn.lead, teach=False)]
    return [*before, TextSpan(text, False, "template"), *_pieces(turn.suffix, teach=False)]
