"""Finding records in a JSON file without holding the file: a window moves over its text."""

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from opsin.data.problems import BadRecord, Problem
from opsin.errors import DataError

CHUNK = 1 << 20
_SPACE = " \t\n\r"


class Place(NamedTuple):
    """Where a value stands in its file."""

    start: int
    """First byte."""
    size: int
    """Bytes."""
    line: int
    """Line on which it begins, from 1."""


class JsonScan:
    """Reads one file from front to end, once. Raises BadRecord with the line for whatever is not JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 1
        """Of the next character, from 1."""
        self._byte = 0
        self._text, self._at = "", 0
        """What is decoded, and how many of its characters are behind us."""
        self._indent = 0
        """Characters of its first line that are no longer there."""
        self._read_to = 0
        self._ended = False
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise cannot_read(path, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self._at < len(self._text):
                char = self._text[self._at]
                if char not in _SPACE and char != "\ufeff":
                    return char
                self._go(self._at + 1)
            if not self._more():
                return ""

    def take(self, expected: str) -> bool:
        """Step over the next character if it is `expected`."""
        if self.peek() != expected:
            return False
        self._go(self._at + 1)
        return True

    def value(self, name: str = "") -> tuple[Any, Place]:
        """The next value and where it stands. name: what it is, for messages."""
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                passed = self._text.count("\n", self._at, error.pos)
                newline = self._text.rfind("\n", 0, error.pos)
                column = error.pos - newline + (self._indent if newline < 0 else 0)
                told = f"{name} is not JSON" if name else "not JSON"
                raise self._error(f"{told}: {error.msg}", self.line + passed, column) from None
            except RecursionError:
                raise self._error(f"{name or 'it'} has brackets nested too deep", self.line) from None
            if end < len(self._text) or not self._more():  # a number may go on in what is not read yet
                break
        place = Place(self._byte, _num_bytes(self._text[self._at : end]), self.line)
        self._go(end)
        return value, place

    def items(self) -> Iterator[Place]:
        """The places of the values of the list that begins here."""
        self.take("[")
        if self.take("]"):
            return
        number = 0
        while True:
            number += 1
            _, place = self.value(f"record {number}")
            yield place
            if self.take("]"):
                return
            if not self.take(","):
                tail = "" if self.peek() else "; the file ends here"
                raise self._error(f"a comma or the closing bracket is missing after record {number}{tail}", self.line)

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here. Whoever iterates takes each value (`value`, `items`)."""
        self.take("{")
        if self.take("}"):
            return
        while True:
            key, _ = self.value("a key")
            if not isinstance(key, str) or not self.take(":"):
                raise self._error("a key and a colon are needed", self.line)
            yield key
            if self.take("}"):
                return
            if not self.take(","):
                raise self._error(f"a comma or the closing brace is missing after {key!r}", self.line)

    def _go(self, to: int) -> None:
        """Step over the characters before `to`."""
        passed = self._text[self._at : to]
        self._byte += _num_bytes(passed)
        self.line += passed.count("\n")
        self._at = to

    def _more(self) -> bool:
        """Decode more of the file. Whether there was any."""
        if self._ended:
            return False
        pending = len(self._decode.getstate()[0])
        # At least doubled, so that a long value is tried again few times.
        chunk = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._ended = not chunk
        try:
            decoded = self._decode.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            byte = self._read_to - pending + error.start
            line = self.line + self._text.count("\n", self._at) + error.object.count(b"\n", 0, error.start)
            problem = Problem(
                f"{self.path} line {line}", "encoding", f"byte {byte} is no UTF-8", "save the file as UTF-8"
            )
            raise BadRecord(problem) from None
        if self._ended:
            return False
        self._read_to += len(chunk)
        newline = self._text.rfind("\n", 0, self._at)
        self._indent = self._at - newline - 1 if newline >= 0 else self._indent + self._at
        self._text, self._at = self._text[self._at :] + decoded, 0
        return True

    def _error(self, message: str, line: int, column: int | None = None) -> BadRecord:
        at = f"line {line}" if column is None else f"line {line}, column {column}"
        return BadRecord(Problem(f"{self.path} {at}", "json", message))


def line_places(path: Path) -> Iterator[Place]:
    """The places of the lines of a file that are not empty, whatever is in them."""
    start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
                if not line.isspace():
                    yield Place(start + mark, len(line.rstrip(b"\r\n")) - mark, number)
                start += len(line)
    except OSError as error:
        raise cannot_read(path, error) from None


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_character(path: Path) -> str:
    """The first character of a file that is not white space; empty where there is none."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 16):
                text = chunk.removeprefix(codecs.BOM_UTF8).lstrip()
                if text:
                    return chr(text[0])
    except OSError as error:
        raise cannot_read(path, error) from None
    return ""


def cannot_read(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not give."""
    return DataError(f"{path} cannot be read: {error.strerror or error}", kind="file")


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
