"""How sure a figure is: percentile bootstrap intervals, and a paired test of two models on the same examples.

What is drawn again and again, with replacement, is pictures and not questions: questions about one picture are answered
well or badly together, and counting them as independent makes intervals too narrow (RefCOCO, GQA and POPE have many
per picture). Every figure here is a function of sums over examples, so a resample is a sum over pictures.

    sums of clusters (C, S) --drawn C of C, many times--> sums (R, S) --figures--> (R, F) --2.5 % and 97.5 %--> interval

An interval says how figures would vary over other pictures of the same kind; not over prompts, seeds of training, or
other kinds of pictures. A fixed seed makes it the same every time.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
_AT_ONCE = 1 << 22
"""Numbers drawn at a time, which bounds the memory."""

Array = NDArray[np.float64]
Figures = Callable[[Array], Array]
"""(..., S) sums -> (..., F) figures."""


@dataclass(frozen=True)
class Interval:
    """One figure."""

    value: float
    low: float | None
    """Ends of the 95 % interval; None where there is a single picture, or no resample has the figure."""
    high: float | None


@dataclass(frozen=True)
class Difference:
    """One figure of one model less that of another, on the same examples."""

    value: float
    low: float | None
    high: float | None
    p_value: float | None
    """Share of random exchanges of the two models' outputs, picture by picture, that differ as much as they do."""


def by_cluster(sums: Array, clusters: Sequence[Hashable]) -> Array:
    """(N, S) -> (C, S): the sums of examples that share a cluster, in order of appearance."""
    numbers: dict[Hashable, int] = {}
    places = np.array([numbers.setdefault(each, len(numbers)) for each in clusters], np.int64)
    total = np.zeros((len(numbers), sums.shape[1]))
    np.add.at(total, places, sums)
    return total


def intervals(sums: Array, figures: Figures, *, resamples: int = RESAMPLES, seed: int = SEED) -> list[Interval]:
    """Each figure with its interval. sums: (C, S), one row per cluster."""
    values = figures(sums.sum(axis=0))
    if len(sums) < 2:
        return [Interval(float(value), None, None) for value in values]
    drawn = np.concatenate([figures(times @ sums) for times in _drawn(len(sums), resamples, seed)])
    return [Interval(float(value), *_ends(column)) for value, column in zip(values, drawn.T, strict=True)]


def differences(
    sums: Array, other: Array, figures: Figures, *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Difference]:
    """Each figure of `sums` less that of `other`; both (C, S), whose rows belong to the same pictures."""
    assert sums.shape == other.shape, "two results with other pictures"
    values = figures(sums.sum(axis=0)) - figures(other.sum(axis=0))
    if len(sums) < 2:
        return [Difference(float(value), None, None, None) for value in values]
    drawn = np.concatenate(
        [figures(times @ sums) - figures(times @ other) for times in _drawn(len(sums), resamples, seed)]
    )
    # Exchanging the two models at a picture is as good as the truth if they are equally good.
    total, lead = sums + other, sums - other
    exchanged = []
    for signs in _signs(len(sums), resamples, seed):
        led = signs @ lead
        exchanged.append(figures((total.sum(axis=0) + led) / 2) - figures((total.sum(axis=0) - led) / 2))
    tolerance = 1e-12  # sums of the same numbers in another order
    as_far = np.abs(np.concatenate(exchanged)) >= np.abs(values) - tolerance
    shares = (1 + as_far.sum(axis=0)) / (1 + resamples)
    return [
        Difference(float(value), *_ends(column), float(share))
        for value, column, share in zip(values, drawn.T, shares, strict=True)
    ]


def _ends(drawn: Array) -> tuple[float | None, float | None]:
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return None, None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _drawn(count: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each of `count` clusters is in each resample: (r, count), r adding up to `resamples`."""
    random = np.random.default_rng([seed, 0])
    for size in _portions(count, resamples):
        picked = random.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(picked.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _signs(count: int, resamples: int, seed: int) -> Iterator[Array]:
    """1 or -1 for each cluster: (r, count), r adding up to `resamples`."""
    random = np.random.default_rng([seed, 1])
    for size in _portions(count, resamples):
        yield (random.integers(0, 2, (size, count)) * 2 - 1).astype(np.float64)


def _portions(count: int, resamples: int) -> Iterator[int]:
    most = max(1, _AT_ONCE // count)
    for start in range(0, resamples, most):
        yield min(most, resamples - start)
