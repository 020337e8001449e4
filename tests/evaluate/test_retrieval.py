"""Recall at K by hand: ties, equal captions, several right texts, chance."""

import numpy as np
import pytest

from opsin.evaluate.retrieval import chance, hits, positives, ranks


def test_equal_captions_are_right_for_every_picture_that_has_them() -> None:
    captions = [["a dog", "a brown dog"], ["a dog"]]
    texts = ["a dog", "a brown dog", "a dog"]
    assert positives(captions, texts).tolist() == [[True, True, True], [True, False, True]]


def test_a_query_ranks_by_its_best_right_candidate() -> None:
    right = np.array([[True, False, True, False], [False, True, False, False]])
    similarity = np.array([[0.1, 0.9, 0.5, 0.2], [0.3, 0.2, 0.4, 0.1]])
    # First row: 0.5 is the best right one, only 0.9 is better. Second: 0.3 and 0.4 are better than 0.2.
    assert ranks(similarity, right).tolist() == [1, 2]
    assert hits(np.array([0, 1, 4, 5, 10])).tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_ties_count_against_the_right_candidate() -> None:
    right = np.eye(3, dtype=bool)
    assert ranks(np.zeros((3, 3)), right).tolist() == [2, 2, 2]


def test_right_candidates_do_not_stand_in_each_others_way() -> None:
    right = np.array([[True, True, True, False]])
    assert ranks(np.array([[0.9, 0.8, 0.7, 0.1]]), right).tolist() == [0]


def test_a_query_without_a_right_candidate_is_never_hit() -> None:
    rank = ranks(np.array([[0.5, 0.1]]), np.array([[False, False]]))
    assert hits(rank).tolist() == [[0, 0, 0]]


def test_both_ways_of_three_pictures() -> None:
    """Three pictures with a caption each: the first two are mistaken for each other."""
    similarity = np.array([[0.1, 0.8, 0.0], [0.9, 0.2, 0.1], [0.3, 0.4, 0.5]])
    right = np.eye(3, dtype=bool)
    assert hits(ranks(similarity, right)).mean(axis=0).tolist() == pytest.approx([1 / 3, 1, 1])
    # Texts: column 0 ranks 0.9, 0.3, 0.1 -> its picture is third; column 1: 0.8, 0.4, 0.2 -> third; column 2: first.
    assert ranks(similarity.T, right.T).tolist() == [2, 2, 0]


def test_chance() -> None:
    # Four candidates, one right: 1 / 4 at 1, and all four are among the first five.
    assert chance(np.eye(4, dtype=bool)) == pytest.approx([0.25, 1, 1])
    # 20 candidates, 2 right: at 5 it is 1 - C(18, 5) / C(20, 5) = 1 - (15 * 14) / (20 * 19).
    right = np.zeros((1, 20), bool)
    right[0, :2] = True
    assert chance(right) == pytest.approx([0.1, 1 - 210 / 380, 1 - 90 / 380])
