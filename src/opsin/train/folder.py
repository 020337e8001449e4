"""The folder of a run: made anew, or found with a run that goes on; and files that are whole or not there."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from opsin.errors import ConfigError, TrainError
from opsin.spec.recipe import RunConfig
from opsin.train.checkpoint import CheckpointStore, Saved, opened, sync
from opsin.train.config import differences, to_yaml
from opsin.train.parallel import World

RUN_FILE, LOCK_FILE = "run.yaml", ".lock"


@contextmanager
def claimed(output: Path, world: World) -> Iterator[None]:
    """Inside, no other program trains into `output`: two would cut each other's logs and remove each other's files.

    The folder is made where there is none. The claim ends with the process, however that ends. Raises TrainError where
    another program has it, and for a folder of other things.
    """
    with ExitStack() as held:
        with world.agreed():
            if world.is_first:
                _refuse_other_things(output)
                output.mkdir(parents=True, exist_ok=True)
                try:
                    held.enter_context(FileLock(output / LOCK_FILE).acquire(timeout=0))
                except Timeout:
                    raise TrainError(
                        f"another program is training into {output}. Wait until it ends or stop it, or name another "
                        "folder as output"
                    ) from None
        yield


def _refuse_other_things(output: Path) -> None:
    empty = not output.exists() or (output.is_dir() and not {each.name for each in output.iterdir()} - {LOCK_FILE})
    if not empty and not (output / RUN_FILE).is_file():
        raise TrainError(f"{output} is there and holds no run; name a new folder as output")


def open_folder(config: RunConfig, store: CheckpointStore, world: World) -> Saved | None:
    """Where the run in `config.output` stands; None where it begins. The first process alone looks, reads and writes.

    To be called while the folder is `claimed`. Raises ConfigError for a run with other settings.
    """
    found = ""
    with world.agreed():
        if world.is_first and (saved := _open(config, store)):
            found = str(saved.folder)
    found = world.told(found)
    return opened(Path(found)) if found else None


def _open(config: RunConfig, store: CheckpointStore) -> Saved | None:
    output = Path(config.output)
    file = output / RUN_FILE
    saved = store.newest()
    if saved is not None:
        _refuse_changes(config, file)
    store.remove_unfinished()
    for unfinished in (*output.glob(".*.tmp"), *output.glob("best/.*.tmp")):
        shutil.rmtree(unfinished)  # models that a killed process was writing
    _write_text(file, to_yaml(config))
    return saved


def _refuse_changes(config: RunConfig, file: Path) -> None:
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        # Read as a config: one that an earlier version wrote has the defaults of settings that it did not know.
        before = RunConfig.parse(written, where=str(file)).model_dump(mode="json")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise TrainError(f"{file} of the run that is to go on cannot be read: {error}") from None
    changed = differences(before, config.model_dump(mode="json"))
    if changed:
        raise ConfigError(
            f"{file.parent} holds a run with other settings: {'; '.join(changed)}. Take the settings back to go on "
            "with it, or name another folder as output."
        )


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or not there."""
    temporary = file.with_name(file.name + ".tmp")
    save_file(dict(tensors), temporary)
    _move(temporary, file)


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    _move(temporary, file)


def _move(temporary: Path, file: Path) -> None:
    """Put a finished file in its place, so that there is never half of one."""
    sync(temporary)
    os.replace(temporary, file)
    sync(file.parent)
