"""From scored examples to figures: of each group, of all together, their macro average, each with its interval."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opsin.evaluate.bootstrap import Interval, by_cluster, intervals
from opsin.evaluate.metrics import METRICS, Metric, Sums, figure_names

ALL, MACRO, NO_GROUP = "all", "macro average", "(no group)"
"""Rows of a table beside the groups' own."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """One example's output as numbers: a line of scores.jsonl."""

    key: str
    cluster: str
    group: str
    metric: str
    parsed: Any
    sums: Sums


@dataclass(frozen=True)
class Figure:
    """One number of a result."""

    group: str
    """A group's name, `all`, or `macro average`: the mean over groups, each counting the same."""
    figure: str
    value: float
    low: float | None
    """Ends of the 95 % bootstrap interval over pictures; None where there are too few."""
    high: float | None
    number: int
    """Examples that it is of."""

    @property
    def name(self) -> str:
        """Group and figure in one."""
        return f"{self.group} {self.figure}"


class Layout:
    """Where each group's sums stand in one long row, and the figures of such rows."""

    def __init__(self, groups: Sequence[str], metric_of: Callable[[str], str]) -> None:
        """groups: in the order in which they are shown. metric_of: what each is judged by."""
        self.metrics: dict[str, Metric] = {group: METRICS[metric_of(group)] for group in groups}
        self._starts: dict[str, int] = {}
        self.width = 0
        for group, metric in self.metrics.items():
            self._starts[group] = self.width
            self.width += metric.num_sums
        several = {metric.name for metric in self.metrics.values()}
        self._one = next(iter(self.metrics.values())) if len(several) == 1 else None
        self._own = [(group, name) for group, metric in self.metrics.items() for name in figure_names(metric)]
        has_groups = len(groups) > 1
        shared = figure_names(self._one) if self._one else ("headline",)
        self.names = [((group or NO_GROUP) if has_groups else ALL, name) for group, name in self._own]
        self._has_groups, self._is_pooled = has_groups, has_groups and self._one is not None and self._one.pooled
        if self._is_pooled:
            self.names = self.names + [(ALL, name) for name in shared]
        if has_groups:
            self.names = self.names + [(MACRO, name) for name in shared]

    def row(self, scored: Scored) -> Array:
        """One example's sums in their place: (S,)."""
        row = np.zeros(self.width)
        start = self._starts[scored.group]
        row[start : start + len(scored.sums)] = scored.sums
        return row

    def figures(self, sums: Array) -> Array:
        """(..., S) -> (..., F) in the order of `names`. A group without examples has none: NaN."""
        columns: list[Array] = []
        headlines: list[list[Array]] = []
        for group, metric in self.metrics.items():
            own = self._part(sums, group)
            values = [np.where(own[..., -1] > 0, value, np.nan) for value in metric.combine(own).values()]
            columns += values
            headlines.append(values if self._one else values[:1])
        if self._is_pooled:
            assert self._one is not None
            together = np.sum([self._part(sums, group) for group in self.metrics], axis=0)
            columns += list(self._one.combine(together).values())
        if self._has_groups:
            # A resample may lack a group; its average is that of the others.
            columns += [_mean_there(np.stack(each)) for each in zip(*headlines, strict=True)]
        return np.stack(columns, axis=-1)

    def _part(self, sums: Array, group: str) -> Array:
        start = self._starts[group]
        return sums[..., start : start + self.metrics[group].num_sums]


def _mean_there(values: Array) -> Array:
    """Mean over the first axis of what is no NaN."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0.0).sum(axis=0)
    return np.divide(total, there.sum(axis=0), out=np.full(total.shape, np.nan), where=there.any(axis=0))


def layout_of(scored: Sequence[Scored]) -> Layout:
    """The layout of some scored examples: their groups in order of appearance."""
    metrics = {each.group: each.metric for each in scored}
    return Layout(list(metrics), metrics.__getitem__)


def cluster_sums(scored: Sequence[Scored], layout: Layout) -> Array:
    """(C, S): the sums of the examples of each picture."""
    rows = np.stack([layout.row(each) for each in scored])
    return by_cluster(rows, [each.cluster for each in scored])


def figures_of(scored: Sequence[Scored], layout: Layout | None = None) -> list[Figure]:
    """All figures of some scored examples. layout: of more groups than these examples have; theirs come out as NaN."""
    layout = layout or layout_of(scored)
    counts = Counter(each.group or NO_GROUP for each in scored)
    found: list[Interval] = intervals(cluster_sums(scored, layout), layout.figures)
    return [
        Figure(group, name, each.value, each.low, each.high, counts.get(group, len(scored)))
        for (group, name), each in zip(layout.names, found, strict=True)
    ]
