"""The demo's held-out questions as a task of `opsin eval`: drawn pictures, eighteen kinds of questions."""

from opsin.demo.tasks import heldout_questions, sample
from opsin.evaluate.examples import Example
from opsin.evaluate.tasks import Task, TaskSettings

SEED, PER_TASK = 0, 40
SETTINGS = TaskSettings(name="demo", metric="exact_match", parser="words-ignoring-case", max_new_tokens=24)


def make(limit: int | None = None) -> Task:
    """The questions that a default run of `opsin demo` asks, grouped by kind. limit: the first so many."""
    items = heldout_questions(SEED, per_task=PER_TASK)[:limit]
    pictures = {index: sample(SEED, index, "heldout").picture for index in {item.index for item in items}}
    examples = [
        Example(
            str(number),
            item.question.text,
            (pictures[item.index],),
            reference=(item.question.answer,),
            group=item.question.task,
            picture=f"scene {item.index}",
        )
        for number, item in enumerate(items, start=1)
    ]
    return Task(SETTINGS.replace(limit=limit), examples, f"demo {SEED} {PER_TASK} {limit}")
