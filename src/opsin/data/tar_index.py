"""What stands where in a shard: read from its headers once, then kept in the cache folder.

    CACHE/shards/0123....json     the members of one shard, and which file they are of

Kept lists are of one path, size, and time of change (of content and of file, to the nanosecond). One that does not fit,
or cannot be read, is made anew, and where none can be written the headers are read at every start.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from opsin.data.cache import cache_folder, write_whole

FORMAT = 1
COLUMNS = ("names", "starts", "sizes", "times", "checksums")


class Member(NamedTuple):
    """One file in a shard, as its header says."""

    name: str
    start: int
    """First byte of its content in the shard."""
    size: int
    """Bytes."""
    time: float
    """When it was changed, seconds since 1970."""
    checksum: int
    """Of its header."""


def shard_members(path: Path) -> Iterator[Member]:
    """The files in a shard, in order. Their list is kept once they have been asked for to the end.

    Raises OSError and tarfile.TarError.
    """
    facts = _facts(path)
    kept = _read(path, facts)
    if kept is not None:
        yield from kept
        return
    columns: tuple[list[Any], ...] = tuple([] for _ in COLUMNS)
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            setattr(tar, "members", [])  # noqa: B010 - it would keep all of them; typeshed knows no members
            if info.isreg():
                member = Member(info.name, info.offset_data, info.size, info.mtime, info.chksum)
                for column, value in zip(columns, member, strict=True):
                    column.append(value)
                yield member
    if _facts(path) == facts:  # it was not written while it was read
        text = json.dumps({**facts, **dict(zip(COLUMNS, columns, strict=True))}, separators=(",", ":"))
        with suppress(OSError):
            write_whole(_file(path), text)


def _facts(path: Path) -> dict[str, Any]:
    """Which file it is; other facts are another file."""
    status = path.stat()
    return {
        "format": FORMAT,
        "path": os.path.abspath(path),
        "bytes": status.st_size,
        "content_changed_ns": status.st_mtime_ns,
        "file_changed_ns": status.st_ctime_ns,
    }


def _file(path: Path) -> Path:
    """Where the list of a shard is kept. Raises OSError where nothing can be."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()
    return cache_folder("shards") / f"{name[:32]}.json"


def _read(path: Path, facts: dict[str, Any]) -> list[Member] | None:
    """The kept list of a shard; None where there is none that fits."""
    try:
        kept = json.loads(_file(path).read_bytes())
        if {key: kept[key] for key in facts} != facts:
            return None
        members = [Member(*values) for values in zip(*(kept[column] for column in COLUMNS), strict=True)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    sound = all(
        isinstance(member.name, str) and isinstance(member.start, int) and isinstance(member.size, int)
        for member in members
    )
    return members if sound else None
