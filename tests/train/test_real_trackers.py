"""W&B and MLflow themselves, without their servers: a run that crashes and goes on. Where they are installed."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from train.test_evaluate import Telling
from train.test_runs import Crash, crash_after
from train.test_trackers import go, wanted


def crash_and_go_on(folder: Path, kind: str) -> None:
    telling = Telling()
    for steps in (5, 4):
        with pytest.raises(Crash):
            go(folder, kind, on_row=crash_after(steps), reporter=telling)
    go(folder, kind, reporter=telling)
    assert [text for text in telling.said if "is told no more" in text] == []


def test_mlflow_has_every_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="pip install 'opsin[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    crash_and_go_on(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("Default").experiment_id])
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["run.yaml"]
    assert {"second/lr/decoder", "second/lr/decoder.muon"} <= run.data.metrics.keys()
    curves = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
        if name.endswith("/loss")
    }
    assert curves == wanted(tmp_path)


def history(file: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """The curves and the settings in a file that W&B keeps offline: records in blocks of 32 KiB, behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    def records(data: bytes) -> Iterator[bytes]:
        at, begun = 7, b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            if left < 7 or kind == 0:
                at += left
                continue
            begun += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                yield begun
                begun = b""

    curves: dict[str, list[tuple[int, float]]] = {}
    settings: list[str] = []
    for data in records(file.read_bytes()):
        record: Any = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or ".".join(item.nested_key)
            if name.endswith("/loss"):
                curves.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
        settings += [item.key for each in (record.run.config, record.config) for item in each.update]
    return curves, settings


def test_the_newest_folder_of_wandb_offline_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install 'opsin[wandb]'")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    crash_and_go_on(tmp_path, "wandb")
    folder = tmp_path / "out" / "trackers" / "wandb"
    assert len(list(folder.glob("offline-run-*"))) == 3
    (file,) = (folder / "latest-run").glob("*.wandb")
    curves, settings = history(file)
    assert curves == wanted(tmp_path)
    assert "stages" in settings
