"""POPE's figures from a table small enough to count, and its two parsers where they disagree."""

import numpy as np
import pytest

from opsin.evaluate.pope import counts, pope_figures, yes_no_exact, yes_no_llava


@pytest.mark.parametrize(
    ("text", "llava", "exact"),
    [
        ("yes", "yes", "yes"),
        ("Yes.", "yes", None),
        ("No, there is none", "no", None),
        ("NO", "yes", "no"),  # LLaVA's rule knows No, no and not; in capitals it is a yes
        ("There is not. Yes", "no", None),  # the first sentence counts
        ("I cannot tell", "yes", None),  # everything else is a yes
        (" no ", "no", "no"),
        ("", "yes", None),
    ],
)
def test_the_two_parsers(text: str, llava: str, exact: str | None) -> None:
    assert yes_no_llava(text) == llava
    assert yes_no_exact(text) == exact


def figures(pairs: list[tuple[str | None, str]]) -> dict[str, float]:
    sums = np.array([counts(parsed, truth) for parsed, truth in pairs]).sum(axis=0)
    return {name: float(value) for name, value in pope_figures(sums).items()}


def test_figures_of_ten_questions() -> None:
    # True yes 3, false yes 2, true no 4, false no 1.
    pairs = [("yes", "yes")] * 3 + [("yes", "no")] * 2 + [("no", "no")] * 4 + [("no", "yes")]
    found = figures(pairs)
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["precision"] == pytest.approx(3 / 5)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["F1"] == pytest.approx(2 * 0.6 * 0.75 / 1.35)  # 2/3
    assert found["yes ratio"] == pytest.approx(5 / 10)
    assert found["unparsed"] == 0


def test_what_is_neither_is_wrong_but_in_no_count_of_precision_and_recall() -> None:
    # One yes seen, one missed by "Yes.", one no seen: recall 1 / 1, as lmms-eval counts, and accuracy 2 / 3.
    found = figures([("yes", "yes"), (None, "yes"), ("no", "no")])
    assert (found["recall"], found["precision"]) == (1.0, 1.0)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["unparsed"] == pytest.approx(1 / 3)
    assert found["yes ratio"] == pytest.approx(1 / 3)


def test_nothing_said_yes_to_divides_by_nothing() -> None:
    found = figures([("no", "yes"), ("no", "no")])
    assert (found["F1"], found["precision"], found["recall"]) == (0, 0, 0)
