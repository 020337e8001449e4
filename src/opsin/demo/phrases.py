"""What drawn scenes are said to hold: names, groups, what is there and what is not. Also for opsin-mini's questions."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

from opsin.demo.scene import COLORS, HELDOUT_PAIRS, SHAPES, Split, Thing


def listed(items: Sequence[str]) -> str:
    """Such as `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def with_article(name: str) -> str:
    """Such as `an orange star`."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(shape: str) -> str:
    """Such as `crosses`."""
    return "crosses" if shape == "cross" else f"{shape}s"


ALL_GROUPS = (*map(plural, SHAPES), *(f"{color} shapes" for color in COLORS))
"""Whatever can be counted."""


def group_counts(things: Sequence[Thing]) -> Counter[str]:
    """Things by what can be counted: `red shapes`, `circles`."""
    counts = Counter(plural(thing.shape) for thing in things)
    counts.update(f"{thing.color} shapes" for thing in things)
    return counts


def single(things: Sequence[Thing], rng: random.Random, by: Callable[[Thing], str]) -> Thing | None:
    """A random thing that is the only one with its name."""
    counts = Counter(by(thing) for thing in things)
    found = [thing for thing in things if counts[by(thing)] == 1]
    return rng.choice(found) if found else None


def there_or_not(things: Sequence[Thing], rng: random.Random, split: Split) -> tuple[str, str] | None:
    """A name with its article, and whether it is there: yes or no, as often as the other. None where none fits."""
    present = {thing.name for thing in things}
    if rng.random() < 0.5:
        return with_article(rng.choice(sorted(present))), "yes"
    # Half the absent ones share their colour and shape with things that are there, if such a mixture is absent.
    names = {f"{a.color} {b.shape}" for a in things for b in things} - present
    if not names or rng.random() < 0.5:
        names = {f"{color} {shape}" for color in COLORS for shape in SHAPES} - present
    if split == "train":
        names -= {f"{color} {shape}" for shape, color in HELDOUT_PAIRS}
    return (with_article(rng.choice(sorted(names))), "no") if names else None
