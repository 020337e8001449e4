"""The loss mask of one conversation, coloured: which tokens the model reads, and which it is taught to write.

`mask_pieces` cuts an encoded conversation into its tokens; `mask_text` colours them for a terminal, `mask_html` for a
page. What people wrote can neither become markup nor steer a terminal: see `visible`.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from rich.text import Text

from opsin.encode import Encoded
from opsin.inspect._html import escape
from opsin.spec.plan import NEWLINE, ImagePlan
from opsin.text.render import ControlSpan, ImageSpan, Span, TextSpan
from opsin.text.tokenizer import TextStream, Tokenizer

Kind = Literal["template", "system", "user", "assistant", "control", "image"]
KINDS: dict[Kind, str] = {
    "template": "template",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "control": "control token",
    "image": "picture slots",
}
"""Every kind of piece, with its name in legends."""

_TERMINAL_STYLES: dict[Kind, str] = {
    "template": "bright_black",
    "system": "magenta",
    "user": "cyan",
    "assistant": "default",
    "control": "yellow",
    "image": "blue",
}
_TAUGHT_STYLE = "bold black on green"
_PART_OF_CHARACTER = "·"
"""Stands for a token without a text of its own: one byte of a longer character, or a tokenizer's opening space."""

_SHOWN_AS = {"\n": "↵\n", "\t": "⇥"}
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
"""Unicode categories that are named, not shown: controls, formats, private use, surrogates, line separators."""


@dataclass(frozen=True)
class MaskPiece:
    """One token, or all slots of one picture."""

    start: int
    """Place of its first token in the sequence."""
    ids: tuple[int, ...]
    """Its token ids: one, or one per slot."""
    text: str
    """What the token writes; for a picture, a summary of its slots. Empty for a part of a character."""
    kind: Kind
    supervised: bool
    """Whether training teaches it."""


def mask_pieces(encoded: Encoded, tokenizer: Tokenizer) -> tuple[MaskPiece, ...]:
    """The conversation token by token; every token is in exactly one piece, in order."""
    pieces: list[MaskPiece] = []
    spans, numbers, runs = encoded.spans, encoded.token_spans.tolist(), _text_runs(encoded.spans)
    # Both are in the order of the sequence.
    image_spans = [number for number, span in enumerate(spans) if isinstance(span, ImageSpan)]
    plans = {number: image.plan for number, image in zip(image_spans, encoded.images, strict=True)}
    for run, places in groupby(range(encoded.num_tokens), key=lambda place: runs[numbers[place]]):
        tokens = list(places)
        number, ids = numbers[tokens[0]], tuple(encoded.ids[tokens].tolist())
        span = spans[number]
        if isinstance(span, ImageSpan):
            text = _image_summary(span.index, plans[number])
            pieces.append(MaskPiece(tokens[0], ids, text, "image", False))
        elif isinstance(span, ControlSpan):
            pieces.append(MaskPiece(tokens[0], ids, span.token, "control", bool(encoded.supervised[tokens[0]])))
        else:
            for place, token, text in zip(
                tokens, ids, _token_texts(ids, _written(spans, runs, run), tokenizer), strict=True
            ):
                source = spans[numbers[place]]
                assert isinstance(source, TextSpan)
                pieces.append(MaskPiece(place, (token,), text, source.source, bool(encoded.supervised[place])))
    return tuple(pieces)


def mask_text(pieces: Sequence[MaskPiece]) -> Text:
    """The mask for a terminal: what is taught stands on green, the rest is coloured by who wrote it."""
    out = Text()
    for piece in pieces:
        text = f"[{piece.text}]" if piece.kind in ("control", "image") else visible(piece.text)
        out.append(text, _TAUGHT_STYLE if piece.supervised else _TERMINAL_STYLES[piece.kind])
    return out


def ids_text(pieces: Sequence[MaskPiece]) -> Text:
    """Every token with its id behind it, `A⟨319⟩`, or `A⟨319*⟩` where it is taught; a picture's slots stand as one."""
    out = Text()
    for piece in pieces:
        text = f"[{piece.text}]" if piece.kind in ("control", "image") else visible(piece.text).replace("\n", "")
        out.append(text, _TAUGHT_STYLE if piece.supervised else _TERMINAL_STYLES[piece.kind])
        number = f"⟨{piece.ids[0]}{'*' * piece.supervised}⟩"
        out.append("" if piece.kind == "image" else number, "dim").append(" ")
    return out


def legend_text() -> Text:
    """The key to `mask_text`."""
    out = Text("taught", _TAUGHT_STYLE)
    for kind, name in KINDS.items():
        out.append("  ").append(name, _TERMINAL_STYLES[kind])
    return out


def mask_html(pieces: Sequence[MaskPiece]) -> str:
    """The mask as a row of `<span class="token KIND [taught]">`, with id and place in its title and `data-id`."""
    return "".join(_span(piece) for piece in pieces)


def visible(text: str) -> str:
    """Text that shows what it holds: controls and direction marks are named, as `⟨U+202E⟩`; line ends get an arrow.

    Left as they are, such characters would steer a terminal or reorder what is read.
    """
    if not text:
        return _PART_OF_CHARACTER
    return "".join(_SHOWN_AS.get(c) or (f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in _UNSEEN else c) for c in text)


def _span(piece: MaskPiece) -> str:
    first, last = piece.start, piece.start + len(piece.ids) - 1
    if piece.kind == "image":
        title, shown = f"positions {first} to {last}, filled by connector rows", piece.text
    else:
        title, shown = f"id {piece.ids[0]}, position {first}", visible(piece.text)
    classes = f"token {piece.kind}{' taught' if piece.supervised else ''}"
    number = "" if piece.kind == "image" else f' data-id="{piece.ids[0]}"'
    # The line ends after the token, so that an id which the page shows behind it stays on its line.
    text = shown.rstrip("\n")
    return f'<span class="{classes}" title="{escape(title)}"{number}>{escape(text)}</span>{shown[len(text) :]}'


def _image_summary(index: int, plan: ImagePlan) -> str:
    newlines = int((plan.layout.order == NEWLINE).sum())
    return f"image {index + 1}: {plan.num_slots} slots" + (f", {newlines} of them newlines" if newlines else "")


def _text_runs(spans: Sequence[Span]) -> list[int]:
    """For each span, the number of its run: neighbouring text spans, which were tokenised together, share one."""
    runs: list[int] = []
    for number, span in enumerate(spans):
        joins = number > 0 and isinstance(span, TextSpan) and isinstance(spans[number - 1], TextSpan)
        runs.append(runs[-1] if joins else number)
    return runs


def _written(spans: Sequence[Span], runs: Sequence[int], run: int) -> str:
    """The text of one run."""
    return "".join(span.text for span, r in zip(spans, runs, strict=True) if r == run and isinstance(span, TextSpan))


def _token_texts(ids: Sequence[int], written: str, tokenizer: Tokenizer) -> Iterator[str]:
    """What each token of a run of text writes. Together they give `written`, as far as the tokenizer keeps it."""
    stream = TextStream(tokenizer)
    texts = [stream.push(token) for token in ids]
    texts[-1] += stream.finish()
    # A tokenizer may swallow the white space that a run begins with; it belongs to the first token.
    joined = "".join(texts)
    if written.endswith(joined):
        texts[0] = written[: len(written) - len(joined)] + texts[0]
    return iter(texts)
