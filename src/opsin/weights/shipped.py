"""The model that comes with opsin: a folder in the package, found by its name without a network. Imports no torch."""

import os
from importlib.resources import files
from pathlib import Path

from opsin.errors import WeightError
from opsin.families import SHIPPED

FOLDER = Path(str(files("opsin") / "shipped" / SHIPPED))
"""Where its files are."""
FILES = ("opsin.json", "model.safetensors", "tokenizer.json")
"""What it cannot do without."""


def is_shipped(name: str | Path) -> bool:
    """Whether a name is the shipped model's. A folder of that name is meant where it is written as a path."""
    return isinstance(name, str) and name == SHIPPED


def shipped_folder() -> Path:
    """Its folder. Raises WeightError where the installation lacks it, or some of its files."""
    missing = [file for file in FILES if not (FOLDER / file).is_file()]
    if missing:
        raise WeightError(
            f"{SHIPPED} comes with opsin, but this installation lacks {', '.join(missing)} of it (in {FOLDER}). "
            f"Install opsin again, or name another model; a folder of your own of that name is ./{SHIPPED}"
        )
    return FOLDER


def is_here(name: str | Path) -> bool:
    """Whether a name leads to files on this machine without a cache: the shipped model's, or a path that exists."""
    return is_shipped(name) or os.path.exists(os.path.expanduser(name))


def folder_of(name: str | Path) -> Path:
    """The folder that such a name leads to: `is_here` holds."""
    return shipped_folder() if is_shipped(name) else Path(name).expanduser()
