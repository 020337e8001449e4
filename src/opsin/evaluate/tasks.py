"""Tasks: examples, the prompt around their questions, the parser of answers, the metric, and how answers are generated.

    --task vqa --data FILE             one of `DEFAULTS`, on the user's own rows
    --task my_task.yaml                the same keys in a file: TaskSettings
    --task NAME                        one of `MADE`, whose examples a function makes

A task made in Python is `Task(settings, examples, fingerprint)`, where examples are any sequence of `Example`; the name
of a group on each gives figures by group and their macro average.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from opsin.errors import ConfigError, nearest, unknown
from opsin.evaluate.examples import Example
from opsin.evaluate.metrics import METRICS, RETRIEVAL
from opsin.evaluate.rows import Kind, Rows
from opsin.spec.base import Spec
from opsin.spec.grounding import Space
from opsin.weights.config import read_yaml

SHORT = "{}\nAnswer the question using a single word or phrase."
"""LLaVA-1.5's prompt for short answers (arXiv:2310.03744 table 7)."""
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}"
CAPTION = "Provide a one-sentence caption for the provided image."
"""LLaVA-1.5's."""


class TaskSettings(Spec):
    """Everything about a task but its examples. The keys of a task file."""

    name: str
    """What results call it."""
    metric: str
    """exact_match, choice, vqa_accuracy, anls, relaxed_accuracy, pope, cider_d, iou, or retrieval."""
    group_metrics: Mapping[str, str] = Field(default_factory=dict)
    """Metrics of single groups, where they are not judged by `metric`."""
    parser: str | None = None
    """How outputs are read (`evaluate.parsers`); the metric's own when not given."""
    prompt: str = "{}"
    """What is said to the model; {} stands for the question."""
    asks_by_name: bool = True
    """Whether questions about boxes are names of things, which families with marks for names put between them; else
    they are asked as they are written."""
    max_new_tokens: PositiveInt = 32
    """Longest answer."""
    beams: PositiveInt | None = None
    """Search for the likeliest answer with so many beams; without, the likeliest token is taken every time."""
    length_penalty: float = 1.0
    """Of the search: above 0 long answers gain, below 0 short ones."""
    data: str | None = None
    """File of rows: JSON, JSON lines, parquet, tar shards, COCO, VQA v2 or ScienceQA."""
    image_root: str | None = None
    """Where relative picture paths start from; the folder of `data` when not given."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """Names that the file has for our keys, {ours: theirs}: {question: q, image: img}."""
    group: str = "group"
    """Key of a row whose value is its group."""
    limit: PositiveInt | None = None
    """The first so many rows. A figure on a part of a benchmark is not comparable with published ones."""
    format: Literal["auto", "json", "parquet", "tar", "arrow"] = "auto"
    """What kind of file it is."""
    answers: str | None = None
    """VQA v2: the file of annotations, where it has another name than published."""
    split: str | None = None
    """ScienceQA: one of pid_splits.json."""
    box: Literal["xywh", "xyxy"] = "xywh"
    """What the four numbers of a row's `bbox` are."""
    box_space: Space = "pixels"
    """What they count."""
    rescore: Annotated[int, Field(ge=0)] = 128
    """Retrieval: of each ranking by contrast so many are read again by the matching head; 0 for contrast alone."""

    @model_validator(mode="after")
    def _hold_together(self) -> Self:
        for name in (self.metric, *self.group_metrics.values()):
            if name not in METRICS:
                raise ValueError(f"no metric {name!r}{nearest(name, METRICS)}; known: {', '.join(METRICS)}")
        metrics = {self.metric, *self.group_metrics.values()}
        if RETRIEVAL in metrics and len(metrics) > 1:
            raise ValueError("retrieval asks no questions, so it cannot stand beside other metrics")
        parsers = METRICS[self.metric].parsers
        if self.parser is not None and self.parser not in parsers:
            hint, takes = nearest(self.parser, parsers), ", ".join(parsers) or "none"
            raise ValueError(f"no parser {self.parser!r}{hint} for {self.metric}; it takes: {takes}")
        if self.prompt.count("{}") > 1:
            raise ValueError(f"the prompt {self.prompt!r} has {{}} {self.prompt.count('{}')} times; once is enough")
        if self.beams is None and self.length_penalty != 1.0:
            raise ValueError("length_penalty has no effect without beams")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """All metrics in use."""
        return tuple(dict.fromkeys((self.metric, *self.group_metrics.values())))

    def parser_of(self, metric: str) -> str:
        """The parser of one of the metrics."""
        return self.parser if self.parser is not None and metric == self.metric else METRICS[metric].parsers[0]

    def metric_of(self, group: str) -> str:
        """What a group is judged by."""
        return self.group_metrics.get(group, self.metric)


@dataclass(frozen=True)
class Task:
    """Something to evaluate."""

    settings: TaskSettings
    examples: Sequence[Example]
    fingerprint: str
    """A digest of everything that decides the examples."""

    @property
    def light(self) -> Sequence[Example]:
        """The examples as scoring needs them: of tables without the bytes of pictures, unless their sizes count."""
        is_big = isinstance(self.examples, Rows) and "iou" not in self.settings.metrics
        return self.examples.light if is_big and isinstance(self.examples, Rows) else self.examples


DEFAULTS: Mapping[str, TaskSettings] = {
    settings.name: settings
    for settings in (
        TaskSettings(name="exact", metric="exact_match"),
        TaskSettings(
            name="choice",
            metric="choice",
            prompt="{}\nAnswer with the option's letter from the given choices directly.",
            max_new_tokens=16,
        ),
        TaskSettings(name="vqa", metric="vqa_accuracy", prompt=SHORT, max_new_tokens=16),
        TaskSettings(name="anls", metric="anls", prompt=SHORT),
        TaskSettings(name="relaxed", metric="relaxed_accuracy", prompt=SHORT, max_new_tokens=16, group="type"),
        TaskSettings(name="pope", metric="pope", prompt=SHORT, max_new_tokens=16, group="category"),
        TaskSettings(name="captions", metric="cider_d", prompt=CAPTION, max_new_tokens=64),
        TaskSettings(name="box", metric="iou", prompt=LOCATE, max_new_tokens=64),
        TaskSettings(name="retrieval", metric=RETRIEVAL),
    )
}
"""Tasks on rows of the user's own."""

MADE: Mapping[str, str] = {"demo": "opsin.demo.evaluation:make", "mini": "opsin.mini.evaluation:make"}
"""Tasks whose examples are made: name to `module:function`, which takes `limit` (int or None) and gives a Task."""

_ABOUT_ROWS = {"data", "image_root", "columns", "group", "format", "answers", "split", "box", "box_space"}
"""Settings that mean nothing to a task without rows."""

_KINDS: Mapping[str, Kind] = {
    "exact_match": "answers",
    "anls": "answers",
    "relaxed_accuracy": "answers",
    "vqa_accuracy": "ten_answers",
    "choice": "choice",
    "pope": "pope",
    "cider_d": "captions",
    RETRIEVAL: "captions",
    "iou": "box",
}


def read_settings(name: str) -> TaskSettings:
    """Settings of a built-in task, or of a YAML file. Raises UnknownNameError with the nearest name, or ConfigError."""
    path = Path(name).expanduser()
    if name in DEFAULTS:
        return DEFAULTS[name]
    if path.suffix in (".yaml", ".yml") or path.is_file():
        data = read_yaml(path, "a task file: it should hold keys such as metric, data and prompt")
        base = data.pop("task", None)
        if base is not None and base not in DEFAULTS:
            raise ConfigError(f"{path}: no task {base!r}{nearest(str(base), DEFAULTS)}; known: {', '.join(DEFAULTS)}")
        begun = DEFAULTS[base].model_dump(exclude_unset=True) if base is not None else {}
        return TaskSettings.parse({**begun, "name": path.stem, **data}, where=str(path))
    raise unknown("task", name, (*DEFAULTS, *MADE))


def open_task(name: str, **changes: object) -> Task:
    """A task by its name or file, its rows read and checked. changes: settings in place of its own.

    Raises UnknownNameError, ConfigError, or BadRecord for the first row that cannot be used.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    if name in MADE:
        for key in sorted(given.keys() & _ABOUT_ROWS):
            raise ConfigError(f"the task {name} makes its own examples: it takes no {key}")
        module, _, function = MADE[name].partition(":")
        made = getattr(import_module(module), function)(limit=given.pop("limit", None))
        assert isinstance(made, Task)
        return replace(made, settings=made.settings.replace(**given))
    settings = read_settings(name).replace(**given)
    if settings.data is None:
        raise ConfigError(f"the task {settings.name} asks about data of your own: give --data FILE")
    if len(settings.metrics) > 1:
        raise ConfigError("group_metrics are for tasks made in Python; a file of rows has one metric")
    rows = Rows(
        settings.data,
        _KINDS[settings.metric],
        image_root=settings.image_root,
        columns=settings.columns,
        group=settings.group,
        box=settings.box,
        box_space=settings.box_space,
        limit=settings.limit,
        container=settings.format,
        answers=settings.answers,
        split=settings.split,
    )
    return Task(settings, rows, fingerprint(rows.light, f"{rows.fingerprint} {settings.columns}"))


def fingerprint(examples: Sequence[Example], source: str) -> str:
    """A digest of what is asked and what is right. Groups are left out: others may be chosen for the same outputs."""
    digest = hashlib.sha256(source.encode())
    for each in examples:
        asked = [each.key, each.question, each.reference, each.options, None if each.box is None else each.box.points]
        digest.update(json.dumps(asked).encode())
    return digest.hexdigest()
