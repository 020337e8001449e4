"""What a run tells: every step as a line of JSON in a file, and its progress with the time left on the screen."""

import json
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from opsin.train.loop import Row

RECENT, ENOUGH = 50, 20
"""Steps that estimates are made from, and how many it takes to warn."""
MOST_WAITING = 0.05
"""Part of the time that a model may wait for data before a warning."""


class RowLog:
    """`log.jsonl` or `left_out.jsonl`. A resumed run cuts it back to where its checkpoint was made: every step stands
    there once. The file is made with its first line."""

    def __init__(self, path: Path, *, keep_bytes: int = 0, writes: bool = True) -> None:
        """keep_bytes: how much of the file to keep. writes: False where another process keeps it."""
        self.path = path
        self.writes = writes
        self._stream: BinaryIO | None = None
        if path.exists() and writes:
            self._open().truncate(min(keep_bytes, path.stat().st_size))

    def _open(self) -> BinaryIO:
        if self._stream is None:
            self._stream = self.path.open("ab")
        return self._stream

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one line; it is in the file when this returns."""
        if not self.writes:
            return
        stream = self._open()
        stream.write(json.dumps(row).encode() + b"\n")
        stream.flush()

    def read(self) -> list[Any]:
        """All lines."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()] if self.path.exists() else []

    def sync(self) -> int:
        """Wait until all is on the disk; returns the size in bytes."""
        if self._stream is None:
            return 0
        os.fsync(self._stream.fileno())
        return os.fstat(self._stream.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()


class Reporter(Protocol):
    """Where progress is shown."""

    def begin(self, stage: str, *, number: int, num_stages: int, num_steps: int, done: int) -> None:
        """A stage begins, or goes on after `done` steps."""

    def row(self, row: Row) -> None:
        """A step was made."""

    def say(self, text: str) -> None:
        """Something else to know."""

    def end(self) -> None:
        """The run stops, for whatever reason."""


class Silence:
    """Shows nothing."""

    def begin(self, stage: str, *, number: int, num_stages: int, num_steps: int, done: int) -> None:
        """Nothing."""

    def row(self, row: Row) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Screen:
    """Progress on a console: one bar that moves on a terminal, a line every few steps anywhere else."""

    def __init__(self, console: Console, *, every: int) -> None:
        """every: steps between two lines where there is no terminal."""
        self.console = console
        self.every = every
        self._title = ""
        self._num_steps = self._done = 0
        self._recent: deque[Row] = deque(maxlen=RECENT)
        """The last steps, from which the time left and the share of waiting are estimated. The first is not among them:
        it also waits for what is read ahead."""
        self._is_running = self._has_warned = False
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, stage: str, *, number: int, num_stages: int, num_steps: int, done: int) -> None:
        """A stage begins, or goes on after `done` steps."""
        self.end()
        self._title = f"{stage} ({number}/{num_stages})" if num_stages > 1 else stage
        self._num_steps, self._done = num_steps, done
        self._recent.clear()
        self._is_running = self._has_warned = False
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}")
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(self._title, total=num_steps, completed=done, facts="")
            self._bar.start()

    def row(self, row: Row) -> None:
        """A step was made."""
        self._done = row["step"]
        if self._is_running:
            self._recent.append(row)
        self._is_running = True
        if self._bar is not None:
            assert self._task is not None
            self._bar.update(self._task, completed=self._done, facts=self._facts(row))
        elif self._done % self.every == 0 or self._done in (1, self._num_steps):
            self.console.print(f"{self._title}  {self._facts(row)}", highlight=False, soft_wrap=True)
        if len(self._recent) >= ENOUGH and self._waiting() > MOST_WAITING and not self._has_warned:
            self._has_warned = True
            self.say(
                f"warning: {self._waiting():.0%} of the last {len(self._recent)} steps' time went in waiting for data. "
                "Raise workers, make pictures smaller, or put them on a faster disk"
            )

    def say(self, text: str) -> None:
        """Something else to know."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _waiting(self) -> float:
        """Which part of the last steps' time the model waited for data."""
        return sum(row["data_seconds"] for row in self._recent) / max(sum(row["seconds"] for row in self._recent), 1e-9)

    def _facts(self, row: Row) -> str:
        recent = self._recent or [row]
        seconds = sum(each["seconds"] for each in recent) / len(recent)
        left = seconds * (self._num_steps - self._done)
        rates = ", ".join(f"{name} {rate:.3g}" for name, rate in row["lr"].items())
        waiting = row["data_seconds"] / max(row["seconds"], 1e-9)
        return (
            f"step {row['step']}/{self._num_steps}  loss {row['loss']:.4f}  lr {rates}  |g| {row['grad_norm']:.3g}  "
            f"{row['tokens'] / max(row['seconds'], 1e-9):,.0f} tokens/s  waiting for data {waiting:.0%}  "
            f"{duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
