"""The retrieval task: every picture with every caption, by a model that compares (`opsin.match`)."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from opsin import match
from opsin.errors import ConfigError, OpsinError
from opsin.evaluate.controls import partners
from opsin.evaluate.examples import Example
from opsin.evaluate.figures import Figure, Scored, figures_of
from opsin.evaluate.folder import FORMAT, OUTPUTS, begin, write_scores, write_whole
from opsin.evaluate.identity import described, model_digest
from opsin.evaluate.metrics import RETRIEVAL
from opsin.evaluate.progress import Reporter, Silence
from opsin.evaluate.retrieval import CUTOFFS, chance, hits, positives, ranks
from opsin.evaluate.run import write_results
from opsin.evaluate.scoring import SHUFFLE_SEED
from opsin.evaluate.tasks import Task
from opsin.match import Matcher
from opsin.media.image import ImageMode, ImageSource
from opsin.text.cleaning import clean_caption

TO_TEXT, TO_PICTURE = "picture to text", "text to picture"
"""The two directions, which are groups of the result. Papers call them TR and IR."""
SHOWN = 10
"""Candidates of each ranking that outputs.jsonl keeps."""


class Pictures(Sequence[ImageSource]):
    """The pictures of some examples, opened when they are asked for."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> ImageSource: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ImageSource]: ...
    def __getitem__(self, index: int | slice) -> ImageSource | Sequence[ImageSource]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self.examples[index].images[0]


def evaluate_retrieval(
    task: Task,
    model: str,
    folder: str | Path,
    *,
    controls: Sequence[str] = (),
    image_mode: ImageMode = "display",
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int = 16,
    reporter: Reporter | None = None,
    load: Callable[..., Matcher] = match.load,
) -> dict[str, Any]:
    """Rank and write results, like `run.Evaluation`; the contents of results.json. All or nothing: it does not resume.

    Raises ConfigError for the control `text-only`, which needs questions.
    """
    if "text-only" in controls:
        raise ConfigError("retrieval without pictures is no task: use --control shuffled, and see the level of chance")
    started, reporter, folder = time.perf_counter(), reporter or Silence(), Path(folder)
    examples, settings = task.light, task.settings
    run = {
        "format": FORMAT,
        "task": settings.name,
        "model": described(model),
        "model_digest": model_digest(model),
        "data": task.fingerprint,
        "examples": len(examples),
        "rescored": settings.rescore,
        "text_form": "cleaned",
        "dtype": dtype,
        "image_mode": image_mode,
    }
    try:
        matcher = load(model, image_mode=image_mode, device=device, dtype=dtype)
    except OpsinError as error:
        needed = "retrieval needs a model that compares pictures with texts, such as blip2-itm-vit-g"
        raise type(error)(f"{error}; {needed}") from None
    matcher.batch_size = batch_size
    begin(folder, run)
    texts = [caption for example in examples for caption in example.reference]
    owners = [place for place, example in enumerate(examples) for _ in example.reference]
    reporter.begin(len(examples), 0)
    try:
        scores = matcher.similarity(
            Pictures(task.examples), texts, num_rescored=settings.rescore, on_progress=reporter.advance
        )
    finally:
        reporter.end()
    # Captions are equal where the model reads the same words.
    cleaned = [clean_caption(text) for text in texts]
    right = positives([[clean_caption(each) for each in example.reference] for example in examples], cleaned)
    scored = {"": _scored(examples, owners, right, scores.by_picture, scores.by_text)}
    figures = {"": figures_of(scored[""])}
    if "shuffled" in controls:
        partner = partners(examples, seed=SHUFFLE_SEED)  # picture i stands where picture partner[i] stood
        moved = scores.by_picture[partner], scores.by_text[partner]
        scored["shuffled"] = _scored(examples, owners, right, *moved)
        figures["shuffled"] = figures_of(scored["shuffled"])
    figures["chance"] = _chance(right)
    write_whole(folder / OUTPUTS, _rankings(examples, texts, scores.by_picture, scores.by_text))
    write_scores(folder, scored)
    return write_results(
        folder,
        run,
        task=task,
        parsers={},
        figures=figures,
        pictures=len(examples),
        notes=_notes(len(examples), len(texts), settings.rescore),
        seconds=time.perf_counter() - started,
        asked=len(examples),
        device=device,
    )


def _scored(
    examples: Sequence[Example],
    owners: Sequence[int],
    right: NDArray[np.bool_],
    by_picture: NDArray[np.float64],
    by_text: NDArray[np.float64],
) -> list[Scored]:
    """Every query of both directions. A text belongs to the cluster of its picture."""
    of_pictures, of_texts = ranks(by_picture, right), ranks(by_text.T, right.T)
    found = [
        Scored(example.key, example.cluster, TO_TEXT, RETRIEVAL, int(rank), (*map(float, hit), 1.0))
        for example, rank, hit in zip(examples, of_pictures, hits(of_pictures), strict=True)
    ]
    for number, (owner, rank, hit) in enumerate(zip(owners, of_texts, hits(of_texts), strict=True)):
        key, cluster = f"text {number + 1}", examples[owner].cluster
        found.append(Scored(key, cluster, TO_PICTURE, RETRIEVAL, int(rank), (*map(float, hit), 1.0)))
    return found


def _chance(right: NDArray[np.bool_]) -> list[Figure]:
    """The figures of a random order."""
    found = []
    values = {TO_TEXT: chance(right), TO_PICTURE: chance(right.T)}
    counts = dict(zip(values, right.shape, strict=True))
    values["macro average"] = sum(values.values(), np.zeros(len(CUTOFFS))) / 2
    counts["macro average"] = sum(right.shape)
    for group, recalls in values.items():
        found += [
            Figure(group, f"R@{k}", float(value), None, None, counts[group])
            for k, value in zip(CUTOFFS, recalls, strict=True)
        ]
    return found


def _rankings(
    examples: Sequence[Example], texts: Sequence[str], by_picture: NDArray[np.float64], by_text: NDArray[np.float64]
) -> str:
    """The best candidates of every query, a line each."""
    lines = []
    for example, row in zip(examples, by_picture, strict=True):
        best = np.argsort(-row, kind="stable")[:SHOWN]
        shown = [{"text": texts[place], "score": round(float(row[place]), 5)} for place in best]
        lines.append({"direction": TO_TEXT, "key": example.key, "best": shown})
    for number, (text, column) in enumerate(zip(texts, by_text.T, strict=True), start=1):
        best = np.argsort(-column, kind="stable")[:SHOWN]
        ranked = [{"key": examples[place].key, "score": round(float(column[place]), 5)} for place in best]
        lines.append({"direction": TO_PICTURE, "key": f"text {number}", "text": text, "best": ranked})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _notes(pictures: int, texts: int, rescored: int) -> list[str]:
    read = f"the best {rescored} of each ranking by matching and contrast together" if rescored else "by contrast alone"
    return [
        f"{pictures} pictures and {texts} texts, {read}: recall falls as candidates are added, so compare only with "
        "figures on equally many"
    ]
