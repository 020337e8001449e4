"""Samples from a seed: one or two pictures, or a clip, with questions of several tasks and their answers."""

import random
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

from opsin.demo.scene import Split
from opsin.mini.exercises import EXERCISES
from opsin.mini.practice import PRACTICE
from opsin.mini.scenes import chart, clip, objects, reading, two_pictures
from opsin.mini.tasks import TASKS, Asked, Question, Sample

SHARES = (0.42, 0.22, 0.09, 0.14, 0.13)
"""How often a sample is a picture of things, of writing, or of bars, two pictures, or a clip."""
TELLING = {"describe", *EXERCISES, *PRACTICE}
"""Whose answers say much."""


def with_practice(factor: float) -> dict[str, Asked]:
    """The tasks, and beside them what is practised, at so many times its weights."""
    return TASKS | {name: (maker, wordings, factor * weight) for name, (maker, wordings, weight) in PRACTICE.items()}


def sample(
    seed: int,
    index: int,
    split: Split,
    *,
    num_questions: int = 8,
    shares: tuple[float, ...] = SHARES,
    tasks: Mapping[str, Asked] | None = None,
) -> Sample:
    """Sample `index` of a split: a pure function of its arguments.

    tasks: what to ask; where it is not given, the tasks and in training the exercises.
    """
    rng = random.Random(f"mini/{seed}/{split}/{index}")
    if tasks is None:
        tasks = TASKS | EXERCISES if split == "train" else TASKS
    while True:
        shown = _show(rng, split, shares)
        if questions := ask(shown, rng, split, tasks=tasks, num_questions=num_questions):
            return replace(shown, questions=questions)


def _show(rng: random.Random, split: Split, shares: tuple[float, ...]) -> Sample:
    things, writing, bars, two, _ = accumulate(shares)
    dice = rng.random()
    if dice < things:
        return Sample(pictures=(objects(rng, split),))
    if dice < writing:
        return Sample(pictures=(reading(rng, split),))
    if dice < bars:
        return Sample(pictures=(chart(rng, split),))
    if dice < two:
        return Sample(pictures=two_pictures(rng, split))
    return Sample(clip=clip(rng, split))


def ask(
    shown: Sample,
    rng: random.Random,
    split: Split,
    *,
    tasks: Mapping[str, Asked],
    num_questions: int,
) -> tuple[Question, ...]:
    """Questions of as many tasks as the sample allows; of those with a larger weight more often, up to four of each."""
    found: list[tuple[float, Question]] = []
    seen: set[str] = set()
    for round_ in range(4):
        for task, (maker, phrasings, weight) in tasks.items():
            for target, answer, *boxes in maker(shown, rng, split):
                text = rng.choice(phrasings).format(**target)
                told: tuple[tuple[str, str], ...] = ()
                if isinstance(answer, list):
                    # In any order, so that nothing but the name tells which one is meant.
                    told = tuple(rng.sample(answer, len(answer)))
                    answer = f"{', '.join(' '.join(part) for part in told)}."
                # Drawn without replacement, in proportion to the weights (Efraimidis and Spirakis, 2006).
                rank = rng.random() ** (1 / weight) / (1 + round_)
                if (key := f"{task} {target}") not in seen:
                    seen.add(key)
                    found.append((rank, Question(task, text, answer, tuple(boxes), told)))
    best = sorted(found, key=lambda each: -each[0])[:num_questions]
    questions = [question for _, question in best]
    rng.shuffle(questions)
    # Long answers tell what others ask for, which can then be read in the text; so every other time they come last.
    if rng.random() < 0.5:
        questions.sort(key=lambda question: question.task in TELLING)
    return tuple(questions)
