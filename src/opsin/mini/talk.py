"""From a sample to a conversation, with painted pictures or with blank ones of the same sizes, and to its tokens."""

import re
from dataclasses import replace

import numpy as np
from PIL import Image

from opsin.demo.drawn import draw
from opsin.demo.scene import Scene
from opsin.encode import Encoded, Encoder
from opsin.mini.practice import PRACTICE
from opsin.mini.tasks import Question, Sample
from opsin.mini.words import PIECES
from opsin.text.messages import (
    BoxPart,
    Conversation,
    ImagePart,
    Message,
    NamePart,
    Part,
    TextPart,
    VideoPart,
)


def conversation(sample: Sample, *, id: str = "", painted: bool = True) -> Conversation:
    """All questions of a sample, one after the other; the first one comes with what is shown."""
    messages: list[Message] = []
    for question in sample.questions:
        messages += [asked(sample, question.text, shows=not messages), answered(question)]
    return shown(sample, messages, id=id, painted=painted)


def asked(sample: Sample, text: str, *, shows: bool) -> Message:
    """A question, behind what is shown."""
    parts: list[Part] = []
    if shows:
        parts += [ImagePart(number) for number in range(len(sample.pictures))]
        parts += [VideoPart(0)] if sample.clip else []
    return Message("user", (*parts, TextPart(text)))


def answered(question: Question) -> Message:
    """An answer; of names with their boxes, where it has some."""
    if not question.boxes:
        return Message("assistant", (TextPart(question.answer),))
    named = [part for name, box in question.boxes for part in (NamePart(name), BoxPart((box,), 0))]
    return Message("assistant", tuple(named))


def shown(sample: Sample, messages: list[Message], *, id: str = "", painted: bool = True) -> Conversation:
    """Messages about a sample."""

    def picture(scene: Scene) -> Image.Image:
        return draw(scene) if painted else Image.new("RGB", scene.size)

    videos = (tuple(picture(frame) for frame in sample.clip.frames),) if sample.clip else ()
    return Conversation(tuple(messages), tuple(picture(scene) for scene in sample.pictures), id=id, videos=videos)


def encoded(sample: Sample, encoder: Encoder, *, id: str = "", painted: bool = True) -> Encoded:
    """The conversation about a sample, as training reads it: of what is practised only what is found is taught."""
    whole = encoder.encode(conversation(sample, id=id, painted=painted), mode="train")
    taught = whole.supervised.copy()
    names = iter(np.flatnonzero(whole.ids == encoder.tokenizer.control_id("<ref>")) + 1)
    starts = np.flatnonzero(np.diff(taught, prepend=False, append=False))[::2]
    for start, question in zip(starts, sample.questions, strict=True):
        place = start
        for given, found in question.told:
            taught[place : place + _unforeseen(given)] = False
            place += _length(f"{given} {found}")
            taught[place] = False  # the comma, or the last point
            place += 1
        for name, _ in question.boxes:
            place = next(names)
            if question.task in PRACTICE:
                taught[place : place + _unforeseen(name)] = False
    return replace(whole, supervised=taught)


def _unforeseen(name: str) -> int:
    """Number of its tokens that say which thing is meant: a colour, after which the shape can be found."""
    return _length(name.split()[0])


def _length(text: str) -> int:
    """Number of tokens of text of which the vocabulary has every piece whole."""
    return len(re.findall(PIECES, text))
