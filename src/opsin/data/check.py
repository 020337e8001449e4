"""Data read once as a whole, with the loader's own code: every problem of every record, and what it all comes to.

A source finds by itself what the loader refuses (`RecordSource.bad`). What needs more than one record or a picture's
header is looked at here, and with a model, what depends on it: order of speakers, boxes, length, what is taught.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os.path import isfile
from pathlib import Path
from typing import Any, Literal

from opsin.data.defects import defect
from opsin.data.feed import BAD_SAMPLE, ahead
from opsin.data.files import FileSource, RecordSource
from opsin.data.overlong import Encode, fit, too_long
from opsin.data.passes import check_taught
from opsin.data.problems import BadRecord, Problem
from opsin.data.records import JsonRecords
from opsin.data.suspicious import shape_of, suspicious_json, suspicious_record, suspicious_talk
from opsin.encode import Encoder, Measure
from opsin.errors import DataError, MediaError, MessageError
from opsin.media.image import DEFAULT_LIMITS, ImageMode, Limits, image_size
from opsin.spec.plan import Size
from opsin.spec.recipe import DataFile, Overlong
from opsin.text.messages import BoxPart, Conversation, ImageSource
from opsin.text.render import check_order


@dataclass(frozen=True)
class Rules:
    """What a stage asks of its data; all that can be asked without a model, where there is none."""

    encoder: Encoder | None = None
    """Of the model, without a limit of its own."""
    max_tokens: int | None = None
    overlong: Overlong = "error"
    smaller: Sequence[Encode] = ()
    """As in `data.feed.Feed`."""
    decode: bool = False
    """Decode every picture; otherwise only headers are read, and files that do not end as they should."""
    mode: ImageMode = "display"
    limits: Limits = DEFAULT_LIMITS


@dataclass
class Totals:
    """What the data comes to."""

    records: int = 0
    pictures: int = 0
    """Different files."""
    videos: int = 0
    tokens: list[int] = field(default_factory=list)
    """Of each good record; empty without a model."""
    image_tokens: int = 0
    supervised: int = 0
    shortened: int = 0
    """Records that are too long and that the stage shortens."""
    dropped: int = 0
    """Records that are too long and that the stage drops."""


@dataclass(frozen=True, eq=False, slots=True)
class _Seen:
    """What one record turned out to be."""

    where: str
    problems: tuple[Problem, ...]
    shape: str = ""
    id: str = ""
    digest: bytes = b""
    """Of all its texts and pictures."""
    question: bytes = b""
    """Of its pictures' bytes and its first question."""
    measure: Measure | None = None
    change: str = ""
    """`shortened` or `dropped`."""
    videos: int = 0


class DataCheck:
    """Checks sources one after the other and remembers what came before."""

    def __init__(self, rules: Rules, *, workers: int = 2) -> None:
        """workers: threads that read pictures. They change no result."""
        self.rules, self.workers = rules, workers
        self.totals = Totals()
        self._pictures: dict[Any, Size | MediaError] = {}
        self._digests: dict[bytes, str] = {}
        self._held_out: dict[bytes, str] = {}
        tokenizer = rules.encoder.tokenizer if rules.encoder else None
        config = rules.encoder.config if rules.encoder else None
        self.grounding = config.chat.grounding if config else None
        written = {*(self.grounding.marks if self.grounding else ()), *(config.chat.tags if config else ())}
        self.controls = [token for token in (tokenizer.controls if tokenizer else ()) if token not in written]

    def hold_out(self, source: RecordSource) -> None:
        """Remember data that what is checked later must not contain."""
        for index in range(len(source)):
            try:
                conversation = source.sample(index, 0)
            except BAD_SAMPLE:
                continue  # nobody can train or test on it
            self._held_out.setdefault(_question(conversation), source.where(index))

    def check(self, source: RecordSource) -> Iterator[Problem]:
        """All problems of one file's records, in their order; those of the file as a whole come last."""
        shapes: Counter[str] = Counter()
        places: list[tuple[str, str]] = []
        ids: dict[str, str] = {}
        for seen in ahead(
            iter(range(len(source))), lambda index: self._read(source, index), workers=self.workers, depth=64
        ):
            self.totals.records += 1
            yield from seen.problems
            if seen.shape:
                shapes[seen.shape] += 1
                places.append((seen.shape, seen.where))
            if seen.digest:
                yield from self._compare(seen, ids)
            self._count(seen)
        self.totals.pictures = len(self._pictures)
        for shape, where in places:
            usual, count = shapes.most_common(1)[0]
            if shape != usual:
                told = f"its shape is {shape}, but {count} of {len(places)} records are {usual}"
                yield Problem(where, "mixed_shapes", told)

    def _compare(self, seen: _Seen, ids: dict[str, str]) -> Iterator[Problem]:
        """With the records before it and with those that are held out."""
        if seen.id and ids.setdefault(seen.id, seen.where) != seen.where:
            yield Problem(seen.where, "duplicate_id", f"its id {seen.id[:80]!r} is that of {ids[seen.id]}")
        if self._digests.setdefault(seen.digest, seen.where) != seen.where:
            yield Problem(seen.where, "duplicate_record", f"it is the same as {self._digests[seen.digest]}")
        if seen.question in self._held_out:
            held_out = self._held_out[seen.question]
            yield Problem(seen.where, "held_out", f"its pictures and question are those of {held_out}")

    def _count(self, seen: _Seen) -> None:
        totals = self.totals
        totals.videos += seen.videos
        totals.shortened += seen.change == "shortened"
        totals.dropped += seen.change == "dropped"
        if seen.measure is not None and seen.change != "dropped":
            totals.tokens.append(seen.measure.num_tokens)
            totals.image_tokens += seen.measure.num_image_tokens
            totals.supervised += seen.measure.num_supervised

    def _read(self, source: RecordSource, index: int) -> _Seen:
        """One record. Called from several threads."""
        where = source.where(index)
        if index in source.bad:
            return _Seen(where, (source.bad[index],))
        try:
            record = source.records.load(index)
            conversation = source.sample(index, 0)
        except BadRecord as error:
            return _Seen(where, (error.problem,))
        found = [*suspicious_record(record)]
        if isinstance(source.records, JsonRecords):
            found += suspicious_json(source.records.text(index))
        problems = [Problem(where, kind, told) for kind, told in found]
        name = record.get("id") if isinstance(record, dict) else None
        # A conversation is named after its place, which every problem begins with.
        conversation = replace(conversation, id="")
        sizes, wrong = self._sizes(conversation)
        problems += [Problem.of(error, where) for error in wrong]
        problems += [
            Problem(where, kind, told)
            for kind, told in suspicious_talk(conversation, sizes, self.grounding, self.controls)
        ]
        measure, change = None, ""
        try:
            _check_boxes(conversation, sizes)
            if self.rules.encoder is None:
                check_order(conversation.messages)
                if not any(message.role == "assistant" for message in conversation.messages):
                    raise DataError("it has no answer to learn from", kind="nothing_taught")
            elif not wrong:
                measure, change = self._measure(conversation, [size for size in sizes if size is not None])
        except BAD_SAMPLE as error:
            problems.append(Problem.of(error, where))
        question = _question(conversation) if self._held_out and not wrong else b""
        return _Seen(
            where,
            tuple(problems),
            shape_of(record),
            "" if name is None else str(name),
            _digest(conversation),
            question,
            measure,
            change,
            len(conversation.videos),
        )

    def _sizes(self, conversation: Conversation) -> tuple[list[Size | None], list[MediaError]]:
        """The size of each picture, None where it cannot be read, and why."""
        sizes: list[Size | None] = []
        wrong = []
        for number, image in enumerate(conversation.images, start=1):
            found = self._picture(image)
            sizes.append(None if isinstance(found, MediaError) else found)
            if isinstance(found, MediaError):
                wrong.append(found.within(f"image {number}"))
        return sizes, wrong

    def _picture(self, image: ImageSource) -> Size | MediaError:
        key = image if isinstance(image, str | Path) else _bytes_of(image)
        if key not in self._pictures:
            check: Literal["ends", "all"] = "all" if self.rules.decode else "ends"
            try:
                size = image_size(image, mode=self.rules.mode, limits=self.rules.limits, check=check)
            except MediaError as error:
                self._pictures[key] = error
            else:
                self._pictures[key] = size
        return self._pictures[key]

    def _measure(self, conversation: Conversation, sizes: Sequence[Size]) -> tuple[Measure, str]:
        """Its length, and what the stage does about it. Raises for what it cannot be trained on."""
        rules = self.rules
        assert rules.encoder is not None
        measure = rules.encoder.measure(conversation, sizes)
        limit = rules.max_tokens or measure.num_tokens
        if measure.num_tokens <= limit:
            check_taught("", measure, limit)
            return measure, ""
        if rules.overlong == "drop":
            return measure, "dropped"
        if rules.overlong == "error":
            raise too_long("", measure, limit)
        encode = partial(rules.encoder.encode, mode="train")
        kept = fit(
            encode(conversation),
            conversation,
            max_tokens=limit,
            overlong=rules.overlong,
            encode=encode,
            smaller=rules.smaller,
        )
        check_taught("", kept.measure, limit)
        return kept.measure, "shortened"


def open_file(file: DataFile) -> FileSource:
    """A file that is to be read to its end, whatever is wrong with its records."""
    return FileSource.of(file, on_bad="keep")


def severity(problem: Problem) -> str:
    """`error` or `warning`."""
    return defect(problem.kind).severity


def fix(problem: Problem) -> str:
    """What to do about a problem: its own advice, or that for its kind."""
    return problem.fix or defect(problem.kind).fix


def _check_boxes(conversation: Conversation, sizes: Sequence[Size | None]) -> None:
    """Whether boxes lie on their pictures. Raises MessageError."""
    for message in conversation.messages:
        for part in message.parts:
            size = sizes[part.image] if isinstance(part, BoxPart) else None
            if isinstance(part, BoxPart) and size is not None:
                for box in part.boxes:
                    try:
                        box.to("pixels", size)
                    except MessageError as error:
                        raise MessageError(error.message, kind="box", fix=error.fix) from None


def _digest(conversation: Conversation) -> bytes:
    """Of all that is said and shown; pictures in files by their paths."""
    said = [(message.role, [*map(repr, message.parts)]) for message in conversation.messages]
    shown = [_name_of(source) for source in (*conversation.images, *conversation.videos)]
    return hashlib.sha256(repr((said, shown)).encode("utf-8", "surrogatepass")).digest()


def _question(conversation: Conversation) -> bytes:
    """Of the first question and the pictures' own bytes; of all that is said, where nothing is shown."""
    shown = [_bytes_of(source) for source in (*conversation.images, *conversation.videos)]
    messages = [message for message in conversation.messages if message.role != "system"]
    texts = [" ".join(message.text.lower().split()) for message in (messages[:1] if shown else messages)]
    return hashlib.sha256(repr((texts, shown)).encode("utf-8", "surrogatepass")).digest()


def _name_of(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else repr(_bytes_of(source))


def _bytes_of(source: object) -> bytes:
    """A digest of what a picture or video is."""
    if isinstance(source, tuple):
        return hashlib.sha256(b"".join(map(_bytes_of, source))).digest()
    if isinstance(source, bytes):
        return hashlib.sha256(source).digest()
    if isinstance(source, Path) and isfile(source):
        with open(source, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    return repr(source).encode()
