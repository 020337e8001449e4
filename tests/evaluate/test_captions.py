"""CIDEr-D worked through by hand, and the words of captions."""

import math

import pytest

from opsin.evaluate.captions import Cider, caption_words

REFERENCES = [[["a", "cat"]], [["a", "dog"]]]
"""Two pictures: log(2 / 2) = 0 weighs `a`, and L = log(2 / 1) weighs `cat`, `a cat`, and any word that is in none."""


@pytest.fixture
def cider() -> Cider:
    return Cider(REFERENCES)


def test_a_perfect_caption_of_two_words_scores_5(cider: Cider) -> None:
    # Cosine 1 for n = 1 and n = 2; there are no threes and fours. 10 * (1 + 1 + 0 + 0) / 4
    assert cider.score(["a", "cat"], REFERENCES[0]) == pytest.approx(5.0)


def test_repeating_a_word_pays_nothing(cider: Cider) -> None:
    # n = 1: own (2L), the reference's (0, L). min(2L, L) * L / (2L * L) = 1 / 2. n = 2: `cat cat` is nowhere.
    # Without the cut it would be 1, as for "a cat". 10 * (1 / 2) / 4
    assert cider.score(["cat", "cat"], REFERENCES[0]) == pytest.approx(1.25)


def test_other_lengths_are_penalised(cider: Cider) -> None:
    # n = 1: (0, L, L, L, L) with (0, L): L * L / (2L * L) = 1 / 2. n = 2: one of four pairs, 1 / 2.
    # Lengths 4 and 1 in pairs: exp(-3 ** 2 / 72). 10 * exp(-1 / 8) * (1 / 2 + 1 / 2) / 4
    long = ["a", "cat", "sat", "on", "it"]
    assert cider.score(long, REFERENCES[0]) == pytest.approx(2.5 * math.exp(-1 / 8))


def test_references_are_averaged() -> None:
    references = [[["a", "cat"], ["one", "cat"]], [["a", "dog"]]]
    # Weights: a 0, cat L, one L. Against "a cat": 1 + 1. Against "one cat": n = 1 (0, L) with (L, L): 1 / sqrt(2);
    # n = 2: none. 10 * (2 + 0.7071) / 4 / 2
    assert Cider(references).score(["a", "cat"], references[0]) == pytest.approx(1.25 * (2 + 1 / math.sqrt(2)))


def test_with_one_picture_every_weight_is_0() -> None:
    assert Cider([[["a", "cat"]]]).score(["a", "cat"], [["a", "cat"]]) == 0


def test_an_empty_caption_scores_0(cider: Cider) -> None:
    assert cider.score([], REFERENCES[0]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog, and two cats!", "a man 's dog and two cats"),
        ("They don't sit; they can't.", "they do n't sit they ca n't"),
        ("You cannot go", "you can not go"),
        ("black-and-white t-shirt", "black-and-white t-shirt"),
        ("It's 3.5 or 1,000 at 10:30", "it 's 3.5 or 1,000 at 10:30"),
        ('"Stop" -- (sign) ...', "stop -lrb- sign -rrb-"),
        ("a 3d view of the 1970s", "a 3d view of the 1970s"),
        ("he’s here", "he 's here"),
        ("couldn't've", "could n't 've"),
        ("7-11 at 5:30pm in the 1950's", "7-11 at 5:30 pm in the 1950 's"),
        ("a 45-year-old on Sunset Blvd.", "a 45-year-old on sunset blvd."),
        ("St. Louis, U.S. no. 5, no.", "st. louis u.s. no. 5 no"),
        ("$5 & more", "$ 5 & more"),
        ("", ""),
    ],
)
def test_words_of_captions(text: str, expected: str) -> None:
    assert caption_words(text) == expected.split()
