"""`torchrun ... -m opsin.cli train` as a user types it, stopped and killed."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from opsin.cli.app import run as opsin
from opsin.train.checkpoint import CheckpointStore
from train import together
from train.test_runs import log_of

TRAIN = ("-m", "opsin.cli", "train", "run.yaml")


def ended(process: subprocess.Popen) -> str:
    """All that a command says to its end."""
    said, _ = process.communicate(timeout=300)
    return said


def wait_for(process: subprocess.Popen, pattern: str) -> list[str]:
    """Read lines until one matches; gives all."""
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    pytest.fail(f"ended without a line that matches {pattern!r}: {''.join(lines)}")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_torchrun_saves_once_and_the_same_command_goes_on(tmp_path, number):
    together.write_project(tmp_path)
    process = together.torchrun(tmp_path, *TRAIN)
    before = "".join(wait_for(process, "step 3/40"))
    assert before.count("step 1/40") == 1, "one process speaks"
    assert "2 processes on cpu train together, each with its part" in before
    process.send_signal(number)
    said = ended(process)
    stopped = re.findall(r"stopped and saved after step (\d+)", said)
    assert len(stopped) == 1, said
    steps = int(stopped[0])
    assert [row["step"] for row in log_of(tmp_path / "out")] == list(range(1, steps + 1))
    saved = CheckpointStore(tmp_path / "out" / "checkpoints", keep=2).newest()
    assert saved is not None
    assert (saved.step, saved.state["processes"]) == (steps, 2)
    assert sorted(file.name for file in saved.folder.iterdir()) == [
        "manifest.json",
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
        "state.json",
        "weights-00000-of-00002.safetensors",
        "weights-00001-of-00002.safetensors",
    ]
    process = together.torchrun(tmp_path, *TRAIN)
    said = ended(process)
    assert process.returncode == 0, said
    assert f"going on with stage 'tune' after step {steps} of 40" in said
    assert said.count("done: opsin chat out/tune") == 1
    assert [row["step"] for row in log_of(tmp_path / "out")] == list(range(1, 41))


def test_an_error_is_printed_once(tmp_path):
    together.write_project(tmp_path)
    (tmp_path / "images" / "3.png").write_bytes(b"no picture")
    process = together.torchrun(tmp_path, *TRAIN)
    said = ended(process)
    assert process.returncode != 0
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "data.json record 4 (line 1) '3'" in error
    assert "opsin/train" not in said, "no traceback of ours"


def test_a_run_file_that_is_wrong_is_told_once_on_each_machine(tmp_path, monkeypatch, capsys):
    together.write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    for rank, told in ((0, 1), (1, 0), (8, 1)):  # of the processes of two machines
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 8))
        assert opsin([*TRAIN[2:], "sed=1"]) == 2
        assert capsys.readouterr().err.count("error: ") == told


def contents(output: Path) -> dict[str, bytes]:
    """Every byte that a run has left, but for the clock's."""
    files = [*(output / "checkpoints").rglob("*.safetensors"), *output.glob("*/model.safetensors")]
    assert len(files) == 10
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_which_goes_on_to_the_same_bits(tmp_path):
    """kill -9 of one of two, whatever it is doing: the k-th some k * 60 ms after the first step."""
    program = str(Path(together.__file__))
    straight = tmp_path / "straight"
    straight.mkdir()
    process = together.torchrun(straight, program, str(straight))
    said = ended(process)
    assert process.returncode == 0, said
    draw = random.Random(0)
    for moment in range(8):
        folder = tmp_path / str(moment)
        folder.mkdir()
        process = together.torchrun(folder, program, str(folder))
        lines = wait_for(process, r"^first 1$")
        victim = draw.randrange(2)
        (pid,) = re.findall(rf"process {victim} (\d+)", "".join(lines))
        time.sleep(0.06 * moment)
        os.kill(int(pid), signal.SIGKILL)
        ended(process)
        assert process.returncode != 0
        process = together.torchrun(folder, program, str(folder))
        said = ended(process)
        assert process.returncode == 0, said
        assert log_of(folder / "out") == log_of(straight / "out")
        assert contents(folder / "out") == contents(straight / "out")
        assert not list((folder / "out").rglob("*.tmp"))
