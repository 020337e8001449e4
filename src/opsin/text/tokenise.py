"""From spans to ids: each run of text is tokenised once, and every token knows the span it starts in."""

from collections.abc import Sequence
from dataclasses import dataclass

from opsin.text.render import ControlSpan, Span, TextSpan
from opsin.text.tokenizer import Place, Tokenizer

IMAGE = -1
"""Stands in `TokenisedText.ids` for a whole picture, which is one entry there."""


@dataclass(frozen=True)
class TokenisedText:
    """A conversation as tokens and pictures. The first three lists have one item per entry, in order."""

    ids: list[int]
    """Token ids; IMAGE where a picture stands."""
    supervised: list[bool]
    """Whether training teaches the entry: a token is taught iff it starts in a supervised span, a picture never is."""
    spans: list[int]
    """Which of the given spans the entry starts in."""
    images: list[tuple[int, int]]
    """(entry, picture index) of every picture, in order."""


def tokenise(spans: Sequence[Span], tokenizer: Tokenizer) -> TokenisedText:
    """Ids of a rendered conversation. Raises TokenizerError when the tokenizer lacks one of its control tokens.

    Neighbouring text spans are one text to the tokenizer, so where a template ends and an answer begins leaves no mark
    on the ids, and nothing is tokenised a second time to find out which ids belong to an answer.
    """
    result = TokenisedText([], [], [], [])
    place: Place = "start"
    swallows = False
    first = 0
    while first < len(spans):
        span = spans[first]
        if isinstance(span, TextSpan):
            last = first + 1
            while last < len(spans) and isinstance(follower := spans[last], TextSpan) and not span.is_closed:
                span, last = follower, last + 1
            _append_text(result, spans, range(first, last), tokenizer, place, swallows=swallows)
            first = last
            continue
        if isinstance(span, ControlSpan):
            result.ids.append(tokenizer.control_id(span.token))
            place = "after_control" if span.source == "template" else "start"
            swallows = span.token in tokenizer.swallowing
        else:
            result.images.append((len(result.ids), span.index))
            result.ids.append(IMAGE)
            place, swallows = "start", False
        result.supervised.append(isinstance(span, ControlSpan) and span.supervised)
        result.spans.append(first)
        first += 1
    return result


def _append_text(
    result: TokenisedText, spans: Sequence[Span], run: range, tokenizer: Tokenizer, place: Place, *, swallows: bool
) -> None:
    """Tokenise the text spans numbered `run` as one text and append its tokens.

    swallows: whether the control token before them takes the white space that they begin with away.
    """
    texts = [span for span in spans[run.start : run.stop] if isinstance(span, TextSpan)]
    whole = "".join(span.text for span in texts)
    text = whole.lstrip() if swallows else whole
    if not text:
        return
    tokens = tokenizer.encode(text, place)
    number, end = 0, len(texts[0].text) - (len(whole) - len(text))
    for start in tokens.starts:
        while start >= end and number < len(texts) - 1:
            number += 1
            end += len(texts[number].text)
        result.supervised.append(texts[number].supervised)
        result.spans.append(run.start + number)
    result.ids.extend(tokens.ids)
