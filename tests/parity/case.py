"""One recorded case: a folder with `case.json`, which says what was run, and the files that go with it."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
"""Recorded outputs, tokenizers and odd pictures beside the repository. Tests that want them skip without."""


@dataclass(frozen=True)
class Case:
    """What a runner gets. Everything it needs to know stands in `data` and the files, nothing in names of folders."""

    family: str
    kind: str
    name: str
    folder: Path
    data: dict[str, Any] = field(repr=False)
    """The content of `case.json`."""
    tokenizers: Path = field(repr=False)
    """Folder of published tokenizers, one folder each. It may not exist: runners that need one skip with the reason."""

    @classmethod
    def load(cls, folder: Path, tokenizers: Path) -> "Case":
        """Read `case.json`. Raises ValueError when it does not say which family and kind it is."""
        data = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        for key in ("family", "kind"):
            if not isinstance(data, dict) or not isinstance(data.get(key), str):
                raise ValueError(f"{folder / 'case.json'} has no {key!r}")
        return cls(data["family"], data["kind"], str(data.get("case", folder.name)), folder, data, tokenizers)

    def json(self, name: str) -> Any:
        """The content of one JSON file of the case."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def has(self, name: str) -> bool:
        """Whether the case has this file."""
        return (self.folder / name).is_file()

    def tensors(self, name: str) -> dict[str, NDArray[Any]]:
        """The arrays of one safetensors file of the case."""
        from safetensors.numpy import load_file

        return load_file(self.folder / name)


def find_cases(folders: Iterable[Path]) -> list[Path]:
    """Folders below `folders` that hold a `case.json`, however deep. Folders with the same files count once, so that
    the repository's own copy of a case and the original run once."""
    found: dict[str, Path] = {}
    for folder in folders:
        for file in sorted(folder.rglob("case.json")):
            found.setdefault(_fingerprint(file.parent), file.parent)
    return list(found.values())


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def check_equal(actual: NDArray[Any], expected: NDArray[Any], what: str) -> None:
    """Fail unless two arrays have the same shape and the same numbers, and say by how much they differ."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, recorded {expected.shape}"
    if not np.array_equal(actual, expected):
        difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        count = np.count_nonzero(difference)
        raise AssertionError(f"{what}: {count} of {difference.size} numbers differ, by up to {difference.max():.3g}")


def check_close(actual: NDArray[Any], expected: NDArray[Any], what: str, *, atol: float, rtol: float = 0.0) -> None:
    """Fail unless two arrays have the same shape and agree within the recorded tolerance."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, recorded {expected.shape}"
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    allowed = atol + rtol * np.abs(expected.astype(np.float64))
    assert (difference <= allowed).all(), (
        f"{what}: differs by up to {difference.max():.3g} (allowed {atol:g} + {rtol:g} * |recorded|)"
    )
