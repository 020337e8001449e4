"""Short answers as text: exact match, ANLS, relaxed accuracy, letters of options. All from 0 to 1."""

import re
import string
from collections.abc import Sequence


def words(text: str) -> str:
    """The text with single spaces between its words, else as it is."""
    return " ".join(text.split())


def folded(text: str) -> str:
    """In lower case and without ASCII punctuation (lmms-eval's ignore_case and ignore_punctuation, as for GQA)."""
    return words(text.lower().translate(str.maketrans("", "", string.punctuation)))


def edit_distance(one: str, other: str) -> int:
    """Characters to insert, delete or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, start=1):
        above_left, row[0] = row[0], number
        for place, facing in enumerate(other, start=1):
            above = row[place]
            row[place] = min(above + 1, row[place - 1] + 1, above_left + (letter != facing))
            above_left = above
    return row[-1]


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question (DocVQA, InfoVQA; arXiv:1907.00490).

    For each answer the edit distance, in lower case with single spaces, is divided by the length of the longer of the
    two; the score is 1 less the smallest of these, or 0 where that is *below* the threshold: exactly 0.5 stays.

    Traps. The published code takes the lengths of the texts as they are written, spaces that the distance does not
    see included, and so is done here. "1,000" and "1000" are 1 of 5 characters apart; nothing reads numbers.
    """
    distances = []
    for answer in answers:
        # In capitals as published: a few letters, such as the German sharp s, take two characters there.
        length = max(len(answer.upper()), len(prediction.upper()))
        distance = edit_distance(words(answer.lower()), words(prediction.lower()))
        distances.append(distance / length if length else 0.0)
    score = 1.0 - min(distances)
    return score if score >= threshold else 0.0


def relaxed_accuracy(prediction: str, answer: str, *, tolerance: float = 0.05) -> float:
    """Relaxed accuracy of one question (ChartQA, arXiv:2203.10244 section 5.1): 1 or 0.

    Where both are numbers, right within 5 % of the answer; a percent sign divides by 100, on either side. Else right
    where both are the same text but for case.

    Traps. To a target of 0 no relative error exists: it is compared as text, so "0.0" is wrong for "0". "1,000" and
    "$5" are no numbers. "5" is wrong for "5%". ChartQA is reported as the mean of its human and augmented halves, which
    `group` gives as the macro average.
    """
    given, target = _number(prediction), _number(answer)
    if given is not None and target:
        return float(abs(given - target) / abs(target) <= tolerance)
    return float(prediction.lower() == answer.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


LETTERS = string.ascii_uppercase

_ALONE = re.compile(r"\(?([A-Z])\)?(?:[.):,\s]*$|[.):]\s)")
_SAID = re.compile(r"\banswer\s*(?:is|:)?\s*:?\s*\(?([A-Z])\)?(?:[.):,\s]|$)", re.IGNORECASE)


def choice_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter of the option that an answer names, or None.

    In this order: a letter alone or in front of `.`, `)` or `:` ("B", "(B)", "B. a dog"); a letter after "answer is" or
    "answer:"; the words of one option and nothing else. Nothing is guessed and nothing drawn: an answer that names no
    option is wrong, and counted. ("A dog" names no option A.)
    """
    text = text.strip()
    for pattern, found in ((_ALONE, _ALONE.match(text)), (_SAID, _SAID.search(text))):
        if found and found[1].upper() in LETTERS[: len(options)] and (pattern is _SAID or found[1].isupper()):
            return found[1].upper()
    named = [letter for letter, option in zip(LETTERS, options, strict=False) if folded(option) == folded(text)]
    return named[0] if len(named) == 1 and folded(text) else None


def first_letter(text: str, options: Sequence[str]) -> str | None:
    """The first character, in capitals, where it is an option's letter: so "A dog" is A. Used for SEED and MMBench."""
    letter = text.strip()[:1].upper()
    return letter if letter and letter in LETTERS[: len(options)] else None
