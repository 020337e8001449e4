"""Accuracy on the test split, against always saying the commoner answer, other pictures, and no picture at all."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from experiments.nlvr.data import Example, opened
from experiments.nlvr.scenes import blank
from PIL import Image

from opsin.encode import Encoder
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.text.messages import ask
from opsin.weights import Model

BATCH = 50
RESAMPLES = 10_000
KINDS: tuple[tuple[str, str], ...] = (
    ("towers", r"tower|block"),
    ("walls, corners", r"touch|corner|wall|edge"),
    ("boxes", r"\bbox|grey"),
    ("other", r""),
)
"""Kinds of sentences: the first whose pattern occurs counts."""
Picture = Callable[[int], Image.Image]


VIEWS = ("own", "shuffled", "blank")
"""What is shown: the sentence's picture, that of another sentence, or three empty boxes."""


def ask_all(
    model: Model, examples: Sequence[Example], *, views: Sequence[str] = VIEWS, seed: int = 0
) -> dict[str, tuple[str, ...]]:
    """What the model says to every sentence, by what it is shown."""
    partners = derangement([each.group for each in examples], random.Random(f"shuffled/{seed}"))
    pictures: dict[str, Picture] = {
        "own": lambda index: opened(examples[index].image),
        "shuffled": lambda index: opened(examples[partners[index]].image),
        "blank": lambda index: blank(),
    }
    return {view: _asked(model, examples, pictures[view]) for view in views}


def _asked(model: Model, examples: Sequence[Example], picture: Picture) -> tuple[str, ...]:
    encoder = Encoder(model.config, model.tokenizer)
    answers: list[str] = []
    for start in range(0, len(examples), BATCH):
        numbers = range(start, min(start + BATCH, len(examples)))
        prompts = [encoder.encode(ask(examples[number].sentence, picture(number))) for number in numbers]
        given = generate(model.vlm.eval(), prompts, model.tokenizer, Sampling(max_new_tokens=2))
        answers += [answer.text.strip() for answer in given]
    return tuple(answers)


def derangement(groups: Sequence[str], rng: random.Random) -> list[int]:
    """For each example the number of one of another group, every number once."""
    order = list(range(len(groups)))
    rng.shuffle(order)
    for place, number in enumerate(order):
        if groups[number] != groups[place]:
            continue
        for other in rng.sample(range(len(order)), len(order)):
            if groups[order[other]] != groups[place] and groups[number] != groups[other]:
                order[place], order[other] = order[other], number
                break
    return order


def kind_of(sentence: str) -> str:
    """Which of KINDS a sentence is."""
    return next(name for name, pattern in KINDS if re.search(pattern, sentence))


def interval(right: Sequence[bool], groups: Sequence[str], *, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of a share. Whole sets are drawn: up to four pictures have the same sentence."""
    names = sorted(set(groups))
    number = {name: index for index, name in enumerate(names)}
    hits, sizes = np.zeros(len(names)), np.zeros(len(names))
    for is_right, group in zip(right, groups, strict=True):
        hits[number[group]] += is_right
        sizes[number[group]] += 1
    drawn = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    shares = hits[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(low), float(high)


def table(answers: Mapping[str, Sequence[str]], examples: Sequence[Example], *, majority: str) -> list[dict[str, Any]]:
    """One row for all examples and one per kind. majority: the commoner answer of the training split."""
    rows = []
    kinds = [kind_of(example.sentence) for example in examples]
    for kind in ("all", *(name for name, _ in KINDS)):
        chosen = [index for index in range(len(examples)) if kind in ("all", kinds[index])]
        if not chosen:
            continue
        truth = [examples[index].answer for index in chosen]
        groups = [examples[index].group for index in chosen]
        row: dict[str, Any] = {"kind": kind, "sentences": len(chosen), "majority": truth.count(majority) / len(truth)}
        for view, given in answers.items():
            right = [given[index] == wanted for index, wanted in zip(chosen, truth, strict=True)]
            row[view] = sum(right) / len(right)
            row[f"{view}_interval"] = interval(right, groups)
        rows.append(row)
    return rows
