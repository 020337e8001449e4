"""Checkpoints: the whole state of a run in one folder, written so that a crash at any moment leaves a good one behind.

    checkpoints/step-00000500/weights.safetensors     every tensor that the run has trained so far
                              optimizer.safetensors   the optimizer's state, by kind and tensor
                              state.json              where the run stands
                              manifest.json           size and sha256 of the others; written last

A folder without a manifest that fits is no checkpoint. Nothing in it is a pickle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from opsin.errors import TrainError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Saved:
    """One complete checkpoint."""

    folder: Path
    step: int
    """Optimizer steps of the run, all stages together."""
    state: Mapping[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one file, on the CPU."""
        return load_file(self.folder / f"{group}.safetensors")


class CheckpointStore:
    """The checkpoints of one run. Which is the newest is seen from the folders themselves: no pointer can be stale."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """keep: how many complete ones stay."""
        self.folder = folder
        self.keep = keep
        self.broken: list[str] = []
        """Newer folders that `newest` had to pass over, each with what is wrong with it."""

    def save(self, step: int, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and, once it has been read back and verified, delete all but the newest `keep`.

        Raises TrainError when it cannot be written; earlier checkpoints are untouched then.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_name(final.name + TEMPORARY)
        try:
            self.remove_unfinished()
            temporary.mkdir(parents=True)
            for group, named in tensors.items():
                on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
                save_file(on_cpu, temporary / f"{group}.safetensors")
            (temporary / STATE).write_text(json.dumps(state, indent=1))
            files = sorted(temporary.iterdir())
            for file in files:
                sync(file)
            manifest = {
                "format": FORMAT,
                "files": {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files},
            }
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            sync(temporary / MANIFEST)
            sync(temporary)
            if final.exists():  # one that was found broken, or this run would stand behind it
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            complete = [folder.name for folder in self._folders() if not self.problem(folder)]
            last = f"the last complete one is {complete[-1]}" if complete else "there is none yet"
            raise TrainError(
                f"checkpoint {final} could not be written: {error}. The run stops here; {last}. Make room, or correct "
                "what is wrong with the folder, and give the same command again: it goes on from there."
            ) from None
        problem = self.problem(final)
        if problem:
            raise TrainError(f"checkpoint {final} was written but does not read back: {problem}")
        for old in self._folders()[: -self.keep]:
            try:
                shutil.rmtree(old)
            except OSError as error:
                raise TrainError(
                    f"{final} is written, but the old checkpoint {old} could not be deleted: {error}. Delete it, and "
                    "give the same command again: the run goes on from there."
                ) from None
        return final

    def newest(self) -> Saved | None:
        """The newest complete checkpoint; None where there is none. Raises TrainError when all there are are broken."""
        self.broken = []
        folders = self._folders()
        for folder in reversed(folders):
            problem = self.problem(folder)
            if problem is None:
                return Saved(folder, _step(folder), json.loads((folder / STATE).read_text()))
            self.broken.append(f"{folder}: {problem}")
        if self.broken:
            raise TrainError(
                "no checkpoint is whole: " + "; ".join(self.broken) + ". Move them away to start from the beginning."
            )
        return None

    def remove_unfinished(self) -> None:
        """Delete what a crash left behind while writing."""
        for folder in self.folder.glob(f"*{TEMPORARY}"):
            shutil.rmtree(folder)

    def problem(self, folder: Path) -> str | None:
        """What is wrong with a checkpoint; None when every byte is as it was written."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                return f"format {manifest['format']}; this version reads format {FORMAT}"
            for name, facts in manifest["files"].items():
                size = (folder / name).stat().st_size
                if size != facts["bytes"]:
                    return f"{name} has {size} bytes instead of {facts['bytes']}"
                if _digest(folder / name) != facts["sha256"]:
                    return f"{name} has changed since it was written (sha256)"
        except OSError as error:
            return f"{Path(error.filename or folder).name}: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} is damaged"
        return None

    def _folders(self) -> list[Path]:
        """Folders that were finished, oldest first."""
        found = [f for f in self.folder.glob("step-*") if f.is_dir() and re.fullmatch(r"step-\d+", f.name)]
        return sorted(found, key=_step)


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
