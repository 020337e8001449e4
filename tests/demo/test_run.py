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


def test_time_decides_how_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "seconds_per_step", lambda *_, **__: 1.0)
    model = demo.start(0)

    def steps(**options: object) -> int:
        given = {"minutes": None, "quick": False, **options}
        console = Console(quiet=True)
        stages = demo.planned_stages(model, seed=0, device="cpu", console=console, **given)  # type: ignore[arg-type]
        return sum(stage.steps or 0 for stage in stages)

    assert steps() == demo.BUDGET_SECONDS
    assert steps(quick=True) == demo.QUICK_SECONDS
    assert steps(minutes=60) == 3600
