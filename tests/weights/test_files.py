"""Damaged, incomplete, foreign and dangerous weight files: each one clear error, and nothing of them is run."""

import json
import pickle
import random
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsin import weights
from opsin.errors import OpsinError, WeightError
from weights.folders import edit_json, published, raw_safetensors, same, tiny

X = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("files") / "model")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in sound.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def refused(folder: Path) -> str:
    with pytest.raises(WeightError) as caught:
        weights.load(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off in its header (0 bytes)"),
        (b"1234567", "cut off in its header (7 bytes)"),
        (b"\xff" * 8, "no safetensors file, or cut off in its header"),
        (b"<html><body>Not found</body></html>", "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "no safetensors file"),
        (raw_safetensors(b"{not json"), "its header of 9 bytes is not JSON"),
        (raw_safetensors(b"[" * 30_000), "its header of 30000 bytes is not JSON"),
        (raw_safetensors([1, 2]), "its header is not a table of tensors"),
        (raw_safetensors({"x": {"dtype": "F32"}}), "the header entry of 'x' is malformed"),
        (raw_safetensors({"x": 5}), "the header entry of 'x' is malformed"),
        (raw_safetensors(X, b"1234567"), "cut off: it has 76 bytes, its header describes 77"),
        (raw_safetensors(X, b"123456789"), "followed by other data: it has 78 bytes, its header describes 77"),
        (
            raw_safetensors({"x": {**X["x"], "shape": [3]}}, b"12345678"),
            "[3] and type F32 does not fit its 8 bytes",
        ),
        (raw_safetensors({"x": {**X["x"], "shape": [-2]}}, b"12345678"), "does not fit"),
        (
            raw_safetensors({"x": {**X["x"], "data_offsets": [8, 16]}}, b"1" * 16),
            "begins at byte 8 of the data, exp",
        ),
        (raw_safetensors({**X, "y": X["x"]}, b"12345678"), "'y' begins at byte 0 of the data, expected 8"),
    ],
)
def test_a_damaged_file_is_named_with_its_numbers(folder: Path, data: bytes, reason: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(data)
    message = refused(folder)
    assert f"the files of {folder} are damaged or incomplete" in message
    assert "model.safetensors: " in message
    assert reason in message


def test_a_file_cut_anywhere_is_refused(folder: Path) -> None:
    """Half-finished downloads: every tenth of the file, and around the borders of header and data."""
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (0, 1, 7, 8, 9, header - 1, header, header + 1, *(len(whole) * i // 10 for i in range(1, 10)), -1):
        file.unlink()
        file.write_bytes(whole[:length])
        assert "model.safetensors: " in refused(folder)


def test_mutated_headers_never_crash(folder: Path) -> None:
    """100 seeded mutations of the header: the load succeeds or gives one of our errors."""
    draw = random.Random(0)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(100):
        spoilt = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            spoilt[draw.randrange(header)] = draw.choice(b'0123456789"{}[],:xF\x00\xff')
        file.unlink()
        file.write_bytes(spoilt)
        with suppress(OpsinError):
            weights.load(folder)


def test_mutated_configs_never_crash(folder: Path) -> None:
    """Values of config.json replaced by values of other types."""
    draw = random.Random(0)
    sound = json.loads((folder / "config.json").read_text())
    for _ in range(150):
        hub = json.loads(json.dumps(sound))
        part = draw.choice([hub, hub["text_config"], hub["vision_config"]])
        part[draw.choice(sorted(part))] = draw.choice([None, -1, 0, 3, 1.5, "x", [], [1], {}, {"a": 1}, True])
        (folder / "config.json").write_text(json.dumps(hub))
        with suppress(OpsinError):
            weights.load(folder)


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return published(tmp_path / "sharded", shard_bytes=200_000)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    file.unlink()
    message = refused(sharded)
    assert f"is incomplete: 1 of 4 weight files are not in {sharded}: {file.name}. Download them again" in message
    (sharded / "model.safetensors.index.json").unlink()
    assert f"is incomplete: 1 of 4 weight files are not in {sharded}: {file.name}" in refused(sharded)


def test_several_damaged_shards_come_in_one_error(sharded: Path) -> None:
    for file in sorted(sharded.glob("model-*.safetensors"))[:2]:
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[:-4])
    message = refused(sharded)
    assert "model-00001-of-00004.safetensors: cut off" in message
    assert "model-00002-of-00004.safetensors: cut off" in message


def test_an_index_that_lies_is_refused(sharded: Path) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    weight_map = index["weight_map"]
    name, shard = next(iter(weight_map.items()))

    edit_json(file, weight_map=weight_map | {"not.there": shard})
    assert f"says that 'not.there' is in {shard}, and it is not there" in refused(sharded)
    edit_json(file, weight_map=weight_map | {name: "model-00002-of-00004.safetensors"})
    assert f"says that {name!r} is in model-00002-of-00004.safetensors" in refused(sharded)
    for outside in ("../other/model.safetensors", "/etc/passwd", "weights.bin"):
        edit_json(file, weight_map=weight_map | {name: outside})
        assert f"names {outside!r}, which is not a safetensors file of this folder" in refused(sharded)
    for nonsense in ({}, [], None, 5):
        edit_json(file, weight_map=nonsense)
        assert "has no 'weight_map' from tensors to files" in refused(sharded)
    file.write_text("{")
    assert "has no 'weight_map'" in refused(sharded)


# ---- folders without weights that can be read ------------------------------------------------------------------------


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_unread(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    message = refused(folder)
    assert f"has its weights as Python pickles only ({name})" in message
    assert not (tmp_path / "canary").exists()


def test_the_way_to_convert_pickles_works_as_written(folder: Path) -> None:
    """The command of the error message, run in a shell; tensors that share memory are taken apart on the way."""
    state = load_file(folder / "model.safetensors")
    wanted = {name: tensor.clone() for name, tensor in weights.load(folder).vlm.state_dict().items()}
    (folder / "model.safetensors").unlink()
    torch.save({name: tensor for name, tensor in state.items() if "vision" in name}, folder / "pytorch_model-1.bin")
    torch.save({name: tensor for name, tensor in state.items() if "vision" not in name}, folder / "pytorch_model-2.bin")
    command = refused(folder).splitlines()[-1].strip()
    assert command.startswith(f"cd {shlex.quote(str(folder))} && python -c")
    command = command.replace("&& python ", f"&& {shlex.quote(sys.executable)} ")
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert same(weights.load(folder).vlm.state_dict(), wanted)


def test_only_an_index_of_pickles_says_how_to_get_them(folder: Path) -> None:
    """What a hub snapshot of such a repository looks like: pickles are never downloaded."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    assert "hf download" in refused(folder)


def test_a_single_pickle_as_a_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mm_projector.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "canary")))
    with pytest.raises(WeightError, match=r"pickles only \(mm_projector.bin\)"):
        weights.load_part(tiny().vlm, "connector", tmp_path / "mm_projector.bin")
    assert not (tmp_path / "canary").exists()


def test_a_folder_without_weights_or_config_says_what_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights: no model.safetensors, no model.safetensors.index.json" in refused(folder)
    (folder / "adapter_model.safetensors").write_bytes(raw_safetensors(X, b"12345678"))
    assert "holds a LoRA adapter, not a model" in refused(folder)
    (folder / "config.json").unlink()
    assert "has neither config.json nor opsin.json: it is not a model's folder" in refused(folder)


def test_a_file_instead_of_a_folder_says_so(folder: Path) -> None:
    assert "is a file; give the folder" in refused(folder / "model.safetensors")


def test_tensors_beside_a_model_are_no_part_of_it(folder: Path) -> None:
    (folder / "inputs.safetensors").write_bytes(raw_safetensors(X, b"12345678"))
    weights.load(folder)
