"""VQA accuracy, by hand."""

import pytest

from opsin.errors import DataError
from opsin.evaluate.vqa import CONTRACTIONS, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("a man", "man"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("He'dve gone", "he'd've gone"),
        ("red, white", "red white"),  # a comma beside a space is taken out
        ("red,white", "red white"),  # one between letters becomes a space
        ("1,000 people", "1000 people"),  # grouped digits: every mark of the text is taken out
        ("1,000-2,000", "10002000"),
        ("t-shirt", "t shirt"),
        ("3.5 m.", "3.5 m"),  # a period before a digit stays
        ("10:30", "10:30"),  # a colon is no mark
        ("yes\n", "yes"),
        ("", ""),
    ],
)
def test_texts_are_normalised_as_published(given: str, normal: str) -> None:
    assert normalise(given) == normal


def test_a_word_gets_back_one_apostrophe() -> None:
    assert CONTRACTIONS["youre"] == "you're"
    assert CONTRACTIONS["couldnt've"] == CONTRACTIONS["couldn'tve"] == "couldn't've"
    assert "couldntve" not in CONTRACTIONS  # two are missing: the published table has no such entry
    assert CONTRACTIONS["somebody'd"] == "somebodyd"  # as published, the wrong way round


@pytest.mark.parametrize(
    ("equal", "score"),
    [
        (0, 0.0),
        # 1 of 10: left out once -> 0; nine times 1 / 3. (0 + 9 / 3) / 10
        (1, 0.3),
        # 2 of 10: left out twice -> 1 / 3; eight times 2 / 3. (2 / 3 + 16 / 3) / 10
        (2, 0.6),
        # 3 of 10: left out three times -> 2 / 3; seven times 1. (2 + 7) / 10: not 1
        (3, 0.9),
        # 4 of 10: three are left whichever is taken out.
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_each_answer_is_left_out_once(equal: int, score: float) -> None:
    answers = ["A dog."] * equal + [f"other {number}" for number in range(10 - equal)]
    assert vqa_accuracy("dog", answers) == pytest.approx(score, abs=1e-12)


def test_too_few_answers_are_refused_as_nothing_could_score_1() -> None:
    assert vqa_accuracy("x", ["x"] * 4) == 1.0
    with pytest.raises(DataError, match=r"1 answer\(s\): VQA accuracy compares with those of ten people.*task exact"):
        vqa_accuracy("x", ["x"])
