"""Checkpoints: the whole state of a run in one folder, written so that a crash at any moment leaves a good one behind.

    checkpoints/step-00000500/weights.safetensors     every tensor that the run has trained so far
                              optimizer.safetensors   the optimizer's state, by kind and tensor
                              state.json              where the run stands
                              manifest.json           size and sha256 of the others; written last

Of several processes each writes what it holds: `weights-00000-of-00004.safetensors` and so on. A tensor's rows stand in
these files in order, so that any other number of processes finds its own. Where they begin is told in the way of
torch.distributed.checkpoint's safetensors form, so its reader loads the folder too, at any number of processes; its
other form would be a pickle. A folder without a manifest that fits is no checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from opsin.errors import TrainError
from opsin.train.parallel import World, local

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

    def tensors(self, group: str, rows: Callable[[int], slice] = slice) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU. rows: which of so many rows of each to read; all, when not given."""
        files = [self.folder / f"{group}.safetensors"]
        if not files[0].exists():
            files = sorted(self.folder.glob(f"{group}-*.safetensors"))
        with ExitStack() as stack:
            pieces: dict[str, list[Any]] = {}
            for file in files:
                opened = stack.enter_context(safe_open(file, framework="pt"))
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    pieces.setdefault(name, []).append(opened.get_slice(name))
            return {name: _rows(found, rows) for name, found in pieces.items()}


class CheckpointStore:
    """The checkpoints of one run. Which is the newest is seen from the folders themselves: no pointer can be stale."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """keep: how many complete ones stay."""
        self.folder = folder
        self.keep = keep
        self.broken: list[str] = []
        """Newer folders that `newest` had to pass over, each with what is wrong with it."""

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        world: World | None = None,
    ) -> Path:
        """Write a checkpoint and, once it has been read back and verified, delete all but the newest `keep`.

        world: processes that all call this, each with what it holds of split tensors. Raises TrainError when it cannot
        be written; earlier checkpoints are untouched then.
        """
        world = world or World()
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_name(final.name + TEMPORARY)
        with self._writing(world, final, temporary):
            if world.is_first:
                self.remove_unfinished()
                temporary.mkdir(parents=True)
        with self._writing(world, final, temporary):
            facts = {file.name: _facts(file) for file in _write_tensors(temporary, tensors, world)}
        parts = world.texts(json.dumps(facts))
        with self._writing(world, final, temporary):
            if world.is_first:
                (temporary / STATE).write_text(json.dumps(state, indent=1))
                sync(temporary / STATE)
                files = {name: fact for part in parts for name, fact in json.loads(part).items()}
                manifest = {"format": FORMAT, "files": {**files, STATE: _facts(temporary / STATE)}}
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
                sync(temporary / MANIFEST)
                sync(temporary)
                if final.exists():  # one that was found broken, or this run would stand behind it
                    shutil.rmtree(final)
                os.replace(temporary, final)
                sync(self.folder)
        with world.agreed():
            if world.is_first:
                self._verify_and_tidy(final)
        return final

    @contextmanager
    def _writing(self, world: World, final: Path, temporary: Path) -> Iterator[None]:
        """A part of saving that all processes end together. Where it fails, the unfinished checkpoint is deleted."""
        try:
            with world.agreed():
                try:
                    yield
                except (OSError, SafetensorError) as error:
                    complete = [folder.name for folder in self._folders() if not self.problem(folder)]
                    last = f"the last complete one is {complete[-1]}" if complete else "there is none yet"
                    raise TrainError(
                        f"checkpoint {final} could not be written: {error}. The run stops here; {last}. Make room, or "
                        "correct what is wrong with the folder, and give the same command again: it goes on from there."
                    ) from None
        except TrainError:
            if world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _verify_and_tidy(self, final: Path) -> None:
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

    def newest(self) -> Saved | None:
        """The newest complete checkpoint; None where there is none. Raises TrainError when all there are are broken."""
        self.broken = []
        folders = self._folders()
        for folder in reversed(folders):
            problem = self.problem(folder)
            if problem is None:
                return opened(folder)
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


def opened(folder: Path) -> Saved:
    """A checkpoint that is known to be whole."""
    return Saved(folder, _step(folder), json.loads((folder / STATE).read_text()))


def sync(path: Path) -> None:
    """Wait until a file or folder has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _write_tensors(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], world: World) -> Iterator[Path]:
    """Write this process' part of each group, on the disk when its path is given."""
    suffix = "" if world.size == 1 else f"-{world.rank:05d}-of-{world.size:05d}"
    for group, named in tensors.items():
        held = {name: t for name, t in named.items() if world.is_first or isinstance(t, DTensor)}
        file = folder / f"{group}{suffix}.safetensors"
        # Named as in torch/distributed/checkpoint/_hf_utils.py. Without its version, which nothing reads: safetensors
        # writes two entries in any order, and equal checkpoints would not be equal files.
        offsets = {name: {"saved_offsets": _offsets(tensor, world)} for name, tensor in held.items()}
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
        save_file({name: local(t).detach().cpu().contiguous() for name, t in held.items()}, file, metadata)
        sync(file)
        yield file


def _offsets(tensor: Tensor, world: World) -> list[int]:
    """Where, on each axis, what this process holds of a tensor begins."""
    first = world.rows(len(tensor)).start if isinstance(tensor, DTensor) else 0
    return [first, *[0] * (tensor.ndim - 1)][: tensor.ndim]


def _rows(pieces: list[Any], rows: Callable[[int], slice]) -> Tensor:
    """The wanted rows of a tensor whose rows stand in `pieces`, in order."""
    if not pieces[0].get_shape():
        return pieces[0][...]
    counts = [piece.get_shape()[0] for piece in pieces]
    start, stop, _ = rows(sum(counts)).indices(sum(counts))
    found: list[Tensor] = []
    begin = 0
    for piece, count in zip(pieces, counts, strict=True):
        first, last = max(start, begin), min(stop, begin + count)
        if first < last or (not found and piece is pieces[-1]):
            found.append(piece[max(0, first - begin) : max(0, last - begin)])
        begin += count
    return found[0] if len(found) == 1 else torch.cat(found)


def _facts(file: Path) -> dict[str, object]:
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
