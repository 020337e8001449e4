"""From a path to records: which container it is, by what is in it rather than by its name."""

import re
from pathlib import Path
from typing import Literal

from opsin.data.joined import CocoRecords, ScienceQaRecords, VqaRecords, read_object
from opsin.data.records import JsonRecords, Records
from opsin.data.remote import fetch, is_address
from opsin.data.scan import cannot_read, first_character
from opsin.data.tables import ArrowRecords, ParquetRecords
from opsin.data.tar import PACKED, TarRecords
from opsin.errors import DataError
from opsin.weights.hub import snapshot

Container = Literal["json", "parquet", "tar", "arrow"]
_FIRST_LINE = 1 << 20
"""Bytes looked at to tell JSON lines from one JSON object."""


def find_files(path: str) -> tuple[list[Path], int | None]:
    """The files that a path of a recipe names, and the limit that may stand behind it (`mix.json#500`).

    `{000..010}` stands for those numbers, `*` and `?` for any names, in order. A folder that is no data set itself
    stands for its parquet files or shards. `hf://datasets/OWNER/NAME[@REVISION]/FILE` is downloaded into the hub's
    cache, `https://...` into opsin's (`data.remote`). Raises DataError where there is none.
    """
    limit = None
    counted = re.fullmatch(r"(.+)#([1-9]\d*)", path)
    if counted and not Path(path).exists():
        path, limit = counted[1], int(counted[2])
    if is_address(path):
        return [fetch(name) for name in _addresses(path)], limit
    if "://" in path:
        path = _download(path)
    files: list[Path] = []
    for name in _numbered(path):
        if any(mark in name for mark in "*?[") and not Path(name).exists():
            pattern = Path(name)
            root = Path(pattern.anchor)
            files += sorted(root.glob(str(pattern.relative_to(pattern.anchor))) if pattern.anchor else root.glob(name))
        else:
            files.append(Path(name))
    if not files:
        raise DataError(f"no file is named like {path}", kind="file")
    if len(files) == 1 and files[0].is_dir():
        files = _in_folder(files[0])
    return files, limit


def _download(address: str) -> str:
    """The local path of files of a data set of the hub."""
    found = re.fullmatch(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w.-]+))?/(.+)", address)
    if not found:
        raise DataError(
            f"{address} is an address of a kind that is not read; give a path, hf://datasets/OWNER/NAME/FILE, or "
            "https://SERVER/FILE",
            kind="file",
        )
    repository, revision, files = found.groups()
    return str(snapshot(repository, revision, _numbered(files), kind="dataset", refusal=DataError) / files)


def _addresses(address: str) -> list[str]:
    if set("*[") & set(address):
        raise DataError(
            f"{address}: web servers do not list their files, so * and [] stand for none; write {{000..010}}, or one "
            "entry for each file",
            kind="file",
        )
    return _numbered(address)


def _numbered(path: str) -> list[str]:
    """The names that `{000..010}` in a path stands for."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if not found:
        return [path]
    width, numbers = len(found[1]), range(int(found[1]), int(found[2]) + 1)
    names = (f"{path[: found.start()]}{number:0{width}d}{path[found.end() :]}" for number in numbers)
    return [each for name in names for each in _numbered(name)]


def _in_folder(folder: Path) -> list[Path]:
    if (folder / "state.json").is_file():
        return [folder]
    if (folder / "problems.json").is_file():
        return [folder / "problems.json"]
    for pattern in ("*.parquet", "*.tar"):
        files = sorted(folder.glob(pattern)) or sorted(folder.glob(f"data/{pattern}"))
        if files:
            return files
    raise DataError(
        f"{folder} is a folder without parquet files, .tar shards, problems.json or an Arrow data set's state.json; "
        "name a file",
        kind="file",
    )


def container_of(path: Path) -> Container:
    """What kind of file it is, by its first bytes. Raises DataError where it cannot be read."""
    if path.is_dir():
        return "arrow"
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise cannot_read(path, error) from None
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar" or path.suffix == ".tar" or head.startswith(PACKED):
        return "tar"
    return "json"


def open_records(
    files: list[Path],
    *,
    container: Container | Literal["auto"] = "auto",
    image_root: Path,
    answers: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Records:
    """The records of some files of one kind. Raises DataError for what cannot be opened."""
    kind = container_of(files[0]) if container == "auto" else container
    if kind == "parquet":
        return ParquetRecords(files, limit=limit)
    if kind == "tar":
        return TarRecords(files, limit=limit)
    if len(files) > 1:
        raise DataError(
            f"{len(files)} files are named, and only parquet files and .tar shards are read as one: list JSON files "
            f"one by one under data ({files[0]}, {files[1]} ...)",
            kind="file",
        )
    if kind == "arrow":
        return ArrowRecords(files[0], limit=limit)
    if not _is_one_object(files[0]):
        return JsonRecords(files[0], limit=limit)
    file = read_object(files[0])
    if {"images", "annotations"} <= file.lists.keys():
        return CocoRecords(file, limit=limit)
    if "questions" in file.lists:
        return VqaRecords(file, answers=answers, image_root=image_root, limit=limit)
    if (files[0].parent / "pid_splits.json").is_file():
        return ScienceQaRecords(file, split=split or "train", image_root=image_root, limit=limit)
    keys = [*file.lists, *list(file.members)[:10], *list(file.values)[:10]]
    hint = " (these are the answers of VQA v2: name the file of the questions)" if "annotations" in file.lists else ""
    raise DataError(
        f"{files[0]} is one JSON object with the keys {keys}{hint}; a list of records, one record in each line, or an "
        "object of COCO, VQA v2 or ScienceQA (with pid_splits.json beside it) is needed",
        kind="shape",
    )


def _is_one_object(path: Path) -> bool:
    """Whether a JSON file is one object rather than lines: its first line alone is no record, or a set's."""
    if first_character(path) != "{":
        return False
    with path.open("rb") as file:
        line, rest = b"", b""
        while not line.strip():
            line = file.readline(_FIRST_LINE)
        while not rest.strip():
            rest = file.readline(_FIRST_LINE)
            if not rest:
                break
    if rest:
        # Lines of an object that is spread over several begin with a key.
        return not line.strip().endswith(b"}") and not rest.lstrip().startswith(b"{")
    keys = set(re.findall(rb'"(\w+)"\s*:\s*\[', line))
    splits = path.with_name("pid_splits.json").is_file()
    return not line.strip().endswith(b"}") or bool(keys & {b"annotations", b"questions"}) or splits
