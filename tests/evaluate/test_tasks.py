"""Names, files and settings of tasks."""

from pathlib import Path

import pytest

from evaluations import Writer
from opsin.errors import ConfigError, UnknownNameError
from opsin.evaluate import tasks
from opsin.evaluate.examples import Example
from opsin.evaluate.metrics import METRICS, figure_names
from opsin.evaluate.tasks import DEFAULTS, Task, TaskSettings, open_task


def test_every_default_has_a_metric_with_a_parser_and_a_definition() -> None:
    used = {settings.metric for settings in DEFAULTS.values()}
    assert used == set(METRICS)
    for metric in METRICS.values():
        assert figure_names(metric)
        assert metric.parsers or metric.name == "retrieval"


def test_an_unknown_task_names_the_nearest(write: Writer) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task 'vqaa' \(did you mean 'vqa'"):
        open_task("vqaa", data=str(write({"question": "x", "answer": "y"})))


def test_a_task_of_rows_needs_data() -> None:
    with pytest.raises(ConfigError, match="the task exact asks about data of your own: give --data FILE"):
        open_task("exact")


def test_a_file_says_everything_and_may_begin_with_a_default(write: Writer, tmp_path: Path) -> None:
    data = write({"image": "a.png", "q": "What?", "answer": "x"})
    file = tmp_path / "mine.yaml"
    file.write_text(f"task: vqa\nmetric: anls\ndata: {data}\ncolumns: {{question: q}}\nmax_new_tokens: 8\n")
    task = open_task(str(file))
    assert (task.settings.name, task.settings.metric, task.settings.max_new_tokens) == ("mine", "anls", 8)
    assert task.settings.prompt == DEFAULTS["vqa"].prompt
    assert open_task(str(file), max_new_tokens=9).settings.max_new_tokens == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metrik: anls\nmetric: anls", "unknown key 'metrik' .did you mean 'metric'"),
        ("metric: anl", "no metric 'anl' .did you mean 'anls'"),
        ("metric: pope\nparser: exact", "no parser 'exact'.* for pope; it takes: yes-no-llava, yes-no-exact"),
        ("metric: anls\nprompt: '{} {}'", "2 times; once is enough"),
        ("metric: anls\nlength_penalty: 2", "no effect without beams"),
        ("task: vqaa", "no task 'vqaa' .did you mean 'vqa'"),
        ("- a list", "is not a task file"),
        ("metric: [", "not YAML"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_task(str(file))


def test_a_task_that_makes_its_examples_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "MADE", {"toy": f"{__name__}:make"})
    assert len(open_task("toy", limit=2, data=None).examples) == 2
    assert open_task("toy", prompt="Say {}").settings.prompt == "Say {}"
    with pytest.raises(ConfigError, match="the task toy makes its own examples: it takes no data"):
        open_task("toy", data="rows.jsonl")
    with pytest.raises(UnknownNameError, match=r"toys.*did you mean 'toy'"):
        open_task("toys")


def test_the_demo_s_questions_are_a_task() -> None:
    task = open_task("demo", limit=3)
    assert [each.group for each in task.examples] == ["colour"] * 3
    assert all(each.images and each.reference and each.picture.startswith("scene ") for each in task.examples)


def test_opsin_mini_s_questions_are_a_task_with_boxes() -> None:
    task = open_task("mini", limit=1)
    groups = [each.group for each in task.examples]
    assert len(set(groups)) == len(groups) > 10
    assert all((each.box is not None) == (task.settings.metric_of(each.group) == "iou") for each in task.examples)


def make(limit: int | None = None) -> Task:
    """A task as another part of the library would add one."""
    examples = [Example(str(number), "?", reference=("x",), group="letters") for number in range(5)][:limit]
    return Task(TaskSettings(name="toy", metric="exact_match"), examples, "toy 1")


def test_what_is_asked_decides_the_fingerprint_and_groups_do_not(write: Writer) -> None:
    row = {"image": "a.png", "question": "What?", "answer": "x", "kind": "k"}
    first = open_task("exact", data=str(write(row)))
    assert open_task("exact", data=str(write(row)), group="kind").fingerprint == first.fingerprint
    assert open_task("exact", data=str(write(row | {"answer": "y"}))).fingerprint != first.fingerprint
