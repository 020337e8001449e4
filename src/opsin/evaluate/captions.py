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
    \d+(?:[.,:/]\d+)*(?:st|nd|rd|th|s)?(?![a-z\d])         # 3, 1,000, 2:30, 1/2, 3rd, 1970s
    | (?:[a-z]\.){2,}                                      # u.s.
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.(?=\s+\S)          # abbreviations inside a sentence
    | [^\W_]+(?:[-&/'’][^\W_]+)*                           # words, with hyphens and apostrophes inside
    | [$%#&@+=*]
    """,
    re.VERBOSE,
)
_CLITIC = re.compile(r"(?<=.)(n't|'s|'m|'d|'ll|'re|'ve)$")
_TWO_WORDS = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na")}


def caption_words(text: str) -> list[str]:
    """A caption as words in lower case, without punctuation.

    As the Penn Treebank writes them: `don't` is `do n't`, `dog's` is `dog 's`, `cannot` is `can not`; words with hyphens
    stay whole; numbers keep their commas and points. Known differences from Stanford's program: its long lists of
    abbreviations, web addresses and smileys, which captions hardly have.
    """
    found: list[str] = []
    for token in _TOKEN.findall(text.lower()):
        token = token.replace("’", "'")
        if token in _TWO_WORDS:
            found += _TWO_WORDS[token]
            continue
        clitic = _CLITIC.search(token)
        found += [token[: clitic.start()], clitic[0]] if clitic else [token]
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
