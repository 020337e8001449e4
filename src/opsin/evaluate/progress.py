"""How far an evaluation is: a bar with the time left on a terminal, a line now and then anywhere else."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0


class Reporter(Protocol):
    """Where progress is shown."""

    def begin(self, total: int, done: int) -> None:
        """So many outputs are wanted, and so many there already."""

    def advance(self, count: int) -> None:
        """So many more are there."""

    def say(self, text: str) -> None:
        """Something else to know."""

    def end(self) -> None:
        """Nothing more comes, for whatever reason."""


class Silence:
    """Shows nothing."""

    def begin(self, total: int, done: int) -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


class Screen:
    """Progress on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._total = self._done = self._begun_with = 0
        self._started = self._last_line = 0.0

    def begin(self, total: int, done: int) -> None:
        """So many outputs are wanted, and so many there already."""
        self._total = total
        self._done = self._begun_with = done
        self._started = self._last_line = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(BarColumn(), TextColumn("{task.fields[facts]}"), console=self.console)
            self._bar.add_task("", total=total, completed=done, facts=f"{done}/{total} answers")
            self._bar.start()

    def advance(self, count: int) -> None:
        """So many more are there."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, facts=self._facts())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = time.monotonic()
            self.say(self._facts())

    def say(self, text: str) -> None:
        """Something else to know."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _facts(self) -> str:
        seconds = time.monotonic() - self._started
        rate = (self._done - self._begun_with) / max(seconds, 1e-9)
        left = round((self._total - self._done) / max(rate, 1e-9))
        hours, minutes = divmod(left // 60, 60)
        clock = f"{hours}:{minutes:02d}:{left % 60:02d}" if hours else f"{minutes}:{left % 60:02d}"
        return f"{self._done}/{self._total} answers  {rate:.3g}/s  {clock} left"
