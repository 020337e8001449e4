"""Two finished evaluations of the same examples, compared pair by pair."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.errors import DataError
from opsin.evaluate.bootstrap import differences
from opsin.evaluate.figures import NO_GROUP, Scored, cluster_sums, layout_of
from opsin.evaluate.folder import read_results, read_scores


@dataclass(frozen=True)
class Compared:
    """One figure of both."""

    group: str
    figure: str
    first: float
    second: float
    difference: float
    """First less second."""
    low: float | None
    high: float | None
    """Ends of its 95 % interval."""
    p_value: float | None
    """By exchanging the two at random, picture by picture."""
    number: int


@dataclass(frozen=True)
class Comparison:
    """Two evaluations."""

    first: str
    second: str
    figures: tuple[Compared, ...]
    notes: tuple[str, ...]
    """Settings in which they differ besides the model."""


SAID = ("prompt", "parsers", "decoding", "image_mode", "dtype", "chat_format", "rescored")
"""Differences that a reader must know of."""


def compare(first: Path, second: Path) -> Comparison:
    """Raises DataError where one is not finished, or where they are of different tasks or examples."""
    ours, theirs = read_results(first), read_results(second)
    for key, what in (("task", "tasks"), ("metrics", "metrics"), ("data", "examples")):
        if ours.get(key) != theirs.get(key):
            raise DataError(
                f"{first} and {second} are of different {what} ({_short(ours.get(key))}, {_short(theirs.get(key))}): "
                "only the same examples can be compared pair by pair"
            )
    one, other = read_scores(first), read_scores(second)
    _check_pairs(one, other, first, second)
    layout = layout_of(one)
    sums, others = cluster_sums(one, layout), cluster_sums(_aligned(other, one), layout)
    before, after = layout.figures(sums.sum(axis=0)), layout.figures(others.sum(axis=0))
    counts = Counter(each.group or NO_GROUP for each in one)
    figures = [
        Compared(
            group,
            name,
            float(a),
            float(b),
            each.value,
            each.low,
            each.high,
            each.p_value,
            counts.get(group, len(one)),
        )
        for (group, name), a, b, each in zip(
            layout.names, before, after, differences(sums, others, layout.figures), strict=True
        )
    ]
    return Comparison(str(first), str(second), tuple(figures), tuple(_notes(ours, theirs)))


def _check_pairs(one: list[Scored], other: list[Scored], first: Path, second: Path) -> None:
    ours, theirs = ({(each.key, each.group): each.metric for each in several} for several in (one, other))
    if ours != theirs:
        raise DataError(
            f"{first} has {len(ours)} scored examples and {second} {len(theirs)}, and their names, groups or metrics "
            "differ; evaluate both with the same settings"
        )


def _aligned(other: list[Scored], one: list[Scored]) -> list[Scored]:
    """The other's examples in the order of the first's, in the first's clusters."""
    found = {(each.key, each.group): each for each in other}
    return [
        Scored(each.key, each.cluster, each.group, each.metric, None, found[each.key, each.group].sums) for each in one
    ]


def _notes(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return [
        f"they differ in {key}: {_short(ours.get(key))} and {_short(theirs.get(key))}"
        for key in SAID
        if ours.get(key) != theirs.get(key)
    ]


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
