"""Several processes are one run: the same samples, the same curve, one log, one checkpoint, one error."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from opsin import weights
from opsin.spec.recipe import RunConfig
from opsin.train.checkpoint import CheckpointStore
from train import together
from train.test_runs import log_of

CURVE = 1e-5
"""Relative difference of losses that rounding may make: sums over samples are added up in another order."""


def curve(output: Path) -> list[float]:
    return [row["loss"] for row in log_of(output)]


def left_by(folder: Path, size: int) -> list:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    together.start(1, together.whole_run, folder, together.adamw_stages(folder / "out", workers=0))
    return folder


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_curve_does_not_depend_on_the_number_of_processes(alone, tmp_path, size):
    """Of short steps, several passes and steps with fewer samples than processes."""
    together.start(size, together.whole_run, tmp_path, together.adamw_stages(tmp_path / "out", workers=0))
    assert curve(tmp_path / "out") == pytest.approx(curve(alone / "out"), rel=CURVE)
    for one, many in zip(log_of(alone / "out"), log_of(tmp_path / "out"), strict=True):
        for key in ("stage", "step", "lr", "samples", "tokens", "image_tokens", "supervised"):
            assert one[key] == many[key]
        assert one["grad_norm"] == pytest.approx(many["grad_norm"], rel=1e-4)
    (whole,) = left_by(alone, 1)
    read = [each["asked"] for each in left_by(tmp_path, size)]
    assert {tuple(place) for asked in read for place in asked} == {tuple(place) for place in whole["asked"]}
    models = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(size)]
    saved = load_file(tmp_path / "out" / "second" / "model.safetensors")
    for name, tensor in saved.items():
        assert all(model[name].equal(tensor) for model in models), name
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_half_precision_follows_the_curve_of_one_process(tmp_path):
    """Products in bfloat16 keep 8 bits, so that sums in another order differ by some 1e-4; weights stay float32."""
    curves = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        more = {"precision": "bfloat16", "activations": "recompute" if size == 2 else "keep"}
        together.start(size, together.whole_run, folder, together.adamw_stages(folder / "out", **more))
        curves.append(curve(folder / "out"))
        saved = load_file(folder / "out" / "second" / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-6), "the same products, before anything was trained"
    assert curves[0] == pytest.approx(curves[1], rel=5e-4)


def assert_dcp_reads(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    """PyTorch's own reader finds the same in a checkpoint, however many processes wrote it."""
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in wanted.items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert wanted
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# 4 -> 2 -> 1 and 1 -> 2: stops in both stages, saved by as many processes as ran.
@pytest.mark.parametrize(
    "sizes",
    [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow), pytest.param((4, 2, 1), marks=pytest.mark.slow)],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path, sizes):
    config = together.adamw_stages(tmp_path / "out")
    for size, stop_after in zip(sizes, [3, 4, None], strict=False):
        last = size == sizes[-1]
        together.start(size, together.whole_run, tmp_path, config, None if last else stop_after)
        assert {each["status"] for each in left_by(tmp_path, size)} == {"finished" if last else "stopped"}
        saved = CheckpointStore(tmp_path / "out" / "checkpoints", keep=2).newest()
        assert saved is not None
        assert saved.state["processes"] == size
        for group in ("weights", "optimizer"):
            assert_dcp_reads(saved.folder, saved.tensors(group))
    assert curve(tmp_path / "out") == pytest.approx(curve(alone / "out"), rel=CURVE)
    one, other = (load_file(folder / "out" / "second" / "model.safetensors") for folder in (alone, tmp_path))
    assert one.keys() == other.keys()


@pytest.mark.slow
def test_dcp_loads_what_more_processes_saved(tmp_path):
    together.start(4, together.save_split, tmp_path)
    for size in (3, 2):
        together.start(size, together.load_split_with_dcp, tmp_path)


@pytest.mark.parametrize(
    "names", [["llava_next", "qwen2_vl"], pytest.param(together.FAMILIES, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_pictures_and_text_alone_mix_in_every_family(tmp_path, names):
    """Towers trained and frozen; processes without pictures and without samples run what the others run."""
    together.start(1, together.mixtures, tmp_path / "alone", names)
    together.start(2, together.mixtures, tmp_path / "two", names)
    (expected,), found = left_by(tmp_path / "alone", 1), left_by(tmp_path / "two", 2)
    assert found[0] == found[1]
    assert expected.keys() == found[0].keys()
    for what, rows in expected.items():
        for one, many in zip(rows, found[0][what], strict=True):
            assert one == pytest.approx(many, rel=1e-4), what
            assert one[0] == pytest.approx(many[0], rel=CURVE), what


@pytest.fixture(scope="module")
def failed(tmp_path_factory) -> Path:
    """Runs that something on one of two processes ends."""
    folder = tmp_path_factory.mktemp("failed")
    together.start(2, together.failing, folder)
    return folder


def said_by_all(folder: Path, name: str) -> str:
    """What a run ended with, in the same words in both processes, at a checkpoint of its last step."""
    first, second = ((folder / f"{name}-{rank}.txt").read_text() for rank in range(2))
    assert first == second
    saved = CheckpointStore(folder / name / "checkpoints", keep=2).newest()
    assert saved is not None
    assert saved.step == (2 if name == "full disk" else len(log_of(folder / name)))
    assert not list((folder / name).rglob("*.tmp"))
    return first


def test_what_is_not_finite_on_one_stops_all_before_the_update(failed):
    said = said_by_all(failed, "not finite")
    assert said.startswith("TogetherError: stage 'second', step ")
    assert "the loss is inf" in said
    assert "Nothing was updated. Samples of the passes concerned: " in said
    assert "'picture 12'" in said
    assert "(process " in said
    assert "Computed once more: " in said


def test_a_sample_that_one_cannot_read_stops_all_with_its_message(failed):
    said = said_by_all(failed, "unreadable")
    assert said.startswith("TogetherError: process ")
    assert said.endswith(" of 2: picture 12 is damaged")


def test_a_checkpoint_that_one_cannot_write_is_none(failed):
    said = said_by_all(failed, "full disk")
    assert "process 1 of 2: checkpoint" in said
    assert "No space left on device" in said
    assert "the last complete one is step-00000002" in said


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, "int8"])
def test_adapters_follow_the_curve_of_one_process(tmp_path, bits):
    """On whole layers, which are split, and on quantised ones, of which every process has all."""
    logs = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        data = together.adamw_stages(folder / "out").model_dump(mode="json")
        stages = data["stages"]
        stages[1] |= {"trainable": ["connector"], "lora": {"rank": 4, "alpha": 8}}
        data |= {"stages": stages if bits is None else stages[1:], "quantize": bits}
        together.start(size, together.whole_run, folder, RunConfig.parse(data, where="test"))
        logs.append(curve(folder / "out"))
        assert (folder / "out" / "second" / "adapter_model.safetensors").exists()
    assert logs[0] == pytest.approx(logs[1], rel=CURVE)


def test_stage_1_compares_the_pairs_of_all_processes(tmp_path):
    """Steps of 6 and of 3, which two processes share 3 and 3, 2 and 1. Negatives belong to pairs, not to processes."""
    together.start(1, together.pairs_compared, tmp_path / "alone")
    together.start(2, together.pairs_compared, tmp_path)
    (alone,) = left_by(tmp_path / "alone", 1)
    first, second = left_by(tmp_path, 2)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["temperature"] == pytest.approx(alone["temperature"], rel=1e-5)
    assert first == second, "the temperature is a scalar, which is not split, and stays the same everywhere"
    assert first["temperature"] != pytest.approx(0.07)
    assert all(loss > 0 for loss in first["losses"])


def test_processes_judge_and_leave_out_samples_as_one(tmp_path):
    """Evaluations by loss and by answers, the best model, and the ledger."""
    logs, ledgers = [], []
    for size in (1, 2):
        folder = tmp_path / str(size)
        data = together.adamw_stages(folder / "out").model_dump(mode="json")
        for stage, metric in zip(data["stages"], ("loss", "exact_match"), strict=True):
            stage["evaluate"] = {"every": 2, "metric": metric, "max_new_tokens": 4}
            stage["bad_samples"] = {"policy": "skip", "max_share": 0.1}
        together.start(size, together.judged, folder, RunConfig.parse(data, where="test"))
        logs.append(log_of(folder / "out"))
        ledgers.append((folder / "out" / "left_out.jsonl").read_text())
        assert (folder / "out" / "best" / "second" / "model.safetensors").exists()
    assert ledgers[0] == ledgers[1]
    assert '"sample": 12' in ledgers[0]
    for one, two in zip(*logs, strict=True):
        if "evaluation" in one:
            assert one["evaluation"] == pytest.approx(two["evaluation"], rel=CURVE)
            assert (one["step"], one["best"], one["samples"]) == (two["step"], two["best"], two["samples"])
        else:
            assert one["loss"] == pytest.approx(two["loss"], rel=CURVE)
            assert one["left_out"] == two["left_out"]
    assert sum("evaluation" in row for row in logs[0]) == 2 + 4
    first, second = left_by(tmp_path / "2", 2)
    assert first == second


@pytest.mark.parametrize("bits", [None, "int8"])
def test_adapters_train_together(tmp_path, bits):
    for size in (1, 2):
        folder = tmp_path / str(size)
        data = together.adamw_stages(folder / "out", workers=0, quantize=None).model_dump(mode="json")
        lora = {"rank": 4, "alpha": 8, "targets": ["decoder", "vision"]}
        second = {**data["stages"][1], "trainable": ["connector"], "lora": lora, "steps": 4}
        config = RunConfig.parse({**data, "stages": [second], "quantize": bits}, where="test")
        together.start(size, together.adapters, folder, config)
    one, two = tmp_path / "1" / "out", tmp_path / "2" / "out"
    assert curve(two) == pytest.approx(curve(one), rel=CURVE)
    settings = [(out / "second" / "adapter_config.json").read_bytes() for out in (one, two)]
    assert settings[0] == settings[1]
    alone, together_ = (weights.load(out / "second").vlm.state_dict() for out in (one, two))
    for name, tensor in alone.items():
        assert tensor.allclose(together_[name], atol=1e-4), name
    if bits is None:
        for rank in (0, 1):
            ended = load_file(tmp_path / "2" / f"{rank}.safetensors")
            assert all(ended[name].equal(tensor) for name, tensor in together_.items())
