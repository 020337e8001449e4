"""Evaluation while a stage trains: it changes nothing of the training, finds the best model, and ends in time."""

import json
import re
import time
from pathlib import Path

import pytest

from opsin import weights
from opsin.errors import ConfigError, DataError, TrainError
from opsin.inspect.curves import read_curves
from opsin.spec.recipe import RunConfig
from opsin.train import RunResult, run, train_stage
from opsin.train.log import Silence
from train import test_runs
from train.test_runs import Crash, crash_after, log_of
from train.toy import DrawnSource, differing, stage, tensors_of, tiny_model, two_sources, two_stages

HELD_OUT = 5


def evaluated(output: Path, **changes) -> RunConfig:
    """`two_stages`, of which the first is evaluated after steps 2 and 4, the second after 3, 6 and 7."""
    data = two_stages(output).model_dump(mode="json")
    data["stages"][0]["evaluate"] = {"every": 2, **changes}
    data["stages"][1]["evaluate"] = {"every": 3, **changes}
    return RunConfig.parse(data, where="test")


def held_out() -> dict[str, DrawnSource]:
    return {name: DrawnSource(HELD_OUT, with_text=False, fingerprint="held out") for name in ("first", "second")}


def go(config: RunConfig, folder: Path, **more) -> RunResult:
    return run(config, model=tiny_model(folder), sources=two_sources(), held_out=held_out(), **more)


def evaluations_of(output: Path) -> list[dict]:
    return [row for row in log_of(output) if "evaluation" in row]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("straight")
    return folder / "out", go(evaluated(folder / "out"), folder)


def test_evaluations_stand_in_the_log_behind_their_steps(straight):
    output, _ = straight
    rows = log_of(output)
    judged = [(row["stage"], row["step"]) for row in evaluations_of(output)]
    assert judged == [("first", 2), ("first", 4), ("second", 3), ("second", 6), ("second", 7)]
    for row, before in zip(rows[1:], rows, strict=False):
        if "evaluation" in row:
            assert (row["stage"], row["step"]) == (before["stage"], before["step"])
            assert row["samples"] == HELD_OUT
    assert [len(curve.steps) for curve in read_curves(output / "log.jsonl")] == [4, 7]


def test_evaluation_changes_nothing_of_the_training(straight, tmp_path):
    output, expected = straight
    result = run(two_stages(tmp_path / "out"), model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(tmp_path / "out") == [row for row in log_of(output) if "evaluation" not in row]


def test_the_best_model_is_kept_and_has_the_loss_that_was_logged(straight, tmp_path):
    output, _ = straight
    for name in ("first", "second"):
        rows = [row for row in evaluations_of(output) if row["stage"] == name]
        best = min(row["evaluation"]["loss"] for row in rows)
        assert [row["best"] for row in rows] == [
            row["evaluation"]["loss"] < min([9e9, *(r["evaluation"]["loss"] for r in rows[:place])])
            for place, row in enumerate(rows)
        ]
        model = weights.load(output / "best" / name)
        again = {
            "name": name,
            "trainable": ["connector"],
            "optim": {"kind": "adamw", "lr": 1e-30},
            "steps": 1,
            "chat": "plain" if name == "first" else None,
            "batch": {"samples": 4},
        }
        data = {**two_stages(tmp_path / name).model_dump(mode="json"), "stages": [{**again, "evaluate": {"every": 1}}]}
        source = {name: DrawnSource(HELD_OUT, with_text=False)}
        run(RunConfig.parse(data, where="test"), model=model, sources=source, held_out=source)
        (row,) = evaluations_of(tmp_path / name)
        assert row["evaluation"]["loss"] == pytest.approx(best, rel=1e-6)


# Steps of the run: 4 + 7. Checkpoints after 3, 4, 7, 10, 11; evaluations after 2, 4, 7, 10, 11.
@pytest.mark.parametrize("crashes", [[3], [4, 1], [5, 3], [10], [11]], ids=str)
def test_evaluations_go_on_to_the_same_bits(straight, tmp_path, crashes):
    expected_output, expected = straight
    output = tmp_path / "out"
    for steps in crashes:
        with pytest.raises(Crash):
            go(evaluated(output), tmp_path, on_row=crash_after(steps))
    result = go(evaluated(output), tmp_path)
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(output) == log_of(expected_output)
    for name in ("first", "second"):
        mine, theirs = (folder / "best" / name / "model.safetensors" for folder in (output, expected_output))
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_a_process_killed_while_it_evaluates_goes_on_to_the_same_bits(straight, tmp_path, monkeypatch):
    """Kills fall anywhere, also while the best model is written."""
    expected_output, expected = straight
    program = test_runs.PROGRAM.replace("two_stages(", "evaluated(").replace(
        "sources=", "held_out=held_out(), sources="
    )
    monkeypatch.setattr(test_runs, "PROGRAM", f"from train.test_evaluate import evaluated, held_out\n{program}")
    for moment in range(20):
        folder = tmp_path / str(moment)
        folder.mkdir()
        process = test_runs.start_program(folder, pause=0.0)
        test_runs.wait_for_line(process, "first 1")
        time.sleep(0.03 * moment)
        process.kill()
        process.wait(timeout=30)
        result = go(evaluated(folder / "out"), folder)
        assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
        assert log_of(folder / "out") == log_of(expected_output)
        for name in ("first", "second"):
            mine, theirs = (out / "best" / name / "model.safetensors" for out in (folder / "out", expected_output))
            assert mine.read_bytes() == theirs.read_bytes()
        assert not list((folder / "out").rglob("*.tmp"))


class Telling(Silence):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def without_progress(output: Path) -> RunConfig:
    """Rates so small that no bit changes: the first evaluation is the best, and patience runs out at the third."""
    data = evaluated(output, patience=2).model_dump(mode="json")
    data["stages"][0] |= {"steps": 20, "optim": {"kind": "adamw", "lr": 1e-30}}
    data["stages"][1]["steps"] = 3
    return RunConfig.parse(data, where="test")


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> tuple[Path, RunResult, Telling]:
    folder, telling = tmp_path_factory.mktemp("ended"), Telling()
    return folder / "out", go(without_progress(folder / "out"), folder, reporter=telling), telling


def test_a_stage_ends_when_patience_runs_out_and_the_next_begins(ended):
    output, result, telling = ended
    assert [(row["stage"], row["step"], row["best"]) for row in evaluations_of(output)] == [
        ("first", 2, True),
        ("first", 4, False),
        ("first", 6, False),
        ("second", 3, True),
    ]
    assert (result.status, result.steps) == ("finished", 9)
    assert sorted(f.name for f in (output / "checkpoints").iterdir()) == ["step-00000006", "step-00000009"]
    assert any("the stage ends, as 2 evaluations brought nothing better" in text for text in telling.said)
    first, second, *_ = [text for text in telling.said if text.startswith("evaluation after step")]
    assert re.fullmatch(r"evaluation after step 2: loss \d\.\d{4} \(the best so far\)", first)
    assert re.fullmatch(r"evaluation after step 4: loss \d\.\d{4} \(the best is \d\.\d{4} after step 2\)", second)


@pytest.mark.parametrize("crashes", [[5], [6], [7]], ids=str)
def test_a_stage_that_ended_early_stays_ended(ended, tmp_path, crashes):
    expected_output, expected, _ = ended
    for steps in crashes:
        with pytest.raises(Crash):
            go(without_progress(tmp_path / "out"), tmp_path, on_row=crash_after(steps))
    result = go(without_progress(tmp_path / "out"), tmp_path)
    assert result.steps == expected.steps
    assert log_of(tmp_path / "out") == log_of(expected_output)
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []


def test_exact_match_counts_answers_that_come_out_word_for_word(tmp_path):
    """A model that is trained on its own evaluation learns it by heart."""
    data = two_stages(tmp_path / "out").model_dump(mode="json")
    data["stages"] = [
        {
            "name": "only",
            "trainable": ["connector", "decoder"],
            "batch": {"samples": 4},
            "optim": {"kind": "adamw", "lr": 1e-2},
            "steps": 60,
            "evaluate": {"every": 30, "metric": "exact_match", "max_new_tokens": 20},
        }
    ]
    source = {"only": DrawnSource(4)}
    config = RunConfig.parse(data, where="test")
    run(config, model=tiny_model(tmp_path), sources=source, held_out=source)
    scores = [row["evaluation"] for row in evaluations_of(tmp_path / "out")]
    assert [row["best"] for row in evaluations_of(tmp_path / "out")][-1]
    assert scores[-1]["exact_match"] == 1.0
    assert scores[-1]["loss"] < 0.2
    assert scores[0]["exact_match"] < 1


def test_data_held_back_may_not_change_on_the_way(tmp_path):
    with pytest.raises(Crash):
        go(evaluated(tmp_path / "out"), tmp_path, on_row=crash_after(8))
    others = held_out() | {"second": DrawnSource(HELD_OUT, fingerprint="other")}
    with pytest.raises(TrainError, match=r"the data of stage .* has changed since this run began .*'other'"):
        run(evaluated(tmp_path / "out"), model=tiny_model(tmp_path), sources=two_sources(), held_out=others)


def test_what_cannot_be_evaluated_is_told_before_the_first_step(tmp_path):
    config = evaluated(tmp_path / "out")
    model = tiny_model(tmp_path)
    with pytest.raises(ConfigError, match=r"stage 'first': evaluate names no data; list files under evaluate\.data"):
        run(config, model=model, sources=two_sources())
    with pytest.raises(ConfigError, match="held-out samples are given for stage 'third', but the stages are first"):
        run(config, model=model, sources=two_sources(), held_out={"third": DrawnSource(1)})
    with pytest.raises(ConfigError, match="asks for evaluations, which `run` makes"):
        train_stage(model.vlm, stage(evaluate={"every": 1}), DrawnSource(4))


def test_exact_match_wants_an_answer_to_compare_with(tmp_path):
    class Encoded(DrawnSource):
        def sample(self, index, epoch):
            from opsin.encode import Encoder

            return Encoder(model.config, model.tokenizer).encode(super().sample(index, epoch), mode="train")

    model = tiny_model(tmp_path)
    config = evaluated(tmp_path / "out", metric="exact_match")
    given = {name: Encoded(2) for name in ("first", "second")}
    with pytest.raises(DataError, match=r"evaluation sample 0 of 'first\.evaluate' ends with no answer"):
        run(config, model=model, sources=two_sources(), held_out=given)
    assert [json.loads(line)["step"] for line in (tmp_path / "out/log.jsonl").read_text().splitlines()] == [1, 2]
