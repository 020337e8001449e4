"""Exact match, ANLS, relaxed accuracy and letters of options, by hand."""

import pytest

from opsin.evaluate.answers import anls, choice_letter, edit_distance, first_letter, folded, relaxed_accuracy, words


def test_white_space_is_evened_out_and_case_stays() -> None:
    assert words("  Two \n dogs ") == "Two dogs"
    assert folded("Two dogs!") == "two dogs"


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distances_of_textbooks(one: str, other: str, distance: int) -> None:
    assert edit_distance(one, other) == distance


@pytest.mark.parametrize(
    ("given", "answers", "score"),
    [
        ("Helo World", ["hello world"], 1 - 1 / 11),  # one letter of eleven is missing
        ("ab", ["ac"], 0.5),  # one of two differs: 0.5 is not below the threshold
        ("axy", ["abc"], 0.0),  # two of three: 1 / 3 is below it
        ("blue", ["red", "Blue"], 1.0),  # the nearest counts
        ("a c", ["a  b"], 0.75),  # distance 1 between single-spaced texts, length 4 as it is written
        ("", [""], 1.0),
        ("", ["x"], 0.0),
    ],
)
def test_anls(given: str, answers: list[str], score: float) -> None:
    assert anls(given, answers) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "target", "score"),
    [
        ("104", "100", 1),
        ("105", "100", 1),  # exactly 5 %
        ("106", "100", 0),
        ("-95", "-100", 1),
        ("5%", "0.05", 1),  # a percent sign divides by 100
        ("5", "5%", 0),  # 5 against 0.05
        ("0", "0", 1),  # a target of 0 is compared as text
        ("0.0", "0", 0),
        ("0.001", "0", 0),
        ("Brazil", "brazil", 1),
        ("Brazil.", "Brazil", 0),
        ("1,000", "1000", 0),  # no number, so a text
        ("nan", "5", 0),
    ],
)
def test_relaxed_accuracy(given: str, target: str, score: int) -> None:
    assert relaxed_accuracy(given, target) == score


OPTIONS = ("a cat", "a dog", "a bird")


@pytest.mark.parametrize(
    ("text", "careful", "first"),
    [
        ("B", "B", "B"),
        ("(B)", "B", None),
        ("B. a dog", "B", "B"),
        ("B) a dog", "B", "B"),
        ("B: because", "B", "B"),
        ("The answer is (C).", "C", None),
        ("Answer: b", "B", "A"),
        ("a dog", "B", "A"),  # the words of one option
        ("A dog is shown", None, "A"),  # an article, not a letter
        ("D", None, None),  # there is no option D
        ("", None, None),
        ("I do not know", None, None),
    ],
)
def test_letters_are_found_and_never_guessed(text: str, careful: str | None, first: str | None) -> None:
    assert choice_letter(text, OPTIONS) == careful
    assert first_letter(text, OPTIONS) == first
