"""Retrieval with a tiny model: similarities that rank as the matcher ranks, and figures from them."""

import json
from pathlib import Path

import numpy as np
import pytest

import matchers
import toys
from evaluations import Writer
from opsin import match
from opsin.errors import ConfigError
from opsin.evaluate.matching import evaluate_retrieval
from opsin.evaluate.tasks import open_task
from opsin.match import Matcher

TEXTS = ["a dog", "a red car", "two cats", "the sea"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matchers.save(tmp_path_factory.mktemp("matcher") / "model")


@pytest.fixture(scope="module")
def matcher(model: Path) -> Matcher:
    return match.load(model)


@pytest.mark.parametrize("rescored", [0, 2, 10])
def test_similarities_rank_as_the_matcher_does(matcher: Matcher, rescored: int) -> None:
    shown = [toys.picture((40 + 7 * number, 60), number) for number in range(5)]
    found = matcher.similarity(shown, TEXTS, num_rescored=rescored)
    for row, picture in enumerate(shown):
        wanted = [each.index for each in matcher.rank_texts(picture, TEXTS, num_rescored=rescored)]
        assert np.argsort(-found.by_picture[row], kind="stable").tolist() == wanted
    for column, text in enumerate(TEXTS):
        wanted = [each.index for each in matcher.rank_pictures(text, shown, num_rescored=rescored)]
        assert np.argsort(-found.by_text[:, column], kind="stable").tolist() == wanted


def test_retrieval_from_a_file(write: Writer, model: Path, tmp_path: Path) -> None:
    path = write(
        {"image": "a.png", "captions": ["a dog", "the sea"]},
        {"image": "b.png", "caption": "a red car"},
        {"image": "c.png", "caption": "A dog!"},  # the same as the first once it is cleaned
    )
    task, out = open_task("retrieval", data=str(path)), tmp_path / "out"
    results = evaluate_retrieval(task, str(model), out, controls=["shuffled"])
    figures = {(each["group"], each["figure"]): each for each in results["figures"]["real"]}
    assert list(figures) == [
        (group, f"R@{k}") for group in ("picture to text", "text to picture", "macro average") for k in (1, 5, 10)
    ]
    assert figures["picture to text", "R@1"]["number"] == 3
    assert figures["text to picture", "R@1"]["number"] == 4
    assert figures["picture to text", "R@5"]["value"] == 1  # there are four texts
    chance = {(each["group"], each["figure"]): each["value"] for each in results["figures"]["chance"]}
    # Of four texts the first picture has three (its own and the equal one), the second one, the third two.
    assert chance["picture to text", "R@1"] == pytest.approx((3 / 4 + 1 / 4 + 2 / 4) / 3)
    assert chance["text to picture", "R@1"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3 + 2 / 3) / 4)
    lines = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert [line["direction"] for line in lines] == ["picture to text"] * 3 + ["text to picture"] * 4
    assert len(lines[0]["best"]) == 4


def test_questions_cannot_be_left_without_pictures(write: Writer, model: Path, tmp_path: Path) -> None:
    task = open_task("retrieval", data=str(write({"image": "a.png", "caption": "x"})))
    with pytest.raises(ConfigError, match="retrieval without pictures is no task"):
        evaluate_retrieval(task, str(model), tmp_path / "out", controls=["text-only"])
