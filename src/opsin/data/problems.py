"""What is wrong with one record, as a value: raised where a run must not start, listed where data is checked."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from opsin.errors import DataError, OpsinError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one record."""

    where: str
    """File, record and line, row, or member of a shard."""
    kind: str
    """What is wrong, in a word that is the same for every record that has it (`marks`, `picture_missing`)."""
    message: str
    """What is wrong, with names and numbers."""
    fix: str = ""
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}{f'; {self.fix}' if self.fix else ''}"

    @classmethod
    def of(cls, error: OpsinError, where: str, *, kind: str = "record") -> "Problem":
        """What an error says about the record that it was met in. kind: where the error does not name its own."""
        return cls(where, error.kind or kind, error.message, error.fix)


class BadRecord(DataError):
    """A record that cannot be used. Its text is the problem's."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem), kind=problem.kind)
        self.problem = problem

    def within(self, place: str) -> "BadRecord":
        """The same error, told from one level higher."""
        return BadRecord(replace(self.problem, where=f"{place}: {self.problem.where}"))


@runtime_checkable
class Placed(Protocol):
    """A source whose samples have places, those too that it cannot give."""

    def where(self, index: int, epoch: int = 0) -> str:
        """The place of sample `index`, for messages: file, record and line, row, or member of a shard."""


@runtime_checkable
class Checked(Placed, Protocol):
    """A source that can be read through once to find every bad record."""

    def problems(self) -> Iterator[Problem]:
        """Reads everything once, with the code that training reads it with, and goes on after each bad record.

        Pictures must be there, but are not decoded.
        """
