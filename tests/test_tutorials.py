"""The tutorial is walked from top to bottom as its reader does: killed on the way, resumed, and out to transformers."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opsin import weights
from opsin.cli.app import run as main
from opsin.demo.run import start

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/tutorials/finetune.md").read_text(encoding="utf-8")
BLOCKS: dict[str, list[str]] = {}
for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
    BLOCKS.setdefault(kind, []).append(block)
COMMANDS = [line for block in BLOCKS[""] for line in block.splitlines()]


def opsin(command: str) -> None:
    assert main(shlex.split(command)[1:]) == 0, command


def python(block: str) -> str:
    """Run a block of the page in a process of its own; what it printed."""
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def killed(command: str, log: Path, *, after: int) -> None:
    """Start a command and kill it, hard, once the log has some lines."""
    process = subprocess.Popen([sys.executable, "-m", *shlex.split(command.replace("opsin ", "opsin.cli ", 1))])
    deadline = time.monotonic() + 600
    while not log.exists() or len(log.read_bytes().splitlines()) < after:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def walk(folder: Path, capsys: pytest.CaptureFixture[str], *, demo: bool) -> tuple[str, str]:
    """The page from its first command to its last line. Returns what chat and transformers answer."""
    first, dry, training, chat, export = COMMANDS
    if demo:
        opsin(first)
    else:  # the parts that the demo starts from, before it trains them
        model = start(0)
        weights.save_native(folder / "opsin-demo", model.vlm, model.config, model.tokenizer)
    python(BLOCKS["python"][0])
    (folder / "finetune.yaml").write_text(BLOCKS["yaml"][0])
    if not demo:
        training = f"{training} stages.tune.steps=8 checkpoint.every=2"
    opsin(dry)
    killed(training, folder / "runs/teams/log.jsonl", after=12 if demo else 5)  # past the first checkpoint
    opsin(training)
    assert "going on with stage 'tune' after step" in capsys.readouterr().out
    opsin(chat)
    answer = capsys.readouterr().out.strip()
    opsin(export)
    assert "verified: " in capsys.readouterr().out
    return answer, python(BLOCKS["python"][1])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def test_the_walk_of_the_tutorial_in_short(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer, theirs = walk(place, capsys, demo=False)
    assert theirs in answer


@pytest.mark.slow
def test_the_walk_of_the_tutorial_whole(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer, theirs = walk(place, capsys, demo=True)
    assert "west" in answer
    assert theirs == "west"
