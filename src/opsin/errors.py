"""Errors a user can meet. Each message says what happened, where, with which numbers, and what to do.

Everything a user can cause derives from `OpsinError`, itself a `ValueError`; the command line prints its text
without a traceback. Our own mistakes are `assert`s.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Self


class OpsinError(ValueError):
    """Base of every error that a user can cause."""

    def __init__(self, message: str = "", *, kind: str = "", fix: str = "") -> None:
        """kind: what is wrong, in a word that stays the same whatever the message says. fix: what to do, which the
        text ends with."""
        super().__init__(f"{message}; {fix}" if fix else message)
        self.message, self.kind, self.fix = message, kind, fix

    def within(self, place: str) -> Self:
        """The same error, told from one level higher."""
        return type(self)(f"{place}: {self.message}", kind=self.kind, fix=self.fix)


class ConfigError(OpsinError):
    """A model description, run file or override that does not hold together."""


class UnknownNameError(ConfigError):
    """A preset, family, option or key that does not exist."""


class PlanError(OpsinError):
    """A picture size that a resolution rule cannot serve."""


class MediaError(OpsinError):
    """A picture or video that cannot be decoded, or that is over a limit."""


class MessageError(OpsinError):
    """A conversation that cannot be read, rendered or encoded."""


class TokenizerError(OpsinError):
    """A tokenizer that cannot be found or read, or a control token it does not have."""


class WeightError(OpsinError):
    """A checkpoint whose files, keys or shapes do not fit the model."""


class DataError(OpsinError):
    """A training or evaluation record that cannot be used."""


class TrainError(OpsinError):
    """A training run that cannot start, go on or resume."""


class GenerationError(OpsinError):
    """A request that cannot be generated."""


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """` (did you mean 'x'?)` for the known names closest to `name`, or an empty string when none is close."""
    candidates = list(known)
    close = get_close_matches(name, candidates, n=count, cutoff=0.6)
    # Ids are often typed without their prefix or suffix: 'llava-7b' for 'llava-1.5-7b'.
    close += [c for c in candidates if name and name in c and c not in close][: max(0, count - len(close))]
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that does not exist: names the nearest known ones and lists them all when few."""
    names = sorted(known)
    listing = f" Known: {', '.join(names)}." if len(names) <= 30 else ""
    return UnknownNameError(f"unknown {kind} {name!r}{nearest(name, names)}.{listing}")
