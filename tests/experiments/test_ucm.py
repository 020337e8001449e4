"""The experiment on aerial pictures runs from start to end, on a data set of its kind that is made here."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

import toys
from opsin.cli.app import run as opsin

ROOT = Path(__file__).parents[2]
EXPERIMENT, DOCS = ROOT / "experiments" / "ucm", ROOT / "docs" / "experiments"
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


def test_it_runs_from_the_pictures_to_the_tables(data, tmp_path, monkeypatch, capsys):
    prepare, controls = (importlib.import_module(name) for name in ("prepare", "controls"))
    small = {"dim": 32, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    monkeypatch.setattr(prepare, "TOWER", prepare.TOWER.replace(**small))
    monkeypatch.setattr(prepare, "QFORMER", prepare.QFORMER.replace(**small))
    monkeypatch.setattr(prepare, "DECODER", prepare.DECODER.replace(**small, num_kv_heads=2))
    out = Path("runs/ucm")
    prepare.prepare(data, out)
    pairs = [json.loads(line) for line in (out / "data" / "train-pairs.jsonl").read_text().splitlines()]
    assert len(pairs) == 12 * 5
    assert all((out / "data" / pair["image"]).exists() for pair in pairs)
    for name in ("stage1", "captions"):
        assert opsin(["train", str(EXPERIMENT / f"{name}.yaml"), *SHORT]) == 0, capsys.readouterr().err
    run = importlib.import_module("run")
    for task, model, asked in run.EVALUATIONS:
        wanted = [word for control in asked for word in ("--control", control)]
        where = ["--task", str(EXPERIMENT / f"{task}.yaml"), "--output", str(out / "eval" / task)]
        assert opsin(["eval", str(out / model), *where, *wanted]) == 0, capsys.readouterr().err
        figures = json.loads((out / "eval" / task / "results.json").read_text())["figures"]
        assert {"real", *asked} <= figures.keys()
    monkeypatch.setattr(sys, "argv", ["controls.py", str(data), str(out / "controls.json")])
    controls.main()
    found = json.loads((out / "controls.json").read_text())
    assert found["retrieval by the kind alone"]["picture to text"][0] > 0.3
    levels = found["CIDEr-D"]
    assert levels["the kind alone"]["value"] > levels["one caption for all"]["value"] > 0
    run.FACTS.write_text(json.dumps({"stage1": {"minutes": 1.5, "cpu_minutes": 1.0, "peak_mib": 300.0}}))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "ucm.md").write_text((DOCS / "ucm.md").read_text())
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "DOCS", docs)
    monkeypatch.setattr(sys, "argv", ["report.py", "--update-docs"])
    report.main()
    page = (docs / "ucm.md").read_text()
    assert page.count("| text to picture: ") == 6
    assert "| stage1 | 1.5 | 1.0 | 300 |" in page
    assert "Not run to its end" not in page
    assert (docs / "ucm-stage1.svg").read_text().startswith("<svg")


def test_who_knows_the_kind_finds_what_its_pictures_share(monkeypatch):
    """Two kinds of two pictures: texts of the kind are five right ones of ten, or all where the kind shares them."""
    monkeypatch.syspath_prepend(EXPERIMENT)
    controls = importlib.import_module("controls")
    shown = [{"image": f"images/{number}.jpg", "captions": list(captions)} for number, captions in (
        (1, "abcde"), (2, "fghij"), (101, "kkkkk"), (102, "kkkkk"),
    )]  # fmt: skip
    levels = controls.retrieval_by_kind(shown)
    assert levels["picture to text"][0] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert levels["text to picture"][0] == pytest.approx((10 * 0.5 + 10 * 1) / 20)
