"""From what a model wrote to what is compared.

Every result keeps its parser's name: the same outputs read by two parsers give two figures, several points apart on
published benchmarks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from opsin.errors import ConfigError, unknown
from opsin.evaluate.answers import choice_letter, first_letter, folded, words
from opsin.evaluate.boxes import PLAIN, describe, first_box, first_four, moved
from opsin.evaluate.captions import caption_words
from opsin.evaluate.examples import Example
from opsin.evaluate.pope import yes_no_exact, yes_no_llava
from opsin.evaluate.vqa import normalise
from opsin.media.image import ImageMode, image_size
from opsin.spec.grounding import Grounding
from opsin.spec.plan import Size

Parsed = str | list[str] | list[float] | None
"""A text, a letter, words, or left, top, right, bottom in pixels; None where nothing could be read."""


@dataclass(frozen=True)
class Parser:
    """One way to read outputs."""

    name: str
    about: str
    read: Callable[[str, Example, Example], Parsed]
    """(output, the example, the example as it was shown): in the shuffled control the two have different pictures."""
    text: Callable[[str], str] = str.strip
    """What is done to right answers before they are compared with what was read."""


def _by_text(name: str, about: str, change: Callable[[str], str]) -> Parser:
    return Parser(name, about, lambda output, _, __: change(output), change)


_TEXT = (
    _by_text("words", "the answer, white space evened out", words),
    _by_text("words-ignoring-case", "in lower case, without ASCII punctuation", folded),
    _by_text("stripped", "the answer as it is, without white space around it", str.strip),
    _by_text("vqa", "VQA's normalisation: marks, number words, articles, contractions", normalise),
    Parser(
        "choice-letter", "the option that is named, by letter or words", lambda o, e, _: choice_letter(o, e.options)
    ),
    Parser("choice-first-letter", "the first character", lambda o, e, _: first_letter(o, e.options)),
    Parser(
        "yes-no-llava", "`no` where No, no or not stands before the first full stop", lambda o, _, __: yes_no_llava(o)
    ),
    Parser("yes-no-exact", "the whole text is yes or no", lambda o, _, __: yes_no_exact(o)),
    Parser("ptb-words", "words without punctuation, as the Penn Treebank has them", lambda o, _, __: caption_words(o)),
)
PARSERS = {parser.name: parser for parser in _TEXT}
BOX = "first-box"
"""Named with its space: `first-box:model` reads as the model's family writes, `first-box:unit` in that space."""
FIRST_FOUR = "first-four:unit"
BOX_PARSERS = (f"{BOX}:model", *(f"{BOX}:{space}" for space in PLAIN), FIRST_FOUR)


def make_parser(name: str, *, grounding: Grounding | None, image_mode: ImageMode) -> Parser:
    """A parser by its name. grounding: how the model's family writes boxes. Raises ConfigError or UnknownNameError."""
    if name in PARSERS:
        return PARSERS[name]
    if name == FIRST_FOUR:

        def read_four(output: str, example: Example, shown: Example) -> Parsed:
            found = first_four(output, picture_size(example, image_mode))
            return None if found is None else list(found)

        return Parser(name, "the first four numbers in brackets, as lmms-eval reads them", read_four)
    if name not in BOX_PARSERS:
        raise unknown("parser", name, (*PARSERS, *BOX_PARSERS))
    space = name.partition(":")[2]
    rule = grounding if space == "model" else PLAIN[space]
    if rule is None:
        raise ConfigError(
            "the parser first-box:model reads boxes as the model's family writes them, and this model was not taught "
            f"to write any; name the space that its answers are in: {', '.join(BOX_PARSERS[1:-1])}"
        )

    def read(output: str, example: Example, shown: Example) -> Parsed:
        size = picture_size(example, image_mode)
        seen = picture_size(shown, image_mode) if shown.images else size
        box = first_box(output, rule, seen)
        return None if box is None else list(moved(box, seen, size).sides)

    full = f"{name} ({describe(rule)})" if space == "model" else name
    return Parser(full, "the first box that can be read", read)


def picture_size(example: Example, mode: ImageMode) -> Size:
    """(width, height) of the one picture of an example, which boxes on it count from."""
    assert len(example.images) == 1, "boxes need one picture; tasks check this when they read their data"
    return image_size(example.images[0], mode=mode)
