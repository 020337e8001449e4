"""`opsin train` as a user types it."""

import io
import signal
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from opsin import weights
from opsin.cli.app import run as opsin
from opsin.spec.recipe import RunConfig
from opsin.train.log import Screen, duration
from train.toy import write_conversations


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with pictures, conversations, a tokenizer and a run file of two stages."""
    monkeypatch.chdir(tmp_path)
    write_conversations(tmp_path, 6)
    stage = {
        "trainable": ["connector"],
        "data": [{"path": "data.json", "image_root": "images"}],
        "batch": {"samples": 3},
        "optim": {"kind": "adamw", "lr": 1e-3},
        "epochs": 1,
    }
    run = {
        "model": "llava-1.5-tiny",
        "init": "random",
        "tokenizer": "tokenizer",
        "output": "out",
        "device": "cpu",
        "checkpoint": {"every": 1},
        "log_every": 1,
        "stages": [{"name": "align", "chat": "plain", **stage}, {"name": "tune", **stage, "trainable": ["decoder"]}],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def test_a_run_from_files_ends_in_a_model_that_loads(project, capsys):
    assert opsin(["train", "run.yaml", "stages.tune.steps=3"]) == 0
    out = capsys.readouterr().out
    assert "connector              3,936           3,936" in out
    lines = [line for line in out.splitlines() if "left" in line]
    assert [line.split()[:2] for line in lines] == [["align", "(1/2)"]] * 2 + [["tune", "(2/2)"]] * 3
    for word in ("loss", "lr connector", "|g|", "tokens/s", "waiting for data"):
        assert word in lines[0]
    assert out.splitlines()[-1] == "done: opsin chat out/tune --image PICTURE"
    model = weights.load(project / "out" / "tune")
    assert model.tokenizer.vocab_size <= model.config.decoder.vocab_size
    assert model.config.chat.name == "v1"
    assert opsin(["train", "run.yaml", "stages.tune.steps=3"]) == 0
    assert len((project / "out" / "log.jsonl").read_text().splitlines()) == 5


def test_a_run_is_judged_while_it_trains_and_tells_tensorboard(project, capsys):
    pytest.importorskip("tensorboard", reason="pip install 'opsin[tensorboard]'")
    data = "data: [{path: data.json, image_root: images}]"
    judged = f"stages.tune.evaluate={{every: 2, metric: exact_match, max_new_tokens: 4, {data}}}"
    assert opsin(["train", "run.yaml", "stages.tune.steps=3", "trackers=[tensorboard]", judged]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("evaluation after step")]
    assert [line.split(":")[0] for line in told] == ["evaluation after step 2", "evaluation after step 3"]
    assert "exact match 0.0000 (the best so far)" in told[0]
    assert lines[-2] == "the model of its best evaluation is in out/best/tune"
    assert weights.load(project / "out" / "best" / "tune").tokenizer.vocab_size
    assert list((project / "out" / "trackers" / "tensorboard").iterdir())


def test_the_connector_of_one_run_starts_another(project, capsys):
    assert opsin(["train", "run.yaml"]) == 0
    parts = ["init={connector: out/align/connector.safetensors, decoder: out/tune}", "tokenizer=null", "output=two"]
    assert opsin(["train", "run.yaml", *parts, "stages.0.steps=1", "stages.1.steps=1"]) == 0
    first, second = (weights.load(project / folder).vlm.state_dict() for folder in ("out/tune", "two/align"))
    assert all((first[name] == second[name]).all() for name in first if name.startswith("decoder."))
    capsys.readouterr()


def test_a_dry_run_tells_everything_and_writes_nothing(project, capsys):
    before = sorted(project.rglob("*"))
    assert opsin(["train", "run.yaml", "--dry-run", "seed=5"]) == 0
    out = capsys.readouterr().out
    assert sorted(project.rglob("*")) == before
    assert yaml.safe_load(out.split("\nstage 1")[0])["seed"] == 5
    assert "stage 2 of 2: tune" in out
    assert "6 samples per epoch, 3 per step: 2 steps, 1.00 epochs" in out
    # A caption: <s>, 9 slots, 3 to 18 letters, a newline.
    assert "about 64 tokens per step (27 of pictures, 34 taught), estimated from 6 samples" in out
    assert "weights, gradients and optimizer take" in out


def test_a_dry_run_without_the_data_says_what_is_missing(project, capsys):
    (project / "data.json").unlink()
    assert opsin(["train", "run.yaml", "--dry-run"]) == 0
    assert "the data cannot be used yet: stage 'align': data.json cannot be read" in capsys.readouterr().out
    assert opsin(["train", "run.yaml"]) == 2
    assert "error: stage 'align': data.json cannot be read" in capsys.readouterr().err


def test_shipped_recipes_are_listed_and_shown_without_their_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert opsin(["train"]) == 0
    assert "llava-1.5/finetune" in capsys.readouterr().out
    assert opsin(["train", "llava-next/finetune", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "not trained, 18 tensors from vision.layers.23.norm1.weight: features leave the tower after block 23" in out
    assert "7,050,308,608" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_gives_the_usual_exit_code(project, capsys, monkeypatch, number):
    from opsin.train import runner

    class Interrupted(runner.RowLog):
        def write(self, row):
            super().write(row)
            if row["stage"] == "tune":
                signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "RowLog", Interrupted)
        assert opsin(["train", "run.yaml"]) == 128 + number
    out = capsys.readouterr().out
    assert "stopped and saved after step 3; the same command goes on from there" in out
    assert opsin(["train", "run.yaml"]) == 0
    assert "going on with stage 'tune' after step 1 of 2" in capsys.readouterr().out


def test_a_bad_sample_stops_the_run_and_is_named(project, capsys):
    (project / "images" / "3.png").write_bytes(b"no picture")
    assert opsin(["train", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert "data.json record 4 (line 1) '3'" in error
    assert "Traceback" not in error


def test_a_damaged_checkpoint_is_told_and_the_older_one_used(project, capsys):
    assert opsin(["train", "run.yaml"]) == 0
    newest = sorted((project / "out" / "checkpoints").iterdir())[-1]
    (newest / "weights.safetensors").write_bytes(b"x")
    capsys.readouterr()
    assert opsin(["train", "run.yaml"]) == 0
    out = capsys.readouterr().out
    assert f"passed over a damaged checkpoint: out/checkpoints/{newest.name}: weights.safetensors has 1 bytes" in out
    assert "going on with stage 'tune' after step 1 of 2" in out


def test_time_left_is_written_for_people():
    assert [duration(seconds) for seconds in (0.4, 61, 3599.6, 3661)] == ["0:00", "1:01", "1:00:00", "1:01:01"]


def screen_of(shares: list[float]) -> list[str]:
    """What the screen shows of steps of one second each, of which a share is spent waiting."""
    console = Console(file=io.StringIO(), width=200)
    screen = Screen(console, every=10)
    screen.begin("tune", number=1, num_stages=1, num_steps=len(shares), done=0)
    for step, share in enumerate(shares, start=1):
        row = {"step": step, "seconds": 1.0, "data_seconds": share, "lr": {"connector": 1e-3}, "tokens": 100}
        screen.row({**row, "loss": 1.0, "grad_norm": 1.0})
    screen.end()
    return console.file.getvalue().splitlines()


def test_waiting_for_data_is_shown_and_warned_of_once():
    lines = screen_of([0.9] + [0.08] * 80)
    assert "waiting for data 90%" in lines[0]
    warnings = [line for line in lines if "warning" in line]
    assert warnings == [
        "warning: 8% of the last 20 steps' time went in waiting for data. Raise workers, make pictures smaller, or "
        "put them on a faster disk"
    ]
    assert "waiting for data 8%" in lines[1]
    # The first step waits for what is read ahead, and single steps do not count.
    assert not any("warning" in line for line in screen_of([0.9] + [0.04] * 60 + [0.5]))


def test_commands_and_the_run_file_of_the_documentation_are_real(project, capsys):
    """Commands run (with --dry-run), and the run file shown is one."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    commands = [line.split("#")[0].split() for line in text.splitlines() if line.startswith("opsin train")]
    assert len(commands) >= 4
    for _, *arguments in commands:
        assert opsin([*arguments, "--dry-run"]) == 0, arguments
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    config = RunConfig.parse(shown, where="docs/training.md")
    assert config.stages[1].optim.part_lr == {"connector": 1e-4}
    judged = yaml.safe_load(text.split("## Judging")[1].split("```yaml\n")[1].split("```")[0])
    shown["stages"][1]["evaluate"], shown["trackers"] = judged["evaluate"], judged["trackers"]
    assert RunConfig.parse(shown, where="docs/training.md").stages[1].evaluate.patience == 5
    capsys.readouterr()
