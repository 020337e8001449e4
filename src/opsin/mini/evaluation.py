"""opsin-mini's own task, `opsin eval opsin-mini --task mini`: questions about drawings that training never showed."""

from functools import cache

from opsin.demo.drawn import draw
from opsin.demo.tasks import balanced
from opsin.evaluate.examples import Example
from opsin.evaluate.tasks import Task, TaskSettings
from opsin.mini.samples import sample
from opsin.mini.tasks import TASKS, Question, Sample

PER_TASK = 100
SEED = 1
"""Of the samples; training uses others."""
NUM_QUESTIONS = 12
"""Asked about one sample, of which `balanced` takes some."""
SETTINGS = TaskSettings(
    name="mini",
    metric="exact_match",
    parser="words-ignoring-case",
    group_metrics={"box": "iou"},
    asks_by_name=False,
    max_new_tokens=48,  # the longest is a description of six things
)


@cache
def shown(index: int) -> Sample:
    """Sample `index` of the held-out ones."""
    return sample(SEED, index, "heldout", num_questions=NUM_QUESTIONS)


def heldout(per_task: int = PER_TASK) -> list[tuple[int, Question]]:
    """`per_task` questions of every task with the numbers of their samples, answers nearly even."""
    return balanced(lambda index: shown(index).questions, TASKS, per_task=per_task)


def make(limit: int | None = None) -> Task:
    """The questions, grouped by task. limit: so many of each task in place of PER_TASK."""
    per_task = limit or PER_TASK

    examples = []
    for number, (index, question) in enumerate(heldout(per_task), start=1):
        one = shown(index)
        examples.append(
            Example(
                str(number),
                question.text,
                tuple(draw(scene) for scene in one.pictures),
                (tuple(draw(frame) for frame in one.clip.frames),) if one.clip else (),
                reference=(question.answer,),
                box=question.box,
                group=question.task,
                picture=f"sample {index}",
            )
        )
    return Task(SETTINGS.replace(limit=limit), examples, f"mini {SEED} {per_task}")
