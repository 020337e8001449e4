"""WebDataset shards: tar files whose members of one key (`0001.jpg`, `0001.txt`) are one record.

A shard's headers are read once (`tar_index`); then any record is read from its place, without unpacking. The digest of
a shard is that of its headers (names, sizes, times): reading all pictures first would take as long as training on them.
"""

import hashlib
import json
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsin.data.problems import BadRecord, Problem
from opsin.data.records import STAND_IN, read_range
from opsin.data.tar_index import shard_members
from opsin.errors import DataError

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEOS = ("mp4", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "flv")
TEXTS = ("txt", "text", "caption")
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class TarRecords:
    """The records of one or several shards."""

    def __init__(self, paths: Sequence[Path], *, limit: int | None = None) -> None:
        """limit: read only the first so many. Raises DataError, naming the shard, for what is no tar file."""
        self.paths = tuple(paths)
        self._keys: list[str] = []
        self._shards = array("i")
        self._members = array("q", [0])
        """Where the members of each record begin; one more than there are records."""
        self._starts, self._sizes, self._kinds = array("q"), array("q"), array("i")
        self._extensions: dict[str, int] = {}
        digest = hashlib.sha256()
        for number, path in enumerate(self.paths):
            if limit is not None and len(self._keys) >= limit:
                break
            self._index(number, path, limit, digest)
        self._names = list(self._extensions)
        if not self._keys:
            raise DataError(f"{self.paths[0]} holds no record: no member is named KEY.EXTENSION", kind="empty")
        self.fingerprint = digest.hexdigest()

    def _index(self, number: int, path: Path, limit: int | None, digest: Any) -> None:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                if file.read(4).startswith(PACKED):
                    raise DataError(
                        f"{path} is compressed, and its members can only be read from front to end; unpack it to a "
                        "plain .tar (pictures are compressed already)",
                        kind="file",
                    )
            last = None
            for member in shard_members(path):
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if key != last:
                    if len(self._keys) == limit:
                        break
                    self._keys.append(key)
                    self._shards.append(number)
                    self._members.append(self._members[-1])
                    last = key
                if member.start + member.size > size:
                    raise DataError(
                        f"{path} ends inside its member {member.name}: {size} bytes are there, "
                        f"{member.start + member.size} are needed; copy or download it again",
                        kind="file",
                    )
                self._members[-1] += 1
                self._starts.append(member.start)
                self._sizes.append(member.size)
                self._kinds.append(self._extensions.setdefault(extension.lower(), len(self._extensions)))
                header = f"{member.name} {member.size} {member.time} {member.checksum}\n"
                digest.update(header.encode(errors="surrogateescape"))  # names need not be UTF-8
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}", kind="file") from None
        except tarfile.TarError as error:
            raise DataError(f"{path} is no tar file that can be read: {error}", kind="file") from None

    def __len__(self) -> int:
        return len(self._keys)

    def where(self, index: int) -> str:
        """Shard, key and members of a record."""
        members = range(self._members[index], self._members[index + 1])
        names = ", ".join(self._names[self._kinds[member]] for member in members)
        return f"{self.paths[self._shards[index]]} member {self._keys[index]} ({names})"

    def load(self, index: int, *, light: bool = False) -> dict[str, Any]:
        """A record as plain data: its JSON, its text, and the bytes of its pictures and videos. Raises BadRecord."""
        record: dict[str, Any] = {}
        images: dict[str, bytes] = {}
        videos: dict[str, bytes] = {}
        seen: set[str] = set()
        for member in range(self._members[index], self._members[index + 1]):
            extension = self._names[self._kinds[member]]
            if extension in seen:
                raise self._bad(index, "members", f"it has two members {self._keys[index]}.{extension}")
            seen.add(extension)
            kind = extension.rpartition(".")[2]
            if kind in PICTURES or kind in VIDEOS:
                shown = images if kind in PICTURES else videos
                shown[extension] = STAND_IN if light and self._sizes[member] else self._read(index, member)
            elif kind == "json":
                record |= self._json(index, self._read(index, member))
            elif kind in TEXTS:
                record.setdefault("caption", self._text(index, self._read(index, member), extension).strip())
        self._show(index, record, "image", images)
        self._show(index, record, "video", videos)
        if seen <= {*TEXTS} and "caption" in record:
            raise self._bad(
                index,
                "member_missing",
                f"{self._keys[index]} has a text but no picture; add the member, or leave it out",
            )
        return record

    def _show(self, index: int, record: dict[str, Any], kind: str, members: dict[str, bytes]) -> None:
        """Put the members in the place of the pictures or videos that the record names."""
        listed: Any = next((record[name] for name in (kind, f"{kind}s") if record.get(name)), [])
        names = listed if isinstance(listed, list) else [listed]
        if not members:
            base = self._keys[index].rpartition("/")[2]
            inside = [
                name for name in names if isinstance(name, str) and name.rpartition("/")[2].startswith(f"{base}.")
            ]
            if inside:
                raise self._bad(index, "member_missing", f"it names the {kind} {inside[0]}, which is not in the shard")
            return
        if names and len(names) != len(members):
            raise self._bad(
                index, "members", f"it names {len(names)} {kind}s but has {len(members)} members: {', '.join(members)}"
            )
        by_name = {f"{self._keys[index].rpartition('/')[2]}.{extension}": data for extension, data in members.items()}
        ends = [str(name).rpartition("/")[2] for name in names]
        ordered = [by_name[end] for end in ends] if ends and by_name.keys() == set(ends) else self._sorted(members)
        record.pop(kind, None)
        record[f"{kind}s"] = ordered

    @staticmethod
    def _sorted(members: dict[str, bytes]) -> list[bytes]:
        """By number where members have one: `2.jpg` comes before `10.jpg`."""
        return [members[name] for name in sorted(members, key=lambda name: (len(name), name))]

    def _read(self, index: int, member: int) -> bytes:
        return read_range(self.paths[self._shards[index]], self._starts[member], self._sizes[member])

    def _text(self, index: int, data: bytes, extension: str) -> str:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self._bad(index, "encoding", f"byte {error.start} of its {extension} is no UTF-8") from None

    def _json(self, index: int, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(self._text(index, data, "json"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise self._bad(index, "json", f"its json is not JSON: {error}") from None
        if isinstance(value, list):
            value = {"messages": value}
        if not isinstance(value, dict):
            raise self._bad(index, "json", f"its json is {type(value).__name__}; an object is needed")
        return value

    def _bad(self, index: int, kind: str, message: str) -> BadRecord:
        return BadRecord(Problem(self.where(index), kind, message))
