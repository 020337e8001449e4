"""Files of records: a JSON list or JSON lines. Every record knows where it stands, for messages."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsin.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One record, kept as text: a million parsed ones take several times the memory."""

    number: int
    """From 1."""
    line: int
    """Line of the file on which it begins, from 1."""
    text: bytes

    def parse(self) -> Any:
        """The record as plain data."""
        return json.loads(self.text)


@dataclass(frozen=True)
class RecordFile:
    """A file that was read: its records, and a digest that tells whether it is still the same."""

    path: Path
    records: list[Record] = field(repr=False)
    sha256: str

    def where(self, record: Record) -> str:
        """The place of a record, for messages."""
        return f"{self.path} record {record.number} (line {record.line})"


def read_records(path: Path, *, limit: int | None = None) -> RecordFile:
    """Read a file, or its first `limit` records. Raises DataError with the line for whatever is not JSON."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    digest = hashlib.sha256(data).hexdigest()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path} line {line}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
    del data
    records = _list(path, text, limit) if text.lstrip()[:1] == "[" else _lines(path, text, limit)
    if not records:
        raise DataError(f"{path} holds no record")
    return RecordFile(path, records, digest)


def _lines(path: Path, text: str, limit: int | None) -> list[Record]:
    records: list[Record] = []
    # Not splitlines(): it also cuts at characters such as U+2028, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if len(records) == limit:
            break
        if not line.strip():
            continue
        try:
            json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number}, column {error.colno}: not JSON: {error.msg}") from None
        records.append(Record(len(records) + 1, number, line.encode()))
    return records


def _list(path: Path, text: str, limit: int | None) -> list[Record]:
    records: list[Record] = []
    decoder, place, line, counted = json.JSONDecoder(), _skip(text, text.index("[") + 1), 1, 0
    while len(records) != limit:
        if not records and text[place : place + 1] == "]":
            break
        try:
            _, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path} line {error.lineno}, column {error.colno}: record {len(records) + 1} is not JSON: {error.msg}"
            ) from None
        line += text.count("\n", counted, place)
        counted = place
        records.append(Record(len(records) + 1, line, text[place:end].encode()))
        place = _skip(text, end)
        mark = text[place : place + 1]
        if mark == "]":
            break
        if mark != ",":
            line += text.count("\n", counted, place)
            raise DataError(
                f"{path} line {line}: a comma or the closing bracket is missing after record {len(records)}"
                + ("; the file ends here" if not mark else "")
            )
        place = _skip(text, place + 1)
    return records


def _skip(text: str, place: int) -> int:
    """The next place that is not white space."""
    while text[place : place + 1].isspace():
        place += 1
    return place
