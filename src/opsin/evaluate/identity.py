"""Which model and which software a result is of."""

import hashlib
import platform
from importlib import metadata
from pathlib import Path

from opsin.weights.config import adapter_base
from opsin.weights.hub import PATTERNS, locate
from opsin.weights.shipped import is_shipped

PACKAGES = ("opsin", "torch", "numpy", "pillow", "tokenizers", "sentencepiece", "safetensors")
_WHOLE, _PIECES, _PIECE = 1 << 24, 64, 1 << 14
"""Files up to 16 MiB are read whole; of larger ones 64 pieces of 16 KiB."""


def model_digest(name: str) -> str:
    """A digest of a model's files that tells a retrained model in the same folder from the one before it.

    Of files of gigabytes it reads pieces spread over them, which any training changes. Raises like `weights.load` for
    a model that is not there.
    """
    located = locate(name)
    files = _files(located.folder)
    while located.folder.is_dir() and (base := adapter_base(located)) is not None:  # an adapter is of its base as well
        located = locate(base)
        files += _files(located.folder)
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE:
                digest.update(stream.read())
                continue
            for number in range(_PIECES):
                stream.seek(number * (size - _PIECE) // (_PIECES - 1))
                digest.update(stream.read(_PIECE))
    return digest.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    return [folder] if folder.is_file() else sorted({file for each in PATTERNS for file in folder.glob(each)})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide outputs."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def described(name: str) -> str:
    """A model's name for results: the path of a folder in full, other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() and not is_shipped(name) else name
