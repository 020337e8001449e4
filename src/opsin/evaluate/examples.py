"""One thing to ask and what counts as right: what every task is made of, whatever its data looks like."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from opsin.errors import DataError
from opsin.text.grounding import Box
from opsin.text.messages import (
    IMAGE_MARK,
    Conversation,
    ImagePart,
    ImageSource,
    Message,
    NamePart,
    Part,
    VideoPart,
    VideoSource,
    as_parts,
)


@dataclass(frozen=True, eq=False)
class Example:
    """One question with its pictures and the right answers."""

    key: str
    """Its name in outputs, unique in its task: the same for the same example in every run."""
    question: str
    """Before the task's prompt is put around it. Pictures stand before it, or where it has `<image>` marks."""
    images: tuple[ImageSource, ...] = ()
    videos: tuple[VideoSource, ...] = ()
    reference: tuple[str, ...] = ()
    """Every answer that counts: of ten people, of captions, the right letter, `yes` or `no`."""
    box: Box | None = None
    """What is to be found, for tasks about boxes; in any space."""
    options: tuple[str, ...] = ()
    """Of a multiple choice, in the order of their letters."""
    group: str = ""
    """What it is counted under besides the whole: a kind of question, a half of the data."""
    picture: str = ""
    """What it shares with other examples about the same picture; found from the picture's path where it is empty."""

    @property
    def cluster(self) -> str:
        """Examples with the same one are drawn together in a bootstrap."""
        named = [str(each) for each in (*self.images, *self.videos) if isinstance(each, str | Path)]
        return self.picture or ("\n".join(named) if named else self.key)

    def without_pictures(self) -> "Example":
        """The same question and nothing to look at."""
        question = self.question.replace(IMAGE_MARK, "").strip()
        return replace(self, images=(), videos=(), question=question, picture=self.cluster)


def conversation(example: Example, prompt: str, *, name_question: bool = False) -> Conversation:
    """The example as it is asked. prompt: `{}` stands for the question.

    name_question: the question is the name of something on the picture, which families with marks for names write so.
    """
    before, mark, after = prompt.partition("{}")
    parts: list[Part]
    if name_question:
        parts = [*as_parts(before), *((NamePart(example.question),) if mark else ()), *as_parts(after)]
        return _shown(example, parts)
    text = f"{before}{example.question if mark else ''}{after}"
    pieces = text.split(IMAGE_MARK)
    if len(pieces) == 1:
        return _shown(example, list(as_parts(text)))
    if len(pieces) - 1 != len(example.images):
        raise DataError(
            f"example {example.key}: {len(example.images)} picture(s) but {len(pieces) - 1} {IMAGE_MARK} mark(s)",
            kind="marks",
            fix="give each picture one mark, or leave all marks out",
        )
    parts = list(as_parts(pieces[0]))
    for index, piece in enumerate(pieces[1:]):
        parts += [ImagePart(index, "in_text"), *as_parts(piece)]
    videos = [VideoPart(index) for index in range(len(example.videos))]
    return Conversation(
        (Message("user", (*videos, *parts)),), example.images, videos=example.videos, id=f"example {example.key}"
    )


def _shown(example: Example, parts: Sequence[Part]) -> Conversation:
    images = [ImagePart(index) for index in range(len(example.images))]
    videos = [VideoPart(index) for index in range(len(example.videos))]
    return Conversation(
        (Message("user", (*images, *videos, *parts)),),
        example.images,
        videos=example.videos,
        id=f"example {example.key}",
    )
