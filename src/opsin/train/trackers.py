"""TensorBoard, W&B and MLflow: programs that are told what `log.jsonl` says. None is imported before it is asked for.

The log is what counts. A tracker that a run opens is brought up to it first, from the newest point that the tracker has
on; so a run that goes on writes no point twice, and one that was killed leaves no gap.
"""

import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from opsin.errors import ConfigError, TrainError
from opsin.spec.recipe import RunConfig
from opsin.train.log import RowLog

Values = Mapping[str, float]

NEWEST = "step"
"""Told with every point, so that W&B and MLflow can be asked which was the last."""
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """One such program."""

    newest: int
    """The last step that it has."""

    def write(self, step: int, values: Values) -> None:
        """Everything about one step. Steps count over all stages, from 1."""

    def flush(self) -> None:
        """Put on the disk what was written."""

    def close(self) -> None:
        """The run stops, for whatever reason."""


class TensorBoard:
    """Event files in OUTPUT/trackers/tensorboard. What an older file has of steps that come again is passed over."""

    def __init__(self, config: RunConfig, folder: Path, steps: int) -> None:
        """folder: of the trackers of the run. steps: that the log has."""
        self._flushed = folder / "tensorboard-step"
        self.newest = min(steps, int(_remembered(self._flushed, lambda: "0")))
        self._last = self.newest
        self._writer = _import("tensorboard").SummaryWriter(str(folder / "tensorboard"), purge_step=self.newest + 1)

    def write(self, step: int, values: Values) -> None:
        """One point per curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._last = step

    def flush(self) -> None:
        """Before each checkpoint: all up to it are then in the file, whatever happens later."""
        self._writer.flush()
        self._flushed.write_text(str(self._last))

    def close(self) -> None:
        """Close the file."""
        self.flush()
        self._writer.close()


class WandB:
    """One W&B run, whose id stays in OUTPUT/trackers/wandb-run.

    Offline (`WANDB_MODE=offline`) nobody knows what it has; each start then writes a folder of its own with everything
    so far, and the newest is the one to send (`wandb sync`).
    """

    def __init__(self, config: RunConfig, folder: Path, steps: int) -> None:
        """folder: of the trackers of the run."""
        wandb, file = _import("wandb"), folder / "wandb-run"
        about = config.model_dump(mode="json")
        new = {} if file.exists() else {"config": about}
        name = os.environ.get("WANDB_NAME", Path(config.output).name)
        self._run = wandb.init(id=_remembered(file, _new_id), resume="allow", dir=str(folder), name=name, **new)
        if self._run.offline and not new:
            self._run.config.update(about, allow_val_change=True)
        self.newest = int(self._run.summary.get(NEWEST) or 0)

    def write(self, step: int, values: Values) -> None:
        """One row of its history."""
        self._run.log({**values, NEWEST: step}, step=step)

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


class MLflow:
    """One MLflow run, whose id stays in OUTPUT/trackers/mlflow-run."""

    def __init__(self, config: RunConfig, folder: Path, steps: int) -> None:
        """folder: of the trackers of the run."""
        self._mlflow, file = _import("mlflow"), folder / "mlflow-run"
        name = os.environ.get("MLFLOW_RUN_NAME", Path(config.output).name)
        run = self._mlflow.start_run(run_id=file.read_text() if file.exists() else None, run_name=name)
        if not file.exists():
            self._mlflow.log_dict(config.model_dump(mode="json"), "run.yaml")
            file.write_text(run.info.run_id)
        self.newest = int(run.data.metrics.get(NEWEST, 0))

    def write(self, step: int, values: Values) -> None:
        """All metrics of a step in one call."""
        self._mlflow.log_metrics({**values, NEWEST: step}, step=step)

    def flush(self) -> None:
        """Each call is sent as it is made."""

    def close(self) -> None:
        """End the run there."""
        self._mlflow.end_run()


OPEN: Mapping[str, Callable[[RunConfig, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}


class Trackers:
    """All trackers of a run. One that fails is told no more, and is brought up to date when the run is given again."""

    def __init__(self, config: RunConfig, log: RowLog, *, say: Callable[[str], None]) -> None:
        """log: what they are brought up to. say: where a failure is told. Raises TrainError for one that won't open."""
        self._say = say
        self._open: dict[str, Tracker] = {}
        self._step = 0
        if not config.trackers:
            return
        points = list(_points(log.read()))
        self._step = len(points)
        folder = Path(config.output) / "trackers"
        folder.mkdir(exist_ok=True)
        for kind in config.trackers:
            try:
                self._open[kind] = OPEN[kind](config, folder, self._step)
            except Exception as error:
                self.close()
                raise TrainError(f"{kind} cannot be started: {error}. Mend it, or take it out of trackers.") from None
        for step, values in enumerate(points, start=1):
            self._write(step, values)

    def row(self, row: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> None:
        """A step was made, and perhaps an evaluation after it."""
        self._step += 1
        self._write(self._step, {**values_of(row), **(values_of(evaluation) if evaluation else {})})

    def flush(self) -> None:
        """A checkpoint is about to be written."""
        self._each(lambda tracker: tracker.flush())

    def close(self) -> None:
        """The run stops, for whatever reason."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _write(self, step: int, values: Values) -> None:
        self._each(lambda tracker: tracker.write(step, values) if step > tracker.newest else None)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for kind, tracker in list(self._open.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever another program may raise: training goes on
                del self._open[kind]
                self._say(f"{kind} failed and is told no more: {error}. Given again, the command brings it up to date.")


def check_installed(config: RunConfig) -> None:
    """Raises ConfigError, naming what to install, unless the trackers of a run are there."""
    for kind in config.trackers:
        _import(kind)


def values_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The curves that a row of the log, of a step or of an evaluation, has a point on."""
    stage = row["stage"]
    if "evaluation" in row:
        values = {f"evaluate/{name}": value for name, value in row["evaluation"].items()}
    else:
        seconds = max(row["seconds"], 1e-9)
        values = {
            **{key: row[key] for key in ("loss", "grad_norm", "epoch")},
            # MLflow may keep a curve as a file, and then no other can lie below its name.
            **{f"lr/{label.replace('/', '.')}": rate for label, rate in row["lr"].items()},
            "tokens_per_second": row["tokens"] / seconds,
            "waiting_for_data": row["data_seconds"] / seconds,
        }
    return {re.sub(r"[^\w./-]", "_", f"{stage}/{name}"): float(value) for name, value in values.items()}


def _points(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, float]]:
    """One for each step of the log, that of an evaluation after it included."""
    point: dict[str, float] | None = None
    for row in rows:
        if "evaluation" in row and point is not None:
            point |= values_of(row)
            continue
        if point is not None:
            yield point
        point = values_of(row)
    if point is not None:
        yield point


def _import(kind: str) -> Any:
    try:
        return import_module(MODULES[kind])
    except ImportError as error:
        raise ConfigError(
            f"trackers names {kind}, which cannot be imported ({error}). Install it: pip install 'opsin[{kind}]'"
        ) from None


def _new_id() -> str:
    return uuid.uuid4().hex[:16]


def _remembered(file: Path, make: Callable[[], str]) -> str:
    """What a file says; it is made where there is none."""
    if not file.exists():
        file.write_text(make())
    return file.read_text()
