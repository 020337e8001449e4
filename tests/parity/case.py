"""Where recorded cases (`opsin.verify.cases`) are, and how arrays are compared with what was recorded."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.verify.cases import Case

__all__ = ["ROOT", "SHARED", "Case", "check_close", "check_equal", "find_cases"]

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
"""Recorded outputs, tokenizers and odd pictures beside the repository. Tests that want them skip without."""


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
