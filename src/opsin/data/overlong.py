"""What becomes of a conversation that is longer than its stage allows. No rule ever cuts through a picture.

`error`              the sample is bad, and the stage's `bad_samples` decides
`drop`               it is left out, counted, and another takes its place
`truncate`           its end is cut off, as the authors of LLaVA do; an error where that would cut a picture
`trim_turns`         whole exchanges go, the last first, with what they show
`trim_oldest_turns`  whole exchanges go, the first first; what they show stays, before the first question that is left
`shrink_picture`     pictures and videos get fewer tokens, as few as needed; the text stays whole
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from opsin.encode import Encoded, Measure
from opsin.errors import DataError
from opsin.spec.recipe import Overlong
from opsin.text.messages import BoxPart, Conversation, ImagePart, Message, Part, VideoPart

Encode = Callable[[Conversation], Encoded]


class TooLong(DataError):
    """A sample that is too long for its stage."""


def too_long(name: str, measure: Measure, max_tokens: int, why: str = "") -> TooLong:
    """The error for a sample, by its name. why: what was tried; by default what could be."""
    named = f"sample {name!r}" if name else "it"
    advice = ". Raise max_tokens, or let overlong say what to do: drop, truncate, trim_turns or shrink_picture."
    return TooLong(
        f"{named} takes {measure.num_tokens} tokens ({measure.num_image_tokens} of them of pictures); the stage's "
        f"limit is {max_tokens}{why or advice}",
        kind="too_long",
    )


def fit(
    encoded: Encoded,
    conversation: Conversation | None,
    *,
    max_tokens: int,
    overlong: Overlong,
    encode: Encode | None = None,
    smaller: Sequence[Encode] = (),
) -> Encoded:
    """The sample with at most `max_tokens` tokens; a note says what was done to it. Raises TooLong.

    conversation, encode: what the sample was made of, and how; without them nothing but its end can be cut.
    smaller: the same with ever smaller pictures, for `shrink_picture`.
    """
    if encoded.num_tokens <= max_tokens:
        return encoded
    refuse = partial(too_long, encoded.name, encoded.measure, max_tokens)
    if overlong in ("error", "drop"):
        raise refuse()
    if overlong == "truncate":
        if encoded.num_image_tokens and encoded.slots[-1] >= max_tokens:
            raise refuse(", and cutting there would cut a picture. Raise max_tokens, or leave the sample out.")
        return _truncate(encoded, max_tokens)
    if conversation is None or encode is None:
        raise refuse(f". Its source gives tokens, not a conversation, so overlong: {overlong} has no turns.")
    if overlong == "shrink_picture":
        tries: list[Callable[[], Encoded]] = [_later(each, conversation) for each in smaller]
        least = "even with the smallest pictures"
    else:
        tries = [_later(encode, each) for each in shorter(conversation, overlong)]
        least = "even with one exchange alone"
    found = _first_that_fits(tries, max_tokens)
    if isinstance(found, int):
        raise refuse(f", and {least} it takes {found or encoded.num_tokens}. Raise max_tokens.")
    note = f"shortened from {encoded.num_tokens} tokens ({overlong}, limit {max_tokens})"
    return replace(found, name=encoded.name, notes=(*found.notes, note))


def shorter(conversation: Conversation, overlong: Overlong) -> list[Conversation]:
    """The conversation with one exchange less, two less, ... down to one. An exchange ends with an answer."""
    messages = conversation.messages
    opening = 1 if messages and messages[0].role == "system" else 0
    ends = [
        place + 1
        for place, message in enumerate(messages)
        if message.role == "assistant" and any(each.role == "user" for each in messages[:place])
    ]
    if overlong == "trim_turns":
        return [_with_messages(conversation, messages[:end]) for end in reversed(ends[:-1])]
    shortened = []
    for start in ends[:-1]:
        said = [part for message in messages[opening:start] for part in message.parts]
        shown = [part for part in said if isinstance(part, ImagePart | VideoPart)]
        first, *others = messages[start:]
        if first.role != "user":
            continue  # a second answer in a row has no question of its own
        kept = (*messages[:opening], Message("user", (*shown, *first.parts)), *others)
        shortened.append(_with_messages(conversation, kept))
    return shortened


def _with_messages(conversation: Conversation, messages: Sequence[Message]) -> Conversation:
    """Some of a conversation's messages, with the pictures and videos that they show, numbered anew."""
    parts = [part for message in messages for part in message.parts]
    images = sorted(part.index for part in parts if isinstance(part, ImagePart))
    videos = sorted(part.index for part in parts if isinstance(part, VideoPart))

    def moved(part: Part) -> Part:
        if isinstance(part, ImagePart):
            return replace(part, index=images.index(part.index))
        if isinstance(part, VideoPart):
            return replace(part, index=videos.index(part.index))
        return replace(part, image=images.index(part.image)) if isinstance(part, BoxPart) else part

    return replace(
        conversation,
        messages=tuple(replace(each, parts=tuple(map(moved, each.parts))) for each in messages),
        images=tuple(conversation.images[index] for index in images),
        videos=tuple(conversation.videos[index] for index in videos),
    )


def _later(encode: Encode, conversation: Conversation) -> Callable[[], Encoded]:
    return lambda: encode(conversation)


def _first_that_fits(tries: Sequence[Callable[[], Encoded]], max_tokens: int) -> Encoded | int:
    """The first of ever shorter samples that fits; the tokens of the last one, or 0, where none does."""
    made = cache(lambda number: tries[number]())
    place = bisect_left(range(len(tries)), True, key=lambda number: made(number).num_tokens <= max_tokens)
    if place < len(tries):
        return made(place)
    return made(len(tries) - 1).num_tokens if tries else 0


def _truncate(encoded: Encoded, max_tokens: int) -> Encoded:
    kept = slice(max_tokens)
    return replace(
        encoded,
        ids=encoded.ids[kept],
        supervised=encoded.supervised[kept],
        positions=encoded.positions[kept],
        token_spans=encoded.token_spans[kept],
        notes=(*encoded.notes, f"its end was cut off at {max_tokens} of {encoded.num_tokens} tokens"),
    )
