"""Asking the trained model questions about pictures that it never saw, and scoring the answers against two controls."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opsin.demo.tasks import HeldOutQuestion, is_right, sample
from opsin.encode import Encoder
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.inspect.parts import Scores
from opsin.nn.vlm import VLM
from opsin.text.messages import ask

BATCH = 48
"""Questions that are answered side by side."""
LONGEST = 24
"""Tokens of the longest answer: a row of three shapes."""


@dataclass(frozen=True)
class Asked:
    """One question, what the model said about its picture, and what it said about another one."""

    item: HeldOutQuestion
    answer: str
    shuffled_answer: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the picture's."""
        return is_right(self.answer, self.item.question.answer)


def ask_all(
    vlm: VLM,
    encoder: Encoder,
    items: Sequence[HeldOutQuestion],
    *,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Asked]:
    """Answer every question twice: about its own picture, and about the picture of another question of its task.

    on_progress: called with the number of answers given and of all.
    """
    partners = _partners(items)
    pictures = {index: sample(seed, index, "heldout").picture for index in {item.index for item in items}}
    jobs = [(item, item.index) for item in items] + list(zip(items, partners, strict=True))
    answers: list[str] = []
    for start in range(0, len(jobs), BATCH):
        batch = jobs[start : start + BATCH]
        encoded = [encoder.encode(ask(item.question.text, pictures[index])) for item, index in batch]
        given = generate(vlm, encoded, encoder.tokenizer, Sampling(max_new_tokens=LONGEST))
        answers += [answer.text for answer in given]
        on_progress(len(answers), len(jobs))
    own, shuffled = answers[: len(items)], answers[len(items) :]
    return [Asked(*each) for each in zip(items, own, shuffled, strict=True)]


def _partners(items: Sequence[HeldOutQuestion]) -> list[int]:
    """For each question the picture of another one of its task: the next, skipping its own picture."""
    by_task: dict[str, list[int]] = {}
    for item in items:
        by_task.setdefault(item.question.task, []).append(item.index)
    partners, seen = [], Counter[str]()
    for item in items:
        pictures = by_task[item.question.task]
        place = seen[item.question.task]
        seen[item.question.task] += 1
        others = (pictures[(place + step) % len(pictures)] for step in range(1, len(pictures)))
        partners.append(next((index for index in others if index != item.index), item.index))
    return partners


def scores_by_task(asked: Sequence[Asked]) -> dict[str, Scores]:
    """Accuracy, majority baseline and shuffled control of each task, in order of appearance."""
    tasks: dict[str, list[Asked]] = {}
    for one in asked:
        tasks.setdefault(one.item.question.task, []).append(one)
    return {task: _scores(each) for task, each in tasks.items()}


def _scores(asked: Sequence[Asked]) -> Scores:
    truths = [one.item.question.answer for one in asked]
    (_, commonest), *_ = Counter(truths).most_common(1)
    shuffled = sum(is_right(one.shuffled_answer, truth) for one, truth in zip(asked, truths, strict=True))
    count = len(asked)
    return Scores(sum(one.is_right for one in asked) / count, commonest / count, shuffled / count, count)


def mean_scores(tasks: Mapping[str, Scores]) -> Scores:
    """Every task counts the same, whatever its number of questions."""
    each = list(tasks.values())
    return Scores(
        accuracy=sum(s.accuracy for s in each) / len(each),
        majority=sum(s.majority for s in each) / len(each),
        shuffled=sum(s.shuffled for s in each) / len(each),
        questions=sum(s.questions for s in each),
    )
