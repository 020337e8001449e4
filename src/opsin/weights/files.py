"""The weight files of a folder: which they are, and what their headers say. No tensor is read here.

safetensors only. Older files are Python pickles, which can run any code when they are opened; they are refused unread.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.errors import WeightError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library itself sets."""

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}

CONVERT = (
    'python -c "import sys, torch, safetensors.torch as s; '
    "[s.save_file({k: v.contiguous().clone() "
    "for k, v in (lambda d: d.get('model', d))(torch.load(f, map_location='cpu', weights_only=True)).items()}, "
    "f.rsplit('.', 1)[0] + '.safetensors') for f in sys.argv[1:]]\""
)
"""A command that turns the pickles named after it into safetensors files beside them. Some authors keep the tensors one
level down, under `model`."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as a header describes it."""

    file: Path
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Where its numbers begin, in bytes from the start of the file."""


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of one or several files."""

    label: str
    """What to call it in messages."""
    entries: Mapping[str, Entry]
    duplicates: Mapping[str, tuple[Path, ...]]
    """Names that more than one file holds."""


def read_headers(path: Path, label: str, *, hint: str = "") -> Checkpoint:
    """The headers of a folder's weights, or of one file. Raises one WeightError for everything wrong with the files.

    hint: a sentence for people whose folder holds pickles only.
    """
    if path.is_file() and path.suffix in PICKLES:
        raise pickles_refused(label, [path], hint)
    files, index = ([path], None) if path.is_file() else _weight_files(path, label, hint)
    entries: dict[str, Entry] = {}
    duplicates: dict[str, tuple[Path, ...]] = {}
    problems = []
    for file in files:
        try:
            header = read_header(file)
        except WeightError as error:
            problems.append(str(error))
            continue
        for name, entry in header.items():
            if name in entries:
                duplicates[name] = (*duplicates.get(name, (entries[name].file,)), file)
            entries[name] = entry
    if not problems and index is not None:
        problems = [
            f"{INDEX} says that {name!r} is in {file}, and it is not there"
            for name, file in index.items()
            if name not in entries or (entries[name].file.name != file and name not in duplicates)
        ]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise WeightError(f"the files of {label} are damaged or incomplete; get them again\n  {shown}")
    return Checkpoint(label, entries, duplicates)


def read_header(file: Path) -> dict[str, Entry]:
    """What one safetensors file says it holds, checked against its size. Raises WeightError naming file and numbers."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise WeightError(f"{file.name}: no safetensors file, or cut off in its header ({size} bytes)")
            raw = json.loads(stream.read(length))
    except OSError as error:
        raise WeightError(f"{file.name}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, WeightError):
            raise
        raise WeightError(f"{file.name}: its header of {length} bytes is not JSON") from None
    if not isinstance(raw, dict):
        raise WeightError(f"{file.name}: its header is not a table of tensors")
    raw.pop("__metadata__", None)
    spans = []
    entries = {}
    for name, described in raw.items():
        entry, begin, end = _entry(file, name, described, 8 + length)
        entries[name] = entry
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise WeightError(f"{file.name}: {name!r} begins at byte {begin} of the data, expected {at}")
        at = end
    if 8 + length + at != size:
        kind = "cut off" if size < 8 + length + at else "followed by other data"
        raise WeightError(f"{file.name}: {kind}: it has {size} bytes, its header describes {8 + length + at}")
    return entries


def pickles_refused(label: str, files: Iterable[Path], hint: str) -> WeightError:
    """The error for weights that exist as pickles only, with the way to convert them."""
    files = sorted(files)
    names = [file.name for file in files]
    folder, download = str(files[0].parent), ""
    if all(name.endswith(".json") for name in names):
        # Of a repository only the index of its pickles was downloaded.
        folder, download = "FOLDER", f"  hf download {label.partition('@')[0]} --local-dir FOLDER\n"
    whole = any(name.startswith("pytorch_model") for name in names)
    return WeightError(
        f"{label} has its weights as Python pickles only ({', '.join(names[:4])}). Opening one can run any code in it, "
        f"so opsin does not. {hint}Convert them once, where you trust them, and load the folder again:\n"
        f"{download}  cd {shlex.quote(folder)} && {CONVERT} {'pytorch_model*.bin' if whole else shlex.join(names)}"
    )


def _weight_files(folder: Path, label: str, hint: str) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights and, where there is an index, its map from tensor to file name."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    if (folder / INDEX).is_file():
        return _indexed_files(folder, label)
    found = sorted(folder.glob("*.safetensors"))
    shards = [file for file in found if re.search(r"-\d{5}-of-\d{5}\.safetensors$", file.name)]
    if shards:
        stem, total = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.safetensors", shards[0].name).groups()  # type: ignore[union-attr]
        expected = [f"{stem}-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
        _refuse_missing(folder, expected, label)
        return [folder / name for name in expected], None
    if found and all(file.name.startswith("adapter_") for file in found):
        raise WeightError(f"{label} holds a LoRA adapter, not a model. `opsin merge` adds it to its base model")
    if found:
        return found, None
    pickles = [file for file in folder.iterdir() if file.suffix in PICKLES and file.name != "training_args.bin"]
    pickles = pickles or list(folder.glob("*.bin.index.json"))
    if pickles:
        raise pickles_refused(label, pickles, hint)
    raise WeightError(
        f"{label} has no weights: no {SINGLE}, no {INDEX}, no other .safetensors file in {folder}. "
        "(A repository without may have pickles, which are never downloaded.)"
    )


def _indexed_files(folder: Path, label: str) -> tuple[list[Path], dict[str, str]]:
    try:
        weight_map: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        weight_map = None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightError(f"{label}: {INDEX} has no 'weight_map' from tensors to files; get it again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:
        raise WeightError(f"{label}: {INDEX} names {outside[0]!r}, which is not a safetensors file of this folder")
    _refuse_missing(folder, names, label)
    return [folder / name for name in names], weight_map


def _refuse_missing(folder: Path, names: list[str], label: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise WeightError(
            f"{label} is incomplete: {len(missing)} of {len(names)} weight files are not in {folder}: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Download them again"
        )


def _entry(file: Path, name: str, described: Any, data_start: int) -> tuple[Entry, int, int]:
    try:
        dtype, (begin, end) = described["dtype"], described["data_offsets"]
        shape = tuple(described["shape"])
        count = 1
        for side in shape:
            count *= side
        fits = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        fits = fits and (dtype not in ITEM_BYTES or end - begin == count * ITEM_BYTES[dtype])
    except (KeyError, TypeError, ValueError):
        raise WeightError(f"{file.name}: the header entry of {name!r} is malformed") from None
    if not fits:
        raise WeightError(
            f"{file.name}: {name!r} of shape {list(shape)} and type {dtype} does not fit its {end - begin} bytes"
        )
    return Entry(file, str(dtype), shape, data_start + begin), begin, end
