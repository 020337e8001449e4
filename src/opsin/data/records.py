"""Files of records: a JSON list or JSON lines. Every record knows where it stands, for messages.

Only places are kept in memory (20 bytes a record); a record is read from the file and parsed when it is asked for.
"""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from opsin.data.problems import BadRecord, Problem
from opsin.data.scan import JsonScan, Place, cannot_read, digest, first_character, line_places
from opsin.errors import DataError


class Records(Protocol):
    """Records by number, in any container."""

    fingerprint: str
    """A digest that tells whether they are still the same."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """The place of a record, for messages."""

    def load(self, index: int, *, light: bool = False) -> Any:
        """A record as plain data. Raises BadRecord. light: without the bytes of pictures, for which `STAND_IN` stands
        where they are there: what can be checked of them costs as little as reading a text."""


STAND_IN = b"-"


class JsonRecords:
    """The records of a JSON list or of JSON lines."""

    def __init__(self, path: Path, *, limit: int | None = None) -> None:
        """limit: look for no more than the first so many. Raises DataError for a file without any."""
        self.path = path
        self.places = Places()
        self.broken: BadRecord | None = None
        """Why the last record, and whatever stands behind it, cannot be read."""
        if first_character(path) == "[":
            with JsonScan(path) as scan:
                try:
                    self.places.extend(scan.items(), limit)
                except BadRecord as error:
                    self.places.append(Place(0, 0, scan.line))
                    self.broken = error
        else:
            self.places.extend(line_places(path), limit)
        self.fingerprint = digest(path)
        if not self.places:
            raise DataError(f"{path} holds no record", kind="empty")

    def __len__(self) -> int:
        return len(self.places)

    def where(self, index: int) -> str:
        """File, number and line of a record, both from 1."""
        return f"{self.path} record {index + 1} (line {self.places[index].line})"

    def text(self, index: int) -> str:
        """A record as it is written."""
        place = self.places[index]
        return read_range(self.path, place.start, place.size).decode(errors="replace")

    def load(self, index: int, *, light: bool = False) -> Any:
        """A record as plain data. Raises BadRecord where it is not JSON."""
        if self.broken is not None and index == len(self) - 1:
            raise self.broken
        return load_json(self.path, self.places[index])


class Places:
    """Where records stand in a file: three numbers each."""

    def __init__(self) -> None:
        self._starts, self._sizes, self._lines = array("q"), array("q"), array("i")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Place:
        return Place(self._starts[index], self._sizes[index], self._lines[index])

    def append(self, place: Place) -> None:
        """Add one."""
        self._starts.append(place.start)
        self._sizes.append(place.size)
        self._lines.append(place.line)

    def extend(self, places: Iterator[Place], limit: int | None) -> None:
        """Add all, or as many as make `limit`; no more than those are looked for."""
        while limit is None or len(self) < limit:
            place = next(places, None)
            if place is None:
                return
            self.append(place)


def load_json(path: Path, place: Place) -> Any:
    """What stands in one place of a file. Raises BadRecord."""
    data = read_range(path, place.start, place.size)
    at = f"{path} line {place.line}"
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        problem = Problem(at, "encoding", f"byte {error.start} of the line is no UTF-8", "save the file as UTF-8")
    except json.JSONDecodeError as error:
        problem = Problem(f"{at}, column {error.colno}", "json", f"not JSON: {error.msg}")
    except RecursionError:
        problem = Problem(at, "json", "not read: its brackets are nested too deep")
    raise BadRecord(problem)


def read_range(path: Path, start: int, size: int) -> bytes:
    """Some bytes of a file. Raises DataError where they are not there."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise cannot_read(path, error) from None
    if len(data) != size:
        raise DataError(f"{path} ends before byte {start + size}: it was changed while it was in use", kind="changed")
    return data
