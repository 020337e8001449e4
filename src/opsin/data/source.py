"""Where training samples come from. Anything with a length and `sample` will do: a file, a mixture, drawn pictures."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

from opsin.data.files import FileSource
from opsin.data.order import permutation
from opsin.data.problems import Checked, Placed, Problem
from opsin.encode import Encoded
from opsin.errors import ConfigError, DataError
from opsin.spec.recipe import DataFile
from opsin.text.messages import Conversation


class Source(Protocol):
    """Samples by number."""

    def __len__(self) -> int:
        """Samples per epoch."""

    def sample(self, index: int, epoch: int) -> Conversation | Encoded:
        """Sample `index` of `epoch`, both from 0.

        A pure function of the two, called from several threads at once: that is what makes the order of training
        independent of threads, and a resumed run equal to an uninterrupted one.
        """


@runtime_checkable
class Grouped(Protocol):
    """A source that knows the rough lengths of its samples without preparing them (the `modality_length` sampler)."""

    def modality_lengths(self, epoch: int) -> Sequence[int]:
        """Words of each sample of an epoch, negative for samples without a picture. Never 0."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell whether it still gives the same samples, so that a run does not go on with others."""

    @property
    def fingerprint(self) -> str:
        """A digest of everything that decides the samples."""


class Mixture:
    """Several sources as one. Each gives `repeat` times its length of samples per epoch."""

    def __init__(self, sources: Sequence[Source], repeats: Sequence[float], *, seed: int) -> None:
        """seed: decides which part a fraction of a source is, anew in every epoch."""
        self.sources = tuple(sources)
        self.seed = seed
        self._whole = [math.floor(repeat) * len(source) for source, repeat in zip(sources, repeats, strict=True)]
        self._counts = [round(repeat * len(source)) for source, repeat in zip(sources, repeats, strict=True)]
        self._part = lru_cache(maxsize=2 * len(self.sources))(self._draw_part)

    def __len__(self) -> int:
        return sum(self._counts)

    def sample(self, index: int, epoch: int) -> Conversation | Encoded:
        """Sources one after the other; the sampler shuffles."""
        number, local = self._find(index, epoch)
        return self.sources[number].sample(local, epoch)

    def modality_lengths(self, epoch: int) -> Sequence[int]:
        """Lengths of all sources' samples, in the order of `sample`."""
        lengths = []
        for source in self.sources:
            if not isinstance(source, Grouped):
                raise DataError(f"{type(source).__name__} cannot tell lengths, which the modality_length sampler needs")
            lengths.append(source.modality_lengths(epoch))
        places = (self._find(index, epoch) for index in range(len(self)))
        return [lengths[number][local] for number, local in places]

    @property
    def fingerprint(self) -> str:
        """The fingerprints of all sources."""
        return " ".join(source.fingerprint if isinstance(source, Fingerprinted) else "-" for source in self.sources)

    def where(self, index: int, epoch: int = 0) -> str:
        """The place of a sample, for messages."""
        number, local = self._find(index, epoch)
        source = self.sources[number]
        return source.where(local, epoch) if isinstance(source, Placed) else f"source {number + 1} sample {local}"

    def problems(self) -> Iterator[Problem]:
        """The problems of each source, once, whatever part of it is seen."""
        for source in self.sources:
            if isinstance(source, Checked):
                yield from source.problems()

    def _find(self, index: int, epoch: int) -> tuple[int, int]:
        """(source, index in it) of one sample."""
        number = 0
        while index >= self._counts[number]:
            index -= self._counts[number]
            number += 1
        if index < self._whole[number]:
            return number, index % len(self.sources[number])
        return number, self._part(number, epoch)[index - self._whole[number]]

    def _draw_part(self, number: int, epoch: int) -> list[int]:
        return permutation(len(self.sources[number]), self.seed, "part", number, epoch)


def open_data(files: Sequence[DataFile], *, seed: int, on_bad: Literal["raise", "keep"] = "raise") -> Source:
    """The source that a stage's `data` describes."""
    weights = [file.weight for file in files if file.weight is not None]
    if weights and len(weights) < len(files):
        raise ConfigError(
            f"{len(weights)} of {len(files)} data files have a weight; weights say how files share an epoch, so give "
            "each one or none"
        )
    sources = [FileSource.of(file, on_bad=on_bad) for file in files]
    if len(files) == 1 and files[0].repeat == 1:
        return sources[0]
    if weights:
        total = sum(len(source) for source in sources)
        shares = [total * weight / sum(weights) for weight in weights]
        return Mixture(sources, [share / len(source) for share, source in zip(shares, sources, strict=True)], seed=seed)
    return Mixture(sources, [file.repeat for file in files], seed=seed)
