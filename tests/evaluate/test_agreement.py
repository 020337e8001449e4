"""The same numbers as other harnesses, on cases made by hand.

`published_scores.json` holds what the functions of lmms-eval (commit 75571cfe) and, for CIDEr-D, of coco-caption give
(pycocoevalcap 1.2). Only the numbers are theirs.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from opsin.evaluate.answers import anls, relaxed_accuracy
from opsin.evaluate.boxes import THRESHOLD, first_four, iou
from opsin.evaluate.captions import Cider
from opsin.evaluate.pope import counts, pope_figures, yes_no_exact
from opsin.evaluate.vqa import vqa_accuracy

CASES = json.loads(Path(__file__).with_name("published_scores.json").read_text())


@pytest.mark.parametrize("case", CASES["vqa_accuracy"], ids=lambda case: case["prediction"])
def test_vqa_accuracy(case: dict) -> None:
    assert vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["score"], abs=1e-12)


@pytest.mark.parametrize("case", CASES["anls"], ids=lambda case: case["prediction"])
def test_anls(case: dict) -> None:
    assert anls(case["prediction"], case["answers"]) == pytest.approx(case["score"], abs=1e-12)


@pytest.mark.parametrize("case", CASES["relaxed_accuracy"], ids=lambda case: f"{case['prediction']}-{case['answer']}")
def test_relaxed_accuracy(case: dict) -> None:
    assert relaxed_accuracy(case["prediction"], case["answer"]) == case["score"]


def test_pope() -> None:
    case = CASES["pope"]
    found = pope_figures(np.sum([counts(yes_no_exact(said), truth) for said, truth in case["pairs"]], axis=0))
    for name in ("accuracy", "precision", "recall", "F1"):
        assert float(found[name]) == pytest.approx(case[name], abs=1e-12)


@pytest.mark.parametrize("case", CASES["acc@0.5"], ids=lambda case: case["output"])
def test_boxes(case: dict) -> None:
    found = first_four(case["output"], (1, 1))
    assert float(found is not None and iou(found, case["box"]) >= THRESHOLD) == case["score"]


def test_cider_d() -> None:
    case = CASES["cider_d"]
    references = [[caption.split() for caption in captions] for captions in case["references"]]
    cider = Cider(references)
    scores = [cider.score(said.split(), own) for said, own in zip(case["candidates"], references, strict=True)]
    assert scores == pytest.approx(case["scores"], abs=1e-9)
