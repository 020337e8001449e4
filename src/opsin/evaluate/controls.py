"""What a figure is worth: the same questions about other pictures, about none, and the commonest answer to all.

A model that does not look at the pictures answers the first two as well as the real ones; questions that everybody
answers "yes" are answered well by the third.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from opsin.errors import ConfigError, DataError, unknown
from opsin.evaluate.examples import Example

CONTROLS: dict[str, str] = {
    "shuffled": "every question about the picture of another one",
    "text-only": "every question without its picture",
}


def check_controls(controls: Sequence[str]) -> None:
    """Raises UnknownNameError for a control that does not exist, ConfigError for one named twice."""
    for control in controls:
        if control not in CONTROLS:
            raise unknown("control", control, CONTROLS)
    if len(set(controls)) < len(controls):
        raise ConfigError(f"a control is named twice: {', '.join(controls)}")


def partners(examples: Sequence[Example], *, seed: int) -> list[int]:
    """For each example the one whose pictures it is shown in the shuffled control: never its own, the same for all
    questions about one picture, and as many pictures and videos as its own. Raises DataError where that cannot be.
    """
    kinds: dict[tuple[int, int], dict[str, int]] = {}
    for index, example in enumerate(examples):
        shown = len(example.images), len(example.videos)
        kinds.setdefault(shown, {}).setdefault(example.cluster, index)
    if kinds.keys() <= {(0, 0)}:
        raise DataError("no example shows a picture, so there is nothing to shuffle", kind="control")
    partner: dict[tuple[tuple[int, int], str], int] = {}
    for shown, firsts in kinds.items():
        if shown == (0, 0):
            continue
        if len(firsts) < 2:
            raise DataError(
                "the shuffled control needs another picture for every example, and only questions about one picture "
                f"({examples[min(firsts.values())].key}) show {shown[0]} picture(s) and {shown[1]} video(s)",
                kind="control",
                fix="leave it out, or do without --control shuffled",
            )
        names = list(firsts)
        order = np.random.default_rng([seed, *shown]).permutation(len(names))
        for place, number in enumerate(order):
            partner[shown, names[number]] = firsts[names[order[(place + 1) % len(order)]]]
    return [
        partner.get(((len(each.images), len(each.videos)), each.cluster), index) for index, each in enumerate(examples)
    ]


def showing(example: Example, other: Example) -> Example:
    """The example's question with another's pictures; it stays in its own cluster."""
    return replace(example, images=other.images, videos=other.videos, picture=example.cluster)


def commonest(references: Iterable[tuple[str, ...]]) -> str:
    """The answer that is right most often; of equals the first."""
    return Counter(answer for each in references for answer in each).most_common(1)[0][0]
