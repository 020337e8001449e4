"""Conversations from records: one file, several shards, or the rows of a data set."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os.path import isfile
from pathlib import Path
from typing import Any, Literal

from opsin.data.open import Container, find_files, open_records
from opsin.data.problems import BadRecord, Problem
from opsin.data.records import Records
from opsin.data.shapes import Shaper
from opsin.data.tables import RowRecords
from opsin.errors import MessageError
from opsin.media.source import shorten
from opsin.spec.recipe import DataFile
from opsin.text.messages import Conversation, ImageSource, TextPart, VideoSource
from opsin.text.parse import read


class RecordSource:
    """The conversations of some records.

    Everything that can be checked without the bytes of pictures is checked here, before the first step: every record is
    parsed, and every picture's file must be there.
    """

    def __init__(
        self, records: Records, *, shaper: Shaper, image_root: Path, on_bad: Literal["raise", "keep"] = "raise"
    ) -> None:
        """image_root: where relative picture paths start from. on_bad: `raise` the first problem, or `keep` all in
        `bad`; `sample` raises those when it is asked for them."""
        self.records, self.shaper, self.image_root = records, shaper, image_root
        self.fingerprint = records.fingerprint
        self.bad: dict[int, Problem] = {}
        """What is wrong with records, by index, as far as it shows without the bytes of pictures."""
        self._lengths = array("i")
        found: set[Path] = set()
        for index in range(len(records)):
            try:
                conversation = self._checked(index, found, light=True)
            except BadRecord as error:
                if on_bad == "raise":
                    raise
                self.bad[index] = error.problem
                self._lengths.append(-1)
                continue
            shows = bool(conversation.images or conversation.videos)
            self._lengths.append(num_words(conversation) * (1 if shows else -1))

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, index: int, epoch: int) -> Conversation:
        """The same conversation in every epoch, but for pictures with several captions. Raises BadRecord."""
        return self._conversation(index, epoch=epoch)

    def where(self, index: int, epoch: int = 0) -> str:
        """The place of a record, for messages."""
        return self.records.where(index)

    def own_id(self, index: int) -> str:
        """What a record calls itself; `sample` names conversations after their place. Empty where it does not."""
        return read(self.shaper.shape(self.records.load(index, light=True))).id

    def problems(self) -> Iterator[Problem]:
        """Reads every record whole, once, and goes on after each bad one."""
        found: set[Path] = set()
        for index in range(len(self)):
            try:
                self._checked(index, found, light=False)
            except BadRecord as error:
                yield error.problem

    def modality_lengths(self, epoch: int) -> Sequence[int]:
        """Words of each conversation, negative without pictures."""
        return self._lengths

    def _checked(self, index: int, found: set[Path], *, light: bool) -> Conversation:
        """A conversation whose files are there. found: those that were seen already."""
        conversation = self._conversation(index, light=light)
        for kind, path in _files(conversation):
            if path not in found:
                if not isfile(path):  # Path.is_file raises for names that are too long
                    message = f"{kind} {shorten(str(path))} is not there. Relative paths start from {self.image_root}"
                    fix = "set image_root, or correct the record"
                    raise BadRecord(Problem(self.where(index), f"{kind}_missing", message, fix))
                found.add(path)
        return conversation

    def _conversation(self, index: int, *, epoch: int = 0, light: bool = False) -> Conversation:
        where = self.where(index)
        record = self.records.load(index, light=light)
        try:
            conversation = read(self.shaper.shape(record, epoch=epoch))
        except MessageError as error:
            raise BadRecord(Problem.of(error, where)) from None
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
            told = f"{image} is a web address; training reads pictures and videos from files only"
            raise BadRecord(Problem(where, "address", told, "download it and give its path"))
        return self.image_root / image.removeprefix("file://")


class FileSource(RecordSource):
    """The conversations of a path, which may name several shards (`data.open.find_files`)."""

    def __init__(
        self,
        path: str | Path,
        *,
        image_root: str | Path | None = None,
        limit: int | None = None,
        container: Container | Literal["auto"] = "auto",
        shaper: Shaper | None = None,
        answers: str | Path | None = None,
        split: str | None = None,
        on_bad: Literal["raise", "keep"] = "raise",
    ) -> None:
        """image_root: where relative picture paths start from; the folder of the (first) file when not given. The
        others: see `spec.recipe.DataFile` and RecordSource."""
        files, counted = find_files(str(path))
        limits = [each for each in (limit, counted) if each is not None]
        root = Path(image_root) if image_root is not None else files[0].parent
        records = open_records(
            files,
            container=container,
            image_root=root,
            answers=None if answers is None else Path(answers),
            split=split,
            limit=min(limits, default=None),
        )
        super().__init__(records, shaper=shaper or Shaper(), image_root=root, on_bad=on_bad)

    @classmethod
    def of(cls, file: DataFile, *, on_bad: Literal["raise", "keep"] = "raise") -> "FileSource":
        """What an entry of a stage's `data` describes."""
        return cls(
            file.path,
            image_root=file.image_root,
            limit=file.limit,
            container=file.format,
            shaper=Shaper(file.columns, file.prompt, file.box),
            answers=file.answers,
            split=file.split,
            on_bad=on_bad,
        )


class DatasetSource(RecordSource):
    """The conversations of a `datasets.Dataset`, or of any object with a length and numbered rows."""

    def __init__(
        self,
        rows: Any,
        *,
        image_root: str | Path = ".",
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
        prompt: str | None = None,
        box: Literal["xywh", "xyxy"] = "xywh",
        on_bad: Literal["raise", "keep"] = "raise",
    ) -> None:
        """See FileSource."""
        shaper = Shaper(columns or {}, prompt, box)
        super().__init__(RowRecords(rows, limit=limit), shaper=shaper, image_root=Path(image_root), on_bad=on_bad)


def _files(conversation: Conversation) -> Iterator[tuple[str, Path]]:
    """What each path of a conversation is, and the path."""
    frames = [frame for video in conversation.videos if isinstance(video, tuple) for frame in video]
    for kind, sources in (("picture", (*conversation.images, *frames)), ("video", conversation.videos)):
        yield from ((kind, source) for source in sources if isinstance(source, Path))


def num_words(conversation: Conversation) -> int:
    """Words of all turns, a picture's mark counting as one (llava/train/train.py, modality_lengths). At least 1."""
    parts = [part for message in conversation.messages for part in message.parts]
    return max(1, sum(len(part.text.split()) if isinstance(part, TextPart) else 1 for part in parts))
