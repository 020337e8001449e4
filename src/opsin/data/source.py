"""Where training samples come from. Anything with a length and `sample` will do: a file, a mixture, drawn pictures."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from opsin.data.order import permutation
from opsin.data.records import Record, read_records
from opsin.encode import Encoded
from opsin.errors import DataError, MessageError
from opsin.spec.recipe import DataFile
from opsin.text.messages import Conversation, ImageSource, TextPart, VideoSource, parse


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
class Placed(Protocol):
    """A source that can say where a sample stands, even one that it cannot give."""

    def where(self, index: int, epoch: int) -> str:
        """The sample's place for messages: file, record, line."""


@runtime_checkable
class Fingerprinted(Protocol):
    """A source that can tell whether it still gives the same samples, so that a run does not go on with others."""

    @property
    def fingerprint(self) -> str:
        """A digest of everything that decides the samples."""


class FileSource:
    """The conversations of one file.

    Everything that can be checked without decoding pictures is checked here, before the first step: every record is
    parsed, and every picture's file must be there.
    """

    def __init__(self, path: str | Path, *, image_root: str | Path | None = None, limit: int | None = None) -> None:
        """image_root: where relative picture paths start from; the file's own folder when not given."""
        self.file = read_records(Path(path), limit=limit)
        self.image_root = Path(image_root) if image_root is not None else self.file.path.parent
        self.fingerprint = self.file.sha256
        self._lengths: list[int] = []
        found: set[Path] = set()
        for record in self.file.records:
            conversation = self._conversation(record)
            for kind, path in _files(conversation):
                if path not in found:
                    if not path.is_file():
                        raise DataError(
                            f"{self.file.where(record)}: {kind} {path} is not there. Relative paths start from "
                            f"{self.image_root}: set image_root, or correct the record."
                        )
                    found.add(path)
            shows = bool(conversation.images or conversation.videos)
            self._lengths.append(num_words(conversation) * (1 if shows else -1))

    def __len__(self) -> int:
        return len(self.file.records)

    def sample(self, index: int, epoch: int) -> Conversation:
        """The same conversation in every epoch."""
        return self._conversation(self.file.records[index])

    def where(self, index: int, epoch: int) -> str:
        """File, record and line of a conversation."""
        return self.file.where(self.file.records[index])

    def modality_lengths(self, epoch: int) -> Sequence[int]:
        """Words of each conversation, negative without pictures."""
        return self._lengths

    def _conversation(self, record: Record) -> Conversation:
        where = self.file.where(record)
        try:
            conversation = parse(record.parse(), where=where)
        except MessageError as error:
            raise DataError(str(error)) from None
        name = f"{where} {conversation.id!r}" if conversation.id else where
        images = tuple(self._locate(image, where) for image in conversation.images)
        videos = tuple(self._locate_video(video, where) for video in conversation.videos)
        return replace(conversation, images=images, videos=videos, id=name)

    def _locate_video(self, video: VideoSource, where: str) -> VideoSource:
        if isinstance(video, tuple):
            return tuple(self._locate(frame, where) for frame in video)
        located = self._locate(video, where)
        assert isinstance(located, str | bytes | Path)
        return located

    def _locate(self, image: ImageSource, where: str) -> ImageSource:
        if not isinstance(image, str) or image.startswith("data:"):
            return image
        if image.startswith(("http://", "https://")):
            raise DataError(f"{where}: {image} is a web address; training reads pictures and videos from files only")
        return self.image_root / image


def _files(conversation: Conversation) -> Iterator[tuple[str, Path]]:
    """What each path of a conversation is, and the path."""
    frames = [frame for video in conversation.videos if isinstance(video, tuple) for frame in video]
    for kind, sources in (("picture", (*conversation.images, *frames)), ("video", conversation.videos)):
        yield from ((kind, source) for source in sources if isinstance(source, Path))


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

    def where(self, index: int, epoch: int) -> str:
        """Where the source says that it stands, or its number there."""
        number, local = self._find(index, epoch)
        source = self.sources[number]
        return source.where(local, epoch) if isinstance(source, Placed) else f"source {number} sample {local}"

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


def open_data(files: Sequence[DataFile], *, seed: int) -> Source:
    """The source that a stage's `data` describes."""
    sources = [FileSource(file.path, image_root=file.image_root, limit=file.limit) for file in files]
    if len(files) == 1 and files[0].repeat == 1:
        return sources[0]
    return Mixture(sources, [file.repeat for file in files], seed=seed)


def num_words(conversation: Conversation) -> int:
    """Words of all turns, a picture's mark counting as one (llava/train/train.py, modality_lengths). At least 1."""
    parts = [part for message in conversation.messages for part in message.parts]
    return max(1, sum(len(part.text.split()) if isinstance(part, TextPart) else 1 for part in parts))
