"""The experiment on aerial pictures runs from start to end, on a data set of its kind that is made here."""

import importlib
import json
import random
from pathlib import Path

import pytest

import toys
from opsin.cli.app import run as opsin

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "ucm"
KINDS = {"field": "a green field .", "lake": "It is a blue lake .", "sand": "There is sand ."}
SHORT = ["stages.0.steps=2", "stages.0.batch.samples=8", "stages.0.evaluate.every=2", "workers=0", "device=cpu"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty pictures of three kinds, numbered kind by kind, with five captions each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXPERIMENT)
    folder = tmp_path / "pictures"
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(20):
        kind = index % len(KINDS)
        name = f"images/{100 * kind + index + 1}.jpg"
        toys.picture((60, 50), seed=index).save(folder / name)
        split = "train" if index < 12 else "val" if index < 16 else "test"
        words = list(KINDS.values())[kind]
        captions = [words, f"{words[:-2]} and {random.Random(index).choice(['cars', 'trees'])} .", *[words] * 3]
        lines.append(json.dumps({"image": name, "split": split, "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_it_runs_from_the_pictures_to_the_tables(data, tmp_path, capsys):
    prepare, evaluate = (importlib.import_module(name) for name in ("prepare", "evaluate"))
    out = tmp_path / "runs" / "ucm"
    prepare.prepare(data, out)
    pairs = [json.loads(line) for line in (out / "data" / "train.jsonl").read_text().splitlines()]
    assert len(pairs) == 12 * 5
    assert all((out / "data" / pair["image"]).exists() for pair in pairs)
    for name in ("stage1", "captions"):
        assert opsin(["train", str(EXPERIMENT / f"{name}.yaml"), *SHORT]) == 0, capsys.readouterr().err
    found = evaluate.retrieval(data, out, "test")
    assert found["pictures"] == 4
