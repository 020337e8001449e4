"""What the words after `opsin chat` are: a model, pictures and videos, a question. Imports no torch."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opsin.errors import ConfigError
from opsin.families import SHIPPED
from opsin.media.source import is_video
from opsin.weights.shipped import is_shipped

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".flv"),
)
"""How names of pictures and videos end: for messages only, the first bytes of a file decide what it is."""
NAME = re.compile(r"[\w.~@/\\:+-]+", re.ASCII)
"""What can be the name of a model. Questions have spaces or marks."""


@dataclass
class Words:
    """The words, told apart."""

    model: str = SHIPPED
    images: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    prompt: str | None = None


def read_words(words: Sequence[str]) -> Words:
    """Tell the words of a command line apart, in one pass. Raises ConfigError.

    A file that exists is shown. The first word is the model, unless it is such a file or cannot be a name. One other
    word is the question.
    """
    found = Words()
    for place, word in enumerate(words):
        path = os.path.expanduser(word)  # a question is no path, and may be longer than one can be
        is_folder = os.path.isdir(path)
        if place == 0 and (is_shipped(word) or is_folder):
            found.model = word
        elif os.path.isfile(path):
            (found.videos if is_video(Path(path)) else found.images).append(path)
        elif _looks_like_a_file(word):
            raise ConfigError(_missing(word, is_first=place == 0))
        elif place == 0 and NAME.fullmatch(word):
            found.model = word
        elif is_folder:
            raise ConfigError(f"{word!r} is a folder: the model stands first, before pictures and the question")
        elif found.prompt is None:
            found.prompt = word
        else:
            raise ConfigError(
                f"{word!r} is one word too many: the model is {found.model!r}, the question {found.prompt!r}. Put a "
                "question of several words in quotes; the model stands first, and pictures and videos are files that "
                "exist"
            )
    return found


def _looks_like_a_file(word: str) -> bool:
    """Whether a word can only have been meant as a path."""
    if not NAME.fullmatch(word):
        return False
    return word.lower().endswith(SUFFIXES) or bool(re.match(r"(\.{0,2}|~)[/\\]", word))


def _missing(word: str, *, is_first: bool) -> str:
    place = f"(working directory: {Path.cwd()})"
    if is_first:
        return f"there is no folder {word!r} with a model, and no picture or video of that name {place}"
    return f"there is no picture or video {word!r} {place}; a question of one word has no such ending"
