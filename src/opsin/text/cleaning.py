"""Texts as BLIP-2's authors clean them before tokenising (LAVIS blip_processors.py): captions and questions."""

import re

_MARKS = re.compile(r"""[.!"()*#:;~]""")
MAX_WORDS = 50


def clean_caption(text: str, *, prompt: str = "", max_words: int = MAX_WORDS) -> str:
    """Lower case; marks become spaces, several spaces one; the first `max_words` words. `prompt` goes in front."""
    text = re.sub(r"\s{2,}", " ", _MARKS.sub(" ", text.lower()))
    return prompt + _first_words(text.rstrip("\n").strip(" "), max_words)


def clean_question(text: str, *, max_words: int = MAX_WORDS) -> str:
    """Lower case; marks are left out, except for `?` and `,`; the first `max_words` words."""
    return _first_words(_MARKS.sub("", text.lower()).rstrip(" "), max_words)


def _first_words(text: str, count: int) -> str:
    words = text.split(" ")
    return " ".join(words[:count]) if len(words) > count else text
