"""`opsin eval` as people use it, with a tiny model: real answers, files, errors, Ctrl-C, comparing."""

import json
from pathlib import Path

import pytest

from evaluations import Puppet, Writer, writer
from opsin.evaluate import answering, run


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Writer:
    monkeypatch.chdir(tmp_path)
    return writer(tmp_path)


ROWS = [
    {"image": "a.png", "question": "What is it?", "answer": "x", "group": "one"},
    {"image": "b.png", "question": "What else?", "answer": "y", "group": "two"},
    {"image": "a.png", "question": "And this, which is longer?", "answer": "y", "group": "two"},
]


def test_a_model_is_evaluated_with_controls(opsin, model, write):
    data = write(*ROWS)
    controls = ("--control", "shuffled", "--control", "text-only", "--max-new-tokens", 6)
    done = opsin("eval", model, "--task", "exact", "--data", data, *controls)
    assert done.code == 0, done.err
    for word in ("exact match", "95 % interval", "shuffled", "text-only", "majority", "macro average", "parser words"):
        assert word in done.out, done.out
    assert "9/9 answers" in done.out
    assert "3 of 3 outputs were cut off at 6 tokens" in done.out
    out = Path("evals/exact/tiny")
    assert f"outputs, scores and results: {out}" in done.out
    results = json.loads((out / "results.json").read_text())
    assert results["prompt"] == "{}"
    assert results["decoding"] == {"max_new_tokens": 6, "temperature": 0}
    assert results["model"] == str(model)
    assert results["versions"]["opsin"]
    outputs = [json.loads(line) for line in (out / "outputs.jsonl").read_text().splitlines()]
    assert [(each["control"], each["key"]) for each in outputs[:4]] == [
        ("", "1"),
        ("", "2"),
        ("", "3"),
        ("shuffled", "1"),
    ]

    again = opsin("eval", model, "--task", "exact", "--data", data, *controls)
    assert again.code == 0
    assert json.loads((out / "results.json").read_text())["outputs_in_this_run"] == 0
    shown = opsin("eval", out)
    assert shown.code == 0
    assert [line for line in again.out.splitlines() if "two" in line] == [
        line for line in shown.out.splitlines() if "two" in line
    ]


def test_answers_in_batches_are_those_given_one_by_one(opsin, model, write):
    data = write(*ROWS)
    for size in (1, 3):
        options = ("--batch-size", size, "--output", f"out{size}", "--max-new-tokens", 5)
        assert opsin("eval", model, "-t", "exact", "-d", data, *options).code == 0
    assert Path("out1/outputs.jsonl").read_text() == Path("out3/outputs.jsonl").read_text()


def test_json_is_the_results_and_nothing_else(opsin, model, write):
    done = opsin("eval", model, "-t", "exact", "-d", write(*ROWS), "--max-new-tokens", 3, "--limit", 2, "--json")
    assert json.loads(done.out)["examples"] == 2
    assert "2/2 answers" in done.err
    assert json.loads(opsin("eval", "evals/exact/tiny", "--json").out) == json.loads(done.out)


def test_beams_are_part_of_what_decides_outputs(opsin, model, write):
    data = write(*ROWS)
    assert opsin("eval", model, "-t", "exact", "-d", data, "--max-new-tokens", 3, "--beams", 2).code == 0
    refused = opsin("eval", model, "-t", "exact", "-d", data, "--max-new-tokens", 3).refused()
    assert "decoding.beams: 2 -> None" in refused


def test_two_results_are_compared(opsin, model, write):
    data = write(*ROWS)
    for name, prompt in (("one", "{}"), ("two", "{} Now!")):
        options = ("--output", name, "--prompt", prompt, "--max-new-tokens", 3)
        assert opsin("eval", model, "-t", "exact", "-d", data, *options).code == 0
    done = opsin("eval", "one", "--against", "two")
    assert done.code == 0, done.err
    assert "difference" in done.out
    assert "they differ in prompt: {} and {} Now!" in done.out
    data_form = json.loads(opsin("eval", "one", "--against", "two", "--json").out)
    assert data_form["figures"][0]["difference"] == 0
    at_once = opsin(
        *("eval", model, "-t", "exact", "-d", data, "--output", "one", "--max-new-tokens", 3, "--against", "two")
    )
    assert "difference" in at_once.out


def test_ctrl_c_says_where_it_stands_and_the_same_command_goes_on(opsin, model, write, monkeypatch):
    data = write(*ROWS)
    arguments = ("eval", model, "-t", "exact", "-d", data, "--batch-size", 1)
    real = answering.load_answerer
    monkeypatch.setattr(run, "load_answerer", Puppet(lambda asked: "x", stop_after=2).load)
    stopped = opsin(*arguments)
    assert stopped.code == 130
    assert "stopped; what was answered is in evals/exact/tiny, and the same command goes on from there" in stopped.err
    unfinished = opsin("eval", "evals/exact/tiny").refused()
    assert "is not finished; give its command once more" in unfinished
    monkeypatch.setattr(run, "load_answerer", real)
    assert opsin(*arguments).code == 0
    assert json.loads(Path("evals/exact/tiny/results.json").read_text())["outputs_in_this_run"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-t", "exactt", "-d", "rows.jsonl"), "unknown task 'exactt' (did you mean 'exact'?)"),
        (("-t", "exact"), "give --data FILE"),
        (("-t", "exact", "-d", "nothing.jsonl"), "nothing.jsonl cannot be read: No such file"),
        (("-t", "exact", "-d", "empty.jsonl"), "empty.jsonl holds no record"),
        (("-t", "exact", "-d", "bare.jsonl"), "bare.jsonl record 2 (line 2): a row without answer"),
        (("-t", "exact", "-d", "lost.jsonl"), "lost.jsonl record 1 (line 1): picture d.png is not there"),
        (("-t", "exact", "-d", "text.jsonl"), "text.jsonl line 1, column 1: not JSON"),
        (("-t", "exact", "-d", "rows.jsonl", "--control", "shufled"), "unknown control 'shufled' (did you mean"),
        (("-t", "exact", "-d", "rows.jsonl", "--parser", "word"), "no parser 'word' (did you mean 'words'"),
        (("-t", "exact", "-d", "rows.jsonl", "--against", "nowhere"), "nowhere holds no finished evaluation"),
        (("-t", "exact", "-d", "rows.jsonl", "--output", "full"), "full is there and holds no evaluation"),
        (("-t", "exact", "-d", "broken.jsonl"), "conversation 'broken.jsonl record 1 (line 1)': image 1 (text.png)"),
        (("-t", "retrieval", "-d", "captions.jsonl"), "retrieval needs a model that compares"),
        ((), "to be asked? Give --task: exact, choice, vqa"),
    ],
)  # fmt: skip
def test_what_users_get_wrong_is_one_line(opsin, model, write, arguments, message):
    write(*ROWS)
    Path("empty.jsonl").write_text("")
    write(ROWS[0], {"image": "a.png", "question": "What?"}, name="bare.jsonl")
    write({**ROWS[0], "image": "d.png"}, name="lost.jsonl")
    write({"image": "a.png", "caption": "x"}, name="captions.jsonl")
    Path("text.png").write_text("no picture")
    write({**ROWS[0], "image": "text.png"}, name="broken.jsonl")
    Path("text.jsonl").write_text("hello\n")
    Path("full").mkdir()
    Path("full/file").write_text("x")
    assert message in opsin("eval", model, *arguments).refused()


def test_tasks_are_listed(opsin):
    done = opsin("eval", "--list")
    assert done.code == 0
    for word in ("vqa_accuracy", "yes-no-llava, yes-no-exact", "retrieval", "first-box:model"):
        assert word in " ".join(done.out.split()), done.out


def test_a_model_that_is_not_there_is_named(opsin, write):
    assert (
        "no model 'lava-1.5-7b' (did you mean"
        in opsin("eval", "lava-1.5-7b", "-t", "exact", "-d", write(*ROWS)).refused()
    )
