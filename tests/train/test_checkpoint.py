"""Checkpoints: whatever fails, and whenever, a complete one stays behind."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from opsin.errors import TrainError
from opsin.train import checkpoint
from opsin.train.checkpoint import CheckpointStore


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"a": torch.full((3, 2), float(step)), "b": torch.arange(4) + step},
        "optimizer": {"exp_avg/a": torch.full((3, 2), step / 7), "step/a": torch.tensor(float(step))},
    }


def save(store: CheckpointStore, step: int) -> Path:
    return store.save(step, tensors=tensors(step), state={"step": step, "note": "x"})


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def check_is(store: CheckpointStore, step: int) -> None:
    saved = store.newest()
    assert saved is not None
    assert saved.step == saved.state["step"] == step
    for group, named in tensors(step).items():
        loaded = saved.tensors(group)
        assert loaded.keys() == named.keys()
        assert all(torch.equal(loaded[name], value) for name, value in named.items())


def test_the_newest_is_loaded_and_only_so_many_are_kept(store):
    assert store.newest() is None
    for step in (5, 10, 100):
        save(store, step)
        check_is(store, step)
    assert sorted(f.name for f in store.folder.iterdir()) == ["step-00000010", "step-00000100"]


def test_nothing_in_a_checkpoint_is_a_pickle(store):
    files = sorted(f.name for f in save(store, 1).iterdir())
    assert files == ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]


# What writing a checkpoint asks of the operating system, in the module that asks it.
CALLS = [
    (os, "fsync"),
    (os, "replace"),
    (checkpoint, "save_file"),
    (Path, "write_text"),
    (Path, "mkdir"),
    (shutil, "rmtree"),
]


class Fault:
    """Lets `allowed` calls of the operating system pass and fails the next one; counts all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, allowed: int, error: Exception) -> None:
        self.count = 0
        self.allowed, self.error = allowed, error
        self.failed = ""
        for owner, name in CALLS:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name), name))

    def wrap(self, function, name):
        def call(*args, **kwargs):
            number, self.count = self.count, self.count + 1
            if number == self.allowed:
                self.failed = name
                if name == "write_text":  # a short write: half of it arrives
                    function(args[0], args[1][: len(args[1]) // 2])
                raise self.error
            return function(*args, **kwargs)

        return call


def test_a_fault_at_every_call_leaves_the_last_checkpoint_whole(tmp_path):
    errors = [OSError(28, "No space left on device"), OSError(5, "Input/output error"), SafetensorError("I/O error")]
    seen = set()
    for error in errors:
        allowed = 0
        while True:
            store = CheckpointStore(tmp_path / f"{type(error).__name__}{error}-{allowed}", keep=1)
            save(store, 1)
            with pytest.MonkeyPatch.context() as patch:
                fault = Fault(patch, allowed, error)
                # Deleting raises OSError alone in truth, and nothing stands ready for another error.
                with suppress(TrainError, *([SafetensorError] if isinstance(error, SafetensorError) else [])):
                    save(store, 2)
            # A failing rename or a later call may come after the new one is in place; it is never worse than the old.
            found = CheckpointStore(store.folder, keep=1)
            found.remove_unfinished()
            newest = found.newest()
            assert newest is not None
            check_is(found, newest.step)
            assert not list(store.folder.glob("*.tmp"))
            save(found, 3)
            check_is(found, 3)
            if not fault.failed:
                assert newest.step == 2
                break
            seen.add(fault.failed)
            allowed += 1
        assert allowed >= 12
    assert seen == {"fsync", "replace", "save_file", "write_text", "mkdir", "rmtree"}


def test_a_disk_that_is_full_is_told_with_what_to_do(store, monkeypatch):
    save(store, 500)
    Fault(monkeypatch, 2, OSError(28, "No space left on device"))
    with pytest.raises(TrainError) as raised:
        save(store, 1000)
    message = str(raised.value)
    assert "step-00001000 could not be written: [Errno 28] No space left on device" in message
    assert "the last complete one is step-00000500" in message
    assert "give the same command again" in message


def damage_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def damage_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_gone])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_and_named(store, name, damage):
    save(store, 1)
    damage(save(store, 2) / name)
    check_is(store, 1)
    assert len(store.broken) == 1
    assert "step-00000002" in store.broken[0]
    assert name in store.broken[0]
    save(store, 2)
    check_is(store, 2)


def test_when_none_is_whole_the_run_does_not_silently_begin_again(store):
    damage_bit(save(store, 1) / "weights.safetensors")
    with pytest.raises(
        TrainError, match=r"no checkpoint is whole: .*weights.safetensors has changed .* Move them away"
    ):
        store.newest()


def test_a_later_format_is_refused(store):
    folder = save(store, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(TrainError, match="format 2; this version reads format 1"):
        store.newest()
