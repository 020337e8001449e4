"""The held-out questions of opsin-mini, and its answers to them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opsin.demo.tasks import balanced
from opsin.encode import Encoder
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.mini.model import CHAT
from opsin.mini.talk import question_alone
from opsin.mini.tasks import TASKS, Question, Sample, is_right, sample
from opsin.nn.vlm import VLM
from opsin.text.grounding import spell
from opsin.text.messages import Conversation

PER_TASK = 100
SEED = 1
"""Of the samples; training uses others."""
BATCH = 64
"""Questions that are answered side by side."""
LONGEST = 48
"""Tokens of the longest answer: a description of six things."""


@dataclass(frozen=True)
class HeldOut:
    """One question about one sample of the `heldout` split."""

    index: int
    question: Question

    @property
    def shown(self) -> Sample:
        """The sample."""
        return sample(SEED, self.index, "heldout", num_questions=12)


def heldout(per_task: int = PER_TASK) -> list[HeldOut]:
    """`per_task` questions of every task, answers nearly even (`demo.tasks.balanced`)."""

    def asked(index: int) -> tuple[Question, ...]:
        return sample(SEED, index, "heldout", num_questions=12).questions

    return [HeldOut(*each) for each in balanced(asked, TASKS, per_task=per_task)]


def answers(
    vlm: VLM,
    encoder: Encoder,
    conversations: Sequence[Conversation],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """What the model answers, with the marks of boxes."""
    assert CHAT.grounding is not None
    found: list[str] = []
    for start in range(0, len(conversations), BATCH):
        encoded = [encoder.encode(each) for each in conversations[start : start + BATCH]]
        given = generate(vlm, encoded, encoder.tokenizer, Sampling(max_new_tokens=LONGEST))
        found += [spell(each.ids, encoder.tokenizer, CHAT.grounding) for each in given]
        on_progress(len(found), len(conversations))
    return found


def accuracies(vlm: VLM, encoder: Encoder, *, per_task: int) -> dict[str, tuple[float, float]]:
    """Accuracy of each task, and what always giving its commonest answer would earn."""
    items = heldout(per_task)
    given = answers(vlm, encoder, [question_alone(item.shown, item.question) for item in items])
    found: dict[str, tuple[float, float]] = {}
    for task in TASKS:
        mine = [
            (item.question, answer) for item, answer in zip(items, given, strict=True) if item.question.task == task
        ]
        ((_, commonest),) = Counter(question.answer for question, _ in mine).most_common(1)
        majority = 0.0 if task == "box" else commonest / len(mine)
        found[task] = sum(is_right(*each) for each in mine) / len(mine), majority
    return found
