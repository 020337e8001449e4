"""`opsin demo` from its command to its files, with hardly any training."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from opsin.cli.app import run as main
from opsin.demo import run as demo


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK_SECONDS", 0.0)
        patch.setattr(demo, "PER_TASK_QUICK", 8)
        assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder


def test_the_folder_is_a_model_to_chat_with(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = sorted((out / "pictures").iterdir())[0]
    assert main(["chat", str(out), "--image", str(picture), "--max-new-tokens", "4", "What is this?"]) == 0
    assert capsys.readouterr().out.strip()


def test_results_hold_the_three_figures_over_all_and_per_task(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    tasks = results["tasks"]
    assert len(tasks) >= 10
    for scores in (results, *tasks.values()):
        assert {"accuracy", "majority", "shuffled"} <= scores.keys()
    assert results["questions"] == 8 * len(tasks)
    assert results["seconds"] > 0
    assert results["peak_rss_bytes"] > 2**27
    assert results["accuracy"] == pytest.approx(sum(scores["accuracy"] for scores in tasks.values()) / len(tasks))


def test_ten_unseen_pictures_and_the_report_are_there(out: Path) -> None:
    assert len(list((out / "pictures").iterdir())) == 10
    page = (out / "report.html").read_text()
    assert page.count("<img") >= 10
    assert "shuffled" in page


def test_a_run_over_an_earlier_one_is_allowed_and_over_other_files_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) != 0
    assert "not a demo's folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_time_decides_how_many_steps() -> None:
    assert demo.pretrain_share() == 0.1
    assert demo.planned_steps(224.6, most=900) == 225
    assert demo.planned_steps(1e6, most=900) == 900
    assert demo.planned_steps(3240, most=None) == 3240
    assert demo.planned_steps(-1, most=900) == 8


def test_a_stage_is_planned_by_the_speed_when_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As if another program were busy during the first measurement alone.
    speeds = iter((10.0, 0.5))
    monkeypatch.setattr(demo, "seconds_per_step", lambda *_, **__: next(speeds))
    planned: list[int] = []
    monkeypatch.setattr(demo, "train", lambda config, **_: planned.append(config.stages[0].steps))
    model, console = demo.start(0), Console(width=120)
    demo.train_stages(tmp_path, model, 250.0, capped=True, seed=0, device="cpu", console=console)
    assert planned[0] == 8
    assert 480 < planned[1] <= 500
    assert "stage 'finetune', as many as there is time for" in capsys.readouterr().out
