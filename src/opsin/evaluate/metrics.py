"""Every metric under one shape: what an example adds to some sums, and how sums become figures.

    output --parser--> parsed --Metric.prepare(...)--> sums of one example --added up--> Metric.combine --> figures

So one piece of code gives the figures of all, of each group, and of every resample of a bootstrap.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opsin.errors import DataError
from opsin.evaluate.answers import anls, relaxed_accuracy
from opsin.evaluate.boxes import THRESHOLD, iou
from opsin.evaluate.captions import Cider, caption_words
from opsin.evaluate.examples import Example
from opsin.evaluate.parsers import BOX_PARSERS, Parsed, Parser, picture_size
from opsin.evaluate.pope import counts, pope_figures, ratio
from opsin.evaluate.retrieval import CUTOFFS
from opsin.evaluate.vqa import agreement
from opsin.media.image import ImageMode

Sums = tuple[float, ...]
Score = Callable[[Parsed, Example], Sums]
"""What one parsed output adds; the last number is always 1, the count of examples."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One way to judge."""

    name: str
    about: str
    parsers: tuple[str, ...]
    """Those that it takes; the first is the default."""
    num_sums: int
    prepare: Callable[[Sequence[Example], Parser, ImageMode], Score]
    """Scoring for one task's examples: caption metrics weigh words by all references."""
    combine: Callable[[Array], dict[str, Array]]
    """(..., num_sums) -> each figure (...,); the first is the headline."""
    closed: bool = False
    """Whether always giving the commonest answer is a baseline worth knowing."""
    pooled: bool = True
    """Whether examples of all groups together make a figure."""


def figure_names(metric: Metric) -> tuple[str, ...]:
    """Names of its figures, the headline first."""
    return tuple(metric.combine(np.zeros(metric.num_sums)))


def _mean(figure: str) -> Callable[[Array], dict[str, Array]]:
    return lambda sums: {figure: ratio(sums[..., 0], sums[..., -1])}


def _mean_and_unparsed(figure: str) -> Callable[[Array], dict[str, Array]]:
    def combine(sums: Array) -> dict[str, Array]:
        return {
            figure: ratio(sums[..., 0], sums[..., -1]),
            "unparsed": ratio(sums[..., 1], sums[..., -1]),
        }

    return combine


def _exact(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    return lambda parsed, example: (float(parsed in [parser.text(each) for each in example.reference]), 1.0)


def _choice(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    return lambda parsed, example: (float(parsed in example.reference), float(parsed is None), 1.0)


def _vqa(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    return lambda parsed, example: (agreement(str(parsed), [parser.text(each) for each in example.reference]), 1.0)


def _anls(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    return lambda parsed, example: (anls(str(parsed), example.reference), 1.0)


def _relaxed(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    return lambda parsed, example: (max(relaxed_accuracy(str(parsed), each) for each in example.reference), 1.0)


def _pope(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    return lambda parsed, example: counts(None if parsed is None else str(parsed), example.reference[0])


def _cider(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    if len(examples) < 2:
        raise DataError(
            "CIDEr-D needs at least two pictures: with one, every word weighs log(1 / 1) = 0 and so do scores"
        )
    references = {each.key: [caption_words(caption) for caption in each.reference] for each in examples}
    cider = Cider(list(references.values()))

    def score(parsed: Parsed, example: Example) -> Sums:
        assert isinstance(parsed, list)
        return cider.score([str(word) for word in parsed], references[example.key]), 1.0

    return score


def _boxes(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    sides = {each.key: _sides(each, mode) for each in examples}  # before anything is asked

    def score(parsed: Parsed, example: Example) -> Sums:
        if parsed is None:
            return 0.0, 0.0, 1.0, 1.0
        assert isinstance(parsed, list)
        overlap = iou([float(each) for each in parsed], sides[example.key])
        return float(overlap >= THRESHOLD), overlap, 0.0, 1.0

    return score


def _sides(example: Example, mode: ImageMode) -> tuple[float, float, float, float]:
    """The true box in pixels of its picture. Raises DataError where it leaves it by more than rounding."""
    assert example.box is not None
    size = picture_size(example, mode)
    left, top, right, bottom = example.box.sides
    if example.box.space != "pixels":
        return example.box.to("pixels", size).sides
    if right > size[0] + 1 or bottom > size[1] + 1:
        raise DataError(
            f"example {example.key}: its box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) leaves the picture of "
            f"{size[0]}x{size[1]} px",
            kind="box",
            fix="write `box: xyxy` into a task file if its numbers are corners, or give the picture at its own size",
        )
    return left, top, min(right, size[0]), min(bottom, size[1])


def _box_figures(sums: Array) -> dict[str, Array]:
    hit, overlap, unparsed, count = np.moveaxis(sums, -1, 0)
    return {"acc@0.5": ratio(hit, count), "mean IoU": ratio(overlap, count), "unparsed": ratio(unparsed, count)}


def _recalls(sums: Array) -> dict[str, Array]:
    return {f"R@{k}": ratio(sums[..., place], sums[..., -1]) for place, k in enumerate(CUTOFFS)}


def _by_matching(examples: Sequence[Example], parser: Parser, mode: ImageMode) -> Score:
    raise AssertionError("retrieval has no outputs to parse (evaluate.matching)")


RETRIEVAL = "retrieval"
_ALL = (
    Metric(
        "exact_match",
        "the answer is one of the right ones, word for word",
        ("words", "words-ignoring-case", "vqa"),
        2,
        _exact,
        _mean("exact match"),
        closed=True,
    ),
    Metric(
        "choice",
        "the right letter of a multiple choice",
        ("choice-letter", "choice-first-letter"),
        3,
        _choice,
        _mean_and_unparsed("accuracy"),
        closed=True,
    ),
    Metric("vqa_accuracy", "agreement with ten people", ("vqa",), 2, _vqa, _mean("VQA accuracy"), closed=True),
    Metric("anls", "edit distance to the nearest right answer", ("stripped",), 2, _anls, _mean("ANLS")),
    Metric(
        "relaxed_accuracy",
        "numbers within 5 %, else the same text",
        ("stripped",),
        2,
        _relaxed,
        _mean("relaxed accuracy"),
    ),
    Metric(
        "pope", "yes or no: is the object there", ("yes-no-llava", "yes-no-exact"), 6, _pope, pope_figures, closed=True
    ),
    Metric("cider_d", "words and phrases shared with people's captions", ("ptb-words",), 2, _cider, _mean("CIDEr-D")),
    Metric("iou", "the first box overlaps the right one by half or more", BOX_PARSERS, 4, _boxes, _box_figures),
    Metric(RETRIEVAL, "a right candidate is among the first K", (), 4, _by_matching, _recalls, pooled=False),
)
METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
"""All metrics by name. Retrieval compares pictures with texts and asks no questions (`evaluate.matching`)."""
