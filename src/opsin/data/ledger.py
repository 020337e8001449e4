"""The samples that a run goes on without: each stands in a list with the reason, and their number has a limit."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypedDict

from opsin.errors import DataError
from opsin.spec.recipe import BadSamples


class LeftOut(TypedDict):
    """One sample that was left out: a line of `left_out.jsonl`."""

    stage: str
    step: int
    """Of the stage, from 1."""
    epoch: int
    sample: int
    """Its number in the data of the stage, from 0."""
    why: str
    """`skipped`: bad. `dropped`: too long, where the stage drops what is."""
    where: str
    """File, record and line."""
    kind: str
    """What was wrong, in one word (`data.defects`)."""
    reason: str
    replacement: int
    """Number of the sample that took its place."""
    replacement_where: str


class Ledger:
    """What a stage left out so far, in the order of training."""

    def __init__(self, bad_samples: BadSamples, *, num_samples: int) -> None:
        """num_samples: of an epoch."""
        self.entries: list[LeftOut] = []
        self._skipped: Counter[int] = Counter()
        """By epoch."""
        self.on_entry: Callable[[LeftOut], None] | None = None
        """Called with each entry that is added, before the limit is looked at."""
        self.max_share, self.num_samples = bad_samples.max_share, num_samples
        self.max_skipped = max(1, math.floor(bad_samples.max_share * num_samples))
        """Samples of one epoch that may be skipped."""

    def restore(self, entries: Iterable[LeftOut]) -> None:
        """What was left out before, of a run that goes on."""
        self.entries = list(entries)
        self._skipped = Counter(each["epoch"] for each in self.entries if each["why"] == "skipped")

    def add(self, entry: LeftOut) -> None:
        """Tell of a sample. Raises DataError when more than the limit of an epoch were skipped."""
        self.entries.append(entry)
        if self.on_entry is not None:
            self.on_entry(entry)
        self._skipped[entry["epoch"]] += entry["why"] == "skipped"
        skipped = self._skipped[entry["epoch"]]
        if skipped > self.max_skipped:
            raise DataError(
                f"stage {entry['stage']!r}, step {entry['step']}: {skipped} bad samples of {self.num_samples} in epoch "
                f"{entry['epoch']}; at most {self.max_skipped} may be skipped (bad_samples.max_share "
                f"{self.max_share:g}). Nothing was updated. Mend the data, which `opsin data check` goes through as a "
                f"whole, or raise the limit. The last one: {entry['reason']}"
            )
