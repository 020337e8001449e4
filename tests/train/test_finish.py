"""Stages that end with the weights of their best evaluation, and the stage after them, which begins there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opsin import weights
from opsin.errors import TrainError
from opsin.spec.recipe import RunConfig
from opsin.train import RunResult, run
from opsin.train.evaluate import Judge
from train import together
from train.test_evaluate import Telling, evaluations_of, held_out
from train.test_runs import Crash, crash_after, log_of
from train.toy import differing, tensors_of, tiny_model, two_sources, two_stages

LORA = {"rank": 4, "alpha": 8, "targets": ["decoder", "vision.layers.*.attn.*"]}
WORSE_AFTER = {"first": 2, "second": 6}
"""The best step of each stage: everything later counts as worse."""


@pytest.fixture(autouse=True, scope="module")
def scores() -> Iterator[None]:
    """Evaluations get worse from a known step on, as they do where a model begins to learn its data by heart."""
    judged = Judge._loss

    def loss(self: Judge, loop: Any) -> float:
        judged(self, loop)
        return float(abs(loop.step - WORSE_AFTER[loop.stage.name]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "_loss", loss)
        yield


def finishing(output: Path, *, lora: bool = False, **changes: Any) -> RunConfig:
    """`two_stages`, evaluated after 2 and 4 steps, and after 3, 6 and 7, which end with their best weights."""
    data = two_stages(output).model_dump(mode="json")
    first, second = data["stages"]
    first["evaluate"] = {"every": 2, "finish": "best", **changes}
    second["evaluate"] = {"every": 3, "finish": "best", **changes}
    if lora:
        first |= {"lora": LORA, "optim": {"kind": "adamw", "lr": 1e-2}}
    return RunConfig.parse(data, where="test")


def go(config: RunConfig, folder: Path, **more: Any) -> RunResult:
    return run(config, model=tiny_model(folder), sources=two_sources(), held_out=held_out(), **more)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult, Telling]:
    folder, telling = tmp_path_factory.mktemp("straight"), Telling()
    return folder / "out", go(finishing(folder / "out"), folder, reporter=telling), telling


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_a_stage_ends_with_its_best_and_the_next_begins_there(
    straight: tuple[Path, RunResult, Telling], tmp_path: Path, lora: bool
) -> None:
    output, result, telling = straight
    if lora:
        output, telling = tmp_path / "out", Telling()
        result = go(finishing(output, lora=True), tmp_path, reporter=telling)
    assert [row["step"] for row in evaluations_of(output) if row["best"]] == [2, 3, 6]
    ends = [text for text in telling.said if "ends with its best weights" in text]
    assert ends == [f"stage {n!r} ends with its best weights, those after step {s}" for n, s in WORSE_AFTER.items()]
    for name in WORSE_AFTER:
        (end,) = (output / name).glob("*model.safetensors")
        assert end.read_bytes() == (output / "best" / name / end.name).read_bytes()
    assert differing(tensors_of(weights.load(output / "best" / "second")), tensors_of(result.model)) == []

    # The second stage alone, from the first one's best.
    data = finishing(tmp_path / "alone").model_dump(mode="json")
    alone = run(
        RunConfig.parse({**data, "stages": data["stages"][1:]}, where="test"),
        model=weights.load(output / "best" / "first"),
        sources={"second": two_sources()["second"]},
        held_out={"second": held_out()["second"]},
    )
    assert differing(tensors_of(alone.model), tensors_of(result.model)) == []
    rows = log_of(output)
    assert log_of(tmp_path / "alone") == [row for row in rows if row["stage"] == "second"]


# Steps of the run: 4 + 7. Checkpoints after 3, 4, 7, 10, 11.
@pytest.mark.parametrize("crashes", [[4], [5], [4, 3, 5]], ids=str)
def test_it_goes_on_to_the_same_bits(
    straight: tuple[Path, RunResult, Telling], tmp_path: Path, crashes: list[int]
) -> None:
    (expected_output, expected, _), output = straight, tmp_path / "out"
    for steps in crashes:
        with pytest.raises(Crash):
            go(finishing(output), tmp_path, on_row=crash_after(steps))
    result = go(finishing(output), tmp_path)
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(output) == log_of(expected_output)
    again = go(finishing(output), tmp_path)  # nothing is left to do; the model is still the best one
    assert differing(tensors_of(again.model), tensors_of(expected.model)) == []


def test_one_that_ends_early_ends_with_its_best(tmp_path: Path) -> None:
    result = go(finishing(tmp_path / "out", patience=1), tmp_path)
    assert [row["step"] for row in evaluations_of(tmp_path / "out")] == [2, 4, 3, 6, 7]
    tensors = load_file(tmp_path / "out" / "best" / "second.safetensors")
    state = result.model.vlm.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert set(tensors) == {name for name, _ in result.model.vlm.named_parameters() if not name.startswith("vision.")}


def test_without_it_the_last_weights_stay(tmp_path: Path) -> None:
    result = go(finishing(tmp_path / "out", finish="last"), tmp_path)
    plain = run(two_stages(tmp_path / "plain"), model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(plain.model)) == []
    assert not list((tmp_path / "out").glob("best/*.safetensors"))


def test_where_nothing_was_best_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "_loss", lambda self, loop: float("nan"))
    with pytest.raises(TrainError, match="'first' is to finish with its best weights, but no evaluation gave a finite"):
        go(finishing(tmp_path / "out"), tmp_path)


@pytest.mark.slow
def test_two_processes_end_with_the_same_best(tmp_path: Path) -> None:
    together.start(2, together.finishing_run, tmp_path, tmp_path / "out")
    ends = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert not evaluations_of(tmp_path / "out")[-1]["best"]
    best = load_file(tmp_path / "out" / "best" / "second" / "model.safetensors")
    for name, tensor in best.items():
        assert all(end[name].equal(tensor) for end in ends), name
