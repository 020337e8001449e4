"""Whole runs: folders, logs, stopping, and going on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from opsin import weights
from opsin.errors import ConfigError, DataError, TrainError
from opsin.train import Loss, RunResult, StopRequest, next_token, run
from opsin.train.checkpoint import CheckpointStore
from opsin.train.stop import stop_on_signals
from train.toy import DrawnSource, differing, tensors_of, tiny_model, two_sources, two_stages

TIMES = ("seconds", "data_seconds")


def log_of(output: Path) -> list[dict]:
    """The log without what a clock said."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def optimizer_of(output: Path) -> dict[str, torch.Tensor]:
    saved = CheckpointStore(output / "checkpoints", keep=2).newest()
    assert saved is not None
    return saved.tensors("optimizer")


class Crash(Exception):
    """Stands for the power going off."""


def crash_after(steps: int):
    def on_row(row):
        nonlocal steps
        steps -= 1
        if not steps:
            raise Crash

    return on_row


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, RunResult]:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    output = folder / "out"
    result = run(two_stages(output), model=tiny_model(folder), sources=two_sources())
    return output, result


def test_a_run_trains_its_stages_and_leaves_models_that_load(straight):
    output, result = straight
    assert result.status == "finished"
    assert result.steps == 11
    assert result.folder == output / "second"
    assert [(row["stage"], row["step"]) for row in log_of(output)] == [("first", n) for n in range(1, 5)] + [
        ("second", n) for n in range(1, 8)
    ]
    loaded = weights.load(output / "second")
    assert differing(tensors_of(loaded), tensors_of(result.model)) == []
    assert loaded.tokenizer.vocab_size == result.model.tokenizer.vocab_size
    first = tensors_of(weights.load(output / "first"))
    changed = differing(first, tensors_of(loaded))
    assert changed
    assert all(name.startswith(("connector.", "decoder.")) for name in changed)
    assert yaml.safe_load((output / "run.yaml").read_text())["stages"][0]["clip"] == 1.0
    assert not list(output.rglob("*.tmp"))


def test_a_stage_of_the_connector_alone_writes_it_as_a_file_that_loads(straight, tmp_path):
    output, _ = straight
    assert not (output / "second" / "connector.safetensors").exists()
    fresh = tiny_model(tmp_path, seed=9)
    weights.load_part(fresh.vlm, "connector", output / "first" / "connector.safetensors")
    trained = tensors_of(weights.load(output / "first"))
    same = {name for name, value in tensors_of(fresh).items() if torch.equal(value, trained[name])}
    assert {name for name in trained if name.startswith("connector.")} <= same


def test_the_log_tells_what_each_step_saw(straight):
    output, _ = straight
    rows = log_of(output)
    assert [row["samples"] for row in rows[4:]] == [4, 4, 4, 4, 2, 4, 4]
    assert rows[8]["epoch"] == 1.0
    for row in rows:
        assert row["supervised"] < row["tokens"]
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
    assert all(row["passes"] > 1 for row in rows[:4])
    assert rows[0]["lr"] == {"connector": 0.0}
    assert set(rows[5]["lr"]) == {"connector/muon", "connector", "decoder/muon", "decoder"}
    # Steps of one modality, except the last of an epoch.
    assert {row["image_tokens"] == 0 for row in rows[4:]} == {False}


# The run saves after steps 3 and 4 (end of stage one), 7, 10 and 11. Crashes in mid-stage, at a stage's border, in the
# second epoch, right after a save and just before one.
@pytest.mark.parametrize("crashes", [[1], [3], [4], [5], [9], [2, 6, 5], [3, 3, 3]], ids=str)
def test_a_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(straight, tmp_path, crashes):
    expected_output, expected = straight
    output = tmp_path / "out"
    for steps in crashes:
        with pytest.raises(Crash):
            run(two_stages(output), model=tiny_model(tmp_path), sources=two_sources(), on_row=crash_after(steps))
    result = run(two_stages(output), model=tiny_model(tmp_path), sources=two_sources())
    assert result.status == "finished"
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(output) == log_of(expected_output)
    assert differing(optimizer_of(output), optimizer_of(expected_output)) == []
    for stage in ("first", "second"):
        assert (output / stage / "model.safetensors").read_bytes() == (
            expected_output / stage / "model.safetensors"
        ).read_bytes()
    assert sorted(f.name for f in (output / "checkpoints").iterdir()) == ["step-00000010", "step-00000011"]


@pytest.mark.parametrize("after", [1, 4, 6], ids=["mid-stage", "stage border", "second stage"])
def test_a_stop_saves_the_step_and_the_run_goes_on_to_the_same_bits(straight, tmp_path, after):
    expected_output, expected = straight
    output, stop = tmp_path / "out", StopRequest()

    def on_row(row):
        if len(log_of(output)) == after:
            stop.make()

    stopped = run(two_stages(output), model=tiny_model(tmp_path), sources=two_sources(), on_row=on_row, stop=stop)
    # At a stage's border the stage's model is still written, and the next stage stops after its first step.
    assert stopped.status == "stopped"
    assert stopped.steps == len(log_of(output)) == (5 if after == 4 else after)
    result = run(two_stages(output), model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(output) == log_of(expected_output)


@pytest.mark.parametrize("workers", [0, 2, 8])
def test_threads_that_prepare_samples_change_nothing(straight, tmp_path, workers):
    expected_output, expected = straight
    config = two_stages(tmp_path / "out", workers=workers)
    result = run(config, model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(tmp_path / "out") == log_of(expected_output)


def test_a_resumed_run_reads_no_sample_again(tmp_path):
    config = two_stages(tmp_path / "out", workers=0)
    with pytest.raises(Crash):
        run(config, model=tiny_model(tmp_path), sources=two_sources(), on_row=crash_after(10))
    sources = two_sources()
    run(config, model=tiny_model(tmp_path), sources=sources)
    assert sources["first"].asked == []
    assert len(sources["second"].asked) == 4 + 2 + 4 + 4  # the samples of steps 4 to 7


def test_a_finished_run_given_again_does_nothing(straight, tmp_path):
    output, expected = straight
    before = log_of(output)
    result = run(two_stages(output), model=tiny_model(tmp_path), sources=two_sources())
    assert result.status == "finished"
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(output) == before


def test_randomness_in_an_objective_follows_from_the_step(tmp_path):
    """An objective may draw random numbers (negatives, dropout); a resumed run draws those of the first."""

    def objective(vlm, batch):
        loss = next_token(vlm, batch)
        return Loss(loss.total * torch.rand(()), loss.count)

    def losses(name, **more):
        output = tmp_path / name
        config = two_stages(output)
        given = {"sources": two_sources(), "objectives": {"first": objective, "second": objective}}
        if more:
            with pytest.raises(Crash):
                run(config, model=tiny_model(tmp_path), **given, **more)
        state = torch.random.get_rng_state()
        run(config, model=tiny_model(tmp_path), **given)
        assert torch.equal(torch.random.get_rng_state(), state), "the caller's random state was changed"
        return log_of(output)

    assert losses("a") == losses("b", on_row=crash_after(5))


def test_another_seed_gives_another_order_and_other_weights(straight, tmp_path):
    output, expected = straight
    result = run(two_stages(tmp_path / "out", seed=4), model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(expected.model))
    taught = [[row["supervised"] for row in log_of(folder)] for folder in (output, tmp_path / "out")]
    assert taught[0] != taught[1]


def unfinished(folder: Path) -> Path:
    output = folder / "out"
    with pytest.raises(Crash):
        run(two_stages(output), model=tiny_model(folder), sources=two_sources(), on_row=crash_after(8))
    return output


def test_going_on_with_other_settings_is_refused_and_names_them(tmp_path):
    output = unfinished(tmp_path)
    data = two_stages(output).model_dump(mode="json")
    data["stages"][1]["optim"]["lr"] = 0.5
    data["seed"] = 7
    config = type(two_stages(output)).parse(data, where="test")
    with pytest.raises(ConfigError, match=r"seed: 3 -> 7; stages\.1\.optim\.lr: 0\.01 -> 0\.5"):
        run(config, model=tiny_model(tmp_path), sources=two_sources())


def test_a_run_begun_before_a_setting_existed_goes_on(straight, tmp_path):
    output = unfinished(tmp_path)
    written = yaml.safe_load((output / "run.yaml").read_text())
    del written["quantize"], written["stages"][0]["bad_samples"], written["stages"][1]["evaluate"]
    (output / "run.yaml").write_text(yaml.safe_dump(written))
    result = run(two_stages(output), model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(straight[1].model)) == []


def test_settings_of_the_machine_may_change(straight, tmp_path):
    output = unfinished(tmp_path)
    config = two_stages(output, workers=0, log_every=1, checkpoint={"every": 2, "keep": 1})
    result = run(config, model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(straight[1].model)) == []
    assert [f.name for f in (output / "checkpoints").iterdir()] == ["step-00000011"]


def test_going_on_with_other_data_is_refused(tmp_path):
    output = unfinished(tmp_path)
    with pytest.raises(TrainError, match="the data of stage 'second' has changed since this run began"):
        run(
            two_stages(output),
            model=tiny_model(tmp_path),
            sources={**two_sources(), "second": DrawnSource(18, fingerprint="other")},
        )


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(TrainError, match="is there and holds no run"):
        run(two_stages(tmp_path / "out"), model=tiny_model(tmp_path), sources=two_sources())
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_programs_never_train_into_one_folder(straight, tmp_path):
    """The second is refused while the first trains; what the first wrote is untouched, and its folder is free after."""
    refused = []

    def on_row(row):
        if row["step"] == 2 and not refused:
            with pytest.raises(
                TrainError, match=r"another program is training into .*out\. Wait until it ends"
            ) as caught:
                run(two_stages(tmp_path / "out"), model=tiny_model(tmp_path), sources=two_sources())
            refused.append(caught)

    run(two_stages(tmp_path / "out"), model=tiny_model(tmp_path), sources=two_sources(), on_row=on_row)
    assert refused
    output, result = straight
    again = run(two_stages(tmp_path / "out"), model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(again.model), tensors_of(result.model)) == []
    assert [(r["step"], r["loss"]) for r in log_of(tmp_path / "out")] == [
        (r["step"], r["loss"]) for r in log_of(output)
    ]


def test_a_later_stage_is_checked_before_the_first_step(tmp_path):
    rows = []
    with pytest.raises(DataError, match="stage 'second': the data is empty"):
        run(
            two_stages(tmp_path / "out"),
            model=tiny_model(tmp_path),
            sources={**two_sources(), "second": DrawnSource(0)},
            on_row=rows.append,
        )
    assert rows == []


def test_sources_for_a_stage_that_does_not_exist_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="sources are given for stage 'third', but the stages are first, second"):
        run(two_stages(tmp_path / "out"), model=tiny_model(tmp_path), sources={"third": DrawnSource(3)})


def test_bfloat16_trains_with_float32_weights_and_resumes(tmp_path):
    def finish(name: str, **more) -> RunResult:
        config = two_stages(tmp_path / name, precision="bfloat16")
        return run(config, model=tiny_model(tmp_path), sources=two_sources(), **more)

    straight = finish("a")
    with pytest.raises(Crash):
        finish("b", on_row=crash_after(5))
    assert differing(tensors_of(finish("b").model), tensors_of(straight.model)) == []
    assert {p.dtype for p in straight.model.vlm.parameters()} == {torch.float32}
    exact = log_of(tmp_path / "a")[-1]["loss"]
    assert 0 < exact < 8


PROGRAM = """
import sys, time
from pathlib import Path
from train.toy import tiny_model, two_sources, two_stages
from opsin.train import run
from opsin.train.stop import stop_on_signals
import torch
torch.set_num_threads(1)
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
def on_row(row):
    print(row["stage"], row["step"], flush=True)
    time.sleep(pause)
with stop_on_signals() as stop:
    result = run(two_stages(folder / "out"), model=tiny_model(folder), sources=two_sources(), on_row=on_row, stop=stop)
print(result.status, result.steps, flush=True)
"""


def start_program(folder: Path, pause: float) -> subprocess.Popen:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent / 'src'}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for_line(process: subprocess.Popen, line: str) -> None:
    assert process.stdout is not None
    for found in process.stdout:
        if found.strip() == line:
            return
    pytest.fail(f"the program ended without printing {line!r}")


def test_a_killed_process_goes_on_to_the_same_bits(straight, tmp_path):
    expected_output, expected = straight
    process = start_program(tmp_path, pause=0.2)
    wait_for_line(process, "second 2")
    process.kill()
    process.wait(timeout=30)
    result = run(two_stages(tmp_path / "out"), model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(tmp_path / "out") == log_of(expected_output)


def test_ctrl_c_ends_the_step_and_saves(tmp_path):
    def on_row(row):
        if row["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with stop_on_signals() as stop:
        result = run(
            two_stages(tmp_path / "out"), model=tiny_model(tmp_path), sources=two_sources(), on_row=on_row, stop=stop
        )
    assert (result.status, result.steps) == ("stopped", 2)
    saved = CheckpointStore(tmp_path / "out" / "checkpoints", keep=2).newest()
    assert saved is not None
    assert saved.step == 2


@pytest.mark.slow
def test_a_process_killed_at_twenty_moments_goes_on_to_the_same_bits(straight, tmp_path):
    """Kills fall anywhere, also inside saving and starting: the k-th comes k * 40 ms after the first printed step."""
    expected_output, expected = straight
    for moment in range(20):
        folder = tmp_path / str(moment)
        folder.mkdir()
        process = start_program(folder, pause=0.0)
        wait_for_line(process, "first 1")
        time.sleep(0.04 * moment)
        process.kill()
        process.wait(timeout=30)
        result = run(two_stages(folder / "out"), model=tiny_model(folder), sources=two_sources())
        assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
        assert log_of(folder / "out") == log_of(expected_output)
        assert not list((folder / "out").rglob("*.tmp"))


def test_a_second_signal_acts_as_usual():
    with stop_on_signals() as stop:
        assert not stop.made
        signal.raise_signal(signal.SIGINT)
        assert stop.made
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
