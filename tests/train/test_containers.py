"""The same records train the same model, whatever container they lie in, and a stopped run goes on over shards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.containers import png, write_json, write_tar
from opsin import weights
from opsin.spec.recipe import RunConfig
from opsin.train import run
from train.toy import tiny_model


def config(folder: Path, name: str, path: Path, **changes: Any) -> RunConfig:
    stage = {
        "name": "tune",
        "trainable": ["connector", "decoder"],
        "data": [{"path": str(path), "image_root": str(folder)}],
        "batch": {"samples": 3, "micro_samples": 2},
        "optim": {"kind": "adamw", "lr": 1e-3},
        "sampler": "modality_length",
        "steps": 5,
    }
    whole = {
        "model": "tiny",
        "output": str(folder / name),
        "device": "cpu",
        "checkpoint": {"every": 1},
        "stages": [stage],
        **changes,
    }
    return RunConfig.parse(whole, where="test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven records, some without a picture, as JSON lines, two shards and parquet."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    shards: list[dict[str, Any]] = [{}, {}]
    rows = []
    for number in range(7):
        shown = number % 3 != 2
        turns = [
            {"from": "human", "value": ("<image>\n" if shown else "") + "What?"},
            {"from": "gpt", "value": "abcdefg"[number] * (number + 2)},
        ]
        members: dict[str, Any] = {f"{number}.json": {"conversations": turns}}
        records.append({"conversations": turns})
        rows.append({"conversations": turns, "image": None})
        if shown:
            (folder / f"{number}.png").write_bytes(png(number))
            members[f"{number}.png"] = png(number)
            records[-1]["image"] = f"{number}.png"
            rows[-1]["image"] = {"bytes": png(number)}
        shards[number // 4] |= members
    write_json(folder / "data.jsonl", records)
    for number, members in enumerate(shards):
        write_tar(folder / f"shard-{number}.tar", members)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), folder / "data.parquet", row_group_size=2)
    return folder


def result(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    rows = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return weights.load(folder / name / "tune").vlm.state_dict(), [row["loss"] for row in rows]


def test_every_container_trains_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    for path in ("data.jsonl", "shard-*.tar", "data.parquet"):
        name = path.replace("*", "x")
        run(config(folder, f"out-{name}", folder / path), model=tiny_model(tmp_path))
    tensors, losses = result(folder, "out-data.jsonl")
    for name in ("out-shard-x.tar", "out-data.parquet"):
        others, other_losses = result(folder, name)
        assert losses == other_losses
        assert all(torch.equal(others[key], tensors[key]) for key in tensors)


def test_a_run_over_shards_goes_on_to_the_same_bits(folder: Path, tmp_path: Path) -> None:
    def crash(row: Any) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    whole = config(folder, "whole", folder / "shard-{0..1}.tar", workers=0)
    parts = config(folder, "parts", folder / "shard-{0..1}.tar", workers=3)
    run(whole, model=tiny_model(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(parts, model=tiny_model(tmp_path), on_row=crash)
    run(parts, model=tiny_model(tmp_path))
    tensors, losses = result(folder, "whole")
    others, other_losses = result(folder, "parts")
    assert losses == other_losses
    assert all(torch.equal(others[key], tensors[key]) for key in tensors)
