"""What trackers are told: every step once, whatever happens to the run or to the tracker."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from opsin.errors import ConfigError, TrainError
from opsin.train import RunResult, run
from opsin.train.trackers import TensorBoard
from train.test_evaluate import Telling, evaluated, held_out
from train.test_runs import Crash, crash_after, log_of
from train.toy import differing, tensors_of, tiny_model, two_sources, two_stages


def go(folder: Path, *trackers: str, **more) -> RunResult:
    config = evaluated(folder / "out").replace(trackers=trackers)
    return run(config, model=tiny_model(folder), sources=two_sources(), held_out=held_out(), **more)


def wanted(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The loss curves that the log tells, of training and of evaluation."""
    curves: dict[str, list[tuple[int, float]]] = {}
    step = 0
    for row in log_of(folder / "out"):
        if "evaluation" in row:
            curves.setdefault(f"{row['stage']}/evaluate/loss", []).append((step, row["evaluation"]["loss"]))
        else:
            step += 1
            curves.setdefault(f"{row['stage']}/loss", []).append((step, row["loss"]))
    return curves


class Server:
    """Stands for W&B's and MLflow's: what was sent, by run, still there when a run begins again."""

    def __init__(self) -> None:
        self.sent: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.configs: dict[str, Any] = {}
        self.open: list[str] = []
        self.fails_at = 0

    def take(self, id: str, step: int, values: dict[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server is away")
        self.sent[id].append((step, dict(values)))

    def latest(self, id: str) -> dict[str, float]:
        return {name: value for _, values in self.sent.setdefault(id, []) for name, value in values.items()}

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        (points,) = self.sent.values()
        found: dict[str, list[tuple[int, float]]] = {}
        for step, values in points:
            for name in values:
                found.setdefault(name, []).append((step, values[name]))
        return {name: found[name] for name in found if name.endswith("/loss")}


def wandb_of(server: Server) -> ModuleType:
    def init(*, id, resume, dir, name, config=None):
        assert resume == "allow"
        assert (name, Path(dir).name) == ("out", "trackers")
        assert (config is None) == (id in server.configs)
        server.configs[id] = server.configs.get(id, config)
        server.open.append(id)
        return SimpleNamespace(
            offline=False,
            summary=server.latest(id),
            log=lambda values, step: server.take(id, step, values),
            finish=lambda: server.open.remove(id),
        )

    module = ModuleType("wandb")
    module.init = init
    return module


def mlflow_of(server: Server) -> ModuleType:
    def start_run(*, run_id, run_name):
        assert run_name == "out"
        assert (run_id is None) == (not server.sent)
        id = run_id or "made-by-the-server"
        server.open.append(id)
        metrics = server.latest(id)
        return SimpleNamespace(info=SimpleNamespace(run_id=id), data=SimpleNamespace(metrics=metrics))

    module = ModuleType("mlflow")
    module.start_run = start_run
    module.log_dict = lambda data, file: server.configs.update({server.open[-1]: data})
    module.log_metrics = lambda values, step: server.take(server.open[-1], step, values)
    module.end_run = lambda: server.open.pop()
    return module


@pytest.fixture(params=["wandb", "mlflow"])
def hosted(request, monkeypatch) -> tuple[str, Server]:
    """A program that keeps what it is told somewhere else."""
    server = Server()
    monkeypatch.delenv("WANDB_NAME", raising=False)
    monkeypatch.delenv("MLFLOW_RUN_NAME", raising=False)
    monkeypatch.setitem(sys.modules, request.param, {"wandb": wandb_of, "mlflow": mlflow_of}[request.param](server))
    return request.param, server


def test_every_step_and_evaluation_is_told_once(hosted, tmp_path):
    kind, server = hosted
    go(tmp_path, kind)
    assert server.curves() == wanted(tmp_path)
    ((_, first), *_) = next(iter(server.sent.values()))
    assert first.keys() == {
        "step",
        *(f"first/{name}" for name in ("loss", "grad_norm", "epoch", "lr/connector")),
        *("first/tokens_per_second", "first/waiting_for_data"),
    }
    (config,) = server.configs.values()
    assert config["stages"][1]["optim"]["kind"] == "muon"
    assert server.open == []


# Checkpoints after steps 3, 4, 7, 10 and 11: some steps are made twice.
@pytest.mark.parametrize("crashes", [[2], [6, 1], [9, 2]], ids=str)
def test_a_run_that_goes_on_writes_no_point_twice(hosted, tmp_path, crashes):
    kind, server = hosted
    for steps in crashes:
        with pytest.raises(Crash):
            go(tmp_path, kind, on_row=crash_after(steps))
    go(tmp_path, kind)
    assert server.curves() == wanted(tmp_path)
    go(tmp_path, kind)
    assert server.curves() == wanted(tmp_path)


def test_a_tracker_that_fails_is_left_and_catches_up_later(hosted, tmp_path):
    kind, server = hosted
    server.fails_at, telling = 5, Telling()
    result = go(tmp_path, kind, reporter=telling)
    assert result.status == "finished"
    assert [step for step, _ in next(iter(server.sent.values()))] == [1, 2, 3, 4]
    (said,) = [text for text in telling.said if kind in text]
    assert said.startswith(f"{kind} failed and is told no more: the server is away.")
    server.fails_at = 0
    go(tmp_path, kind)
    assert server.curves() == wanted(tmp_path)


def test_a_tracker_that_joins_late_is_told_what_was_before(hosted, tmp_path):
    kind, server = hosted
    with pytest.raises(Crash):
        go(tmp_path, on_row=crash_after(8))
    go(tmp_path, kind)
    assert server.curves() == wanted(tmp_path)


@pytest.mark.parametrize("killed", [False, True], ids=["closed", "killed"])
def test_tensorboard_shows_every_point_once(tmp_path, killed):
    pytest.importorskip("tensorboard", reason="pip install 'opsin[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Crash):
        go(tmp_path, on_row=crash_after(4))  # without it
    with pytest.MonkeyPatch.context() as patch:
        if killed:
            patch.setattr(TensorBoard, "close", lambda self: None)
        for steps in (2, 6):
            with pytest.raises(Crash):
                go(tmp_path, "tensorboard", on_row=crash_after(steps))
    go(tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "out" / "trackers" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    curves = {
        tag: [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert {tag: curve for tag, curve in curves.items() if tag.endswith("/loss")} == wanted(tmp_path)
    assert "second/waiting_for_data" in curves


def test_trackers_change_nothing_of_the_training(hosted, tmp_path):
    kind, _ = hosted
    results = []
    for name, trackers in (("with", (kind,)), ("without", ())):
        (tmp_path / name).mkdir()
        results.append(go(tmp_path / name, *trackers))
    assert differing(*(tensors_of(result.model) for result in results)) == []
    assert log_of(tmp_path / "with" / "out") == log_of(tmp_path / "without" / "out")
    assert not (tmp_path / "without" / "out" / "trackers").exists()


@pytest.mark.parametrize(
    ("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_what_is_not_installed_is_told_before_anything_happens(kind, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"trackers names {kind}, .* pip install 'opsin\[{kind}\]'"):
        run(two_stages(tmp_path / "out", trackers=[kind]), sources=two_sources())
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_does_not_start_stops_the_run(hosted, tmp_path, monkeypatch):
    kind, _ = hosted

    def refuse(**_):
        raise PermissionError("no key")

    monkeypatch.setattr(sys.modules[kind], "init" if kind == "wandb" else "start_run", refuse)
    with pytest.raises(TrainError, match=f"{kind} cannot be started: no key. Mend it, or take it out of trackers"):
        go(tmp_path, kind)


def test_a_tracker_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trackers\.0: Input should be 'tensorboard', 'wandb' or 'mlflow'"):
        two_stages(tmp_path, trackers=["tensorbord"])
