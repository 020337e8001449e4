"""Intervals and paired tests where the truth is known."""

import numpy as np
import pytest

from opsin.evaluate.bootstrap import by_cluster, differences, intervals


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., :1] / sums[..., 1:]


def rows(scores: list[float]) -> np.ndarray:
    return np.array([[score, 1.0] for score in scores])


def test_two_pictures_leave_everything_open() -> None:
    """Resamples of {0, 1} have means 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    (found,) = intervals(rows([0, 1]), mean)
    assert (found.value, found.low, found.high) == (0.5, 0, 1)


def test_one_picture_has_no_interval() -> None:
    (found,) = intervals(rows([1]), mean)
    assert (found.value, found.low, found.high) == (1, None, None)


def test_intervals_agree_with_the_normal_approximation() -> None:
    # 400 answers, half right: the standard error is sqrt(0.25 / 400) = 0.025, and 1.96 of them 0.049.
    (found,) = intervals(rows([0, 1] * 200), mean)
    assert found.low == pytest.approx(0.451, abs=0.006)
    assert found.high == pytest.approx(0.549, abs=0.006)


def test_intervals_are_the_same_every_time() -> None:
    scores = rows([0, 1, 1, 0, 1, 1, 1])
    assert intervals(scores, mean) == intervals(scores, mean)


def test_ten_questions_about_a_picture_count_as_one_picture() -> None:
    """Answers to questions about one picture that are all right or all wrong say no more than one answer."""
    pictures = [0, 1, 1, 0, 1]
    asked = rows([score for score in pictures for _ in range(10)])
    clusters = [number for number in range(5) for _ in range(10)]
    together = by_cluster(asked, clusters)
    assert together.tolist() == [[10 * score, 10] for score in pictures]
    assert intervals(together, mean) == intervals(rows([float(each) for each in pictures]), mean)
    (apart,) = intervals(asked, mean)
    (joined,) = intervals(together, mean)
    assert apart.high is not None
    assert joined.high is not None
    assert apart.high - apart.low < 0.6 * (joined.high - joined.low)  # type: ignore[operator]


def test_equal_results_differ_by_nothing() -> None:
    scores = rows([0, 1, 1, 0])
    (found,) = differences(scores, scores, mean)
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_a_clear_difference_is_clear() -> None:
    (found,) = differences(rows([1] * 20), rows([0] * 20), mean)
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert found.p_value == pytest.approx(1 / 2001, abs=1e-3)


def test_pairs_see_what_intervals_apart_do_not() -> None:
    """Two models whose scores vary widely over pictures, one always a little better."""
    base = np.linspace(0, 0.9, 30)
    (a,) = intervals(rows(list(base + 0.05)), mean)
    (b,) = intervals(rows(list(base)), mean)
    assert a.low is not None
    assert b.high is not None
    assert a.low < b.high  # their intervals overlap
    (found,) = differences(rows(list(base + 0.05)), rows(list(base)), mean)
    assert found.value == pytest.approx(0.05)
    assert found.low is not None
    assert found.low > 0.04
    assert found.p_value is not None
    assert found.p_value < 0.01


def test_exchanges_of_two_pictures_by_hand() -> None:
    # Differences 1 and 0: exchanging leaves |1/2| whatever the signs, so every exchange is as far.
    (found,) = differences(rows([1, 1]), rows([0, 1]), mean)
    assert found.value == 0.5
    assert found.p_value == 1
