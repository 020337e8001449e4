"""Examples from the rows of a user's file, in any container that training reads (`opsin.data.open`).

row                                                                     gives
image(s) or video, question, answer or answers                          answers, choice, pope
image, caption or captions; rows about one picture become one example   captions
image, bbox, expression(s); several expressions become several examples box
conversations or messages of one question and one answer                answers, choice, pope
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os.path import isfile
from pathlib import Path
from typing import Any, Literal

from opsin.data.open import Container, find_files, open_records
from opsin.data.problems import BadRecord, Problem
from opsin.data.records import Records
from opsin.data.shapes import IMAGE_KEYS, Shaper
from opsin.errors import DataError, OpsinError
from opsin.evaluate.answers import LETTERS, words
from opsin.evaluate.examples import Example
from opsin.evaluate.pope import NO, YES
from opsin.evaluate.vqa import LEAST_ANSWERS
from opsin.media.source import shorten
from opsin.spec.grounding import Space
from opsin.text.grounding import Box
from opsin.text.messages import IMAGE_MARK, ImagePart, ImageSource, Message, NamePart, TextPart, VideoSource
from opsin.text.parse import read

Kind = Literal["answers", "ten_answers", "choice", "pope", "captions", "box"]

QUESTION_KEYS = ("question", "query", "instruction", "text", "prompt")
ANSWER_KEYS = ("answers", "answer", "multiple_choice_answer", "label", "response", "output")
OPTION_KEYS = ("options", "choices")
CAPTION_KEYS = ("captions", "caption", "text", "txt", "answers", "answer")
NAME_KEYS = (
    "expressions",
    "expression",
    "sentences",
    "sentence",
    "refs",
    "ref",
    "phrase",
    "question",
    "answer",
    "caption",
)
VIDEO_KEYS = ("video", "videos")


class Rows(Sequence[Example]):
    """The examples of a file. Rows are read and checked when this is made, bytes of pictures when asked for."""

    def __init__(
        self,
        path: str | Path,
        kind: Kind,
        *,
        image_root: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
        group: str = "group",
        box: Literal["xywh", "xyxy"] = "xywh",
        box_space: Space = "pixels",
        limit: int | None = None,
        container: Container | Literal["auto"] = "auto",
        answers: str | Path | None = None,
        split: str | None = None,
    ) -> None:
        """image_root: where relative picture paths start from; the file's folder when not given. columns: names that
        the file has for our keys, {ours: theirs}. group: the key that rows are grouped by. box, box_space: what the
        numbers of a `bbox` are. limit: the first so many rows. Raises BadRecord for the first bad row, or DataError.
        """
        files, counted = find_files(str(path))
        self.image_root = Path(image_root) if image_root is not None else files[0].parent
        limits = [each for each in (limit, counted) if each is not None]
        self.records: Records = open_records(
            files,
            container=container,
            image_root=self.image_root,
            answers=None if answers is None else Path(answers),
            split=split,
            limit=min(limits, default=None),
        )
        self.fingerprint = self.records.fingerprint
        self._kind, self._shaper, self._group = kind, Shaper(columns or {}), group
        self._box, self._box_space = box, box_space
        self._examples: list[Example] = []
        self._places: list[tuple[int, int]] = []
        """Record, and number within it, of each example."""
        self._seen: set[Path] = set()
        for index in range(len(self.records)):
            for number, example in enumerate(self._read(index, light=True)):
                self._check_files(example, index)
                self._examples.append(example)
                self._places.append((index, number))
        if kind == "captions":
            self._join_captions()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        example = self._examples[index]
        if not any(isinstance(each, bytes) for each in (*example.images, *example.videos)):
            return example
        record, number = self._places[index]
        whole = self._read(record, light=False)[number]
        return replace(example, images=whole.images, videos=whole.videos)

    def where(self, index: int) -> str:
        """The place of an example, for messages."""
        return self.records.where(self._places[index][0])

    @property
    def light(self) -> Sequence[Example]:
        """All examples, where pictures that are bytes in a table are left out: what scoring needs."""
        return self._examples

    def _read(self, index: int, *, light: bool) -> list[Example]:
        where = self.records.where(index)
        try:
            record = self.records.load(index, light=light)
            if not isinstance(record, Mapping):
                raise DataError(f"a row is an object with keys, not {type(record).__name__}", kind="shape")
            named = {ours: record[theirs] for ours, theirs in self._shaper.columns.items() if theirs in record}
            return self._examples_of({**record, **named}, str(index + 1))
        except BadRecord:
            raise
        except OpsinError as error:
            raise BadRecord(Problem.of(error, where)) from None

    def _examples_of(self, row: Mapping[str, Any], key: str) -> list[Example]:
        if row.get("conversations") is not None or row.get("messages") is not None:
            example = self._from_messages(row, key)
        else:
            images, videos = self._media(row)
            example = Example(key, "", images, videos)
        name = row.get("image_id")
        example = replace(
            example,
            group="" if row.get(self._group) is None else str(row[self._group]),
            picture=str(name) if isinstance(name, int | str) else "",
        )
        if self._kind == "captions":
            self._need_one_picture(example)
            return [replace(example, reference=tuple(_texts(row, CAPTION_KEYS, "caption")))]
        if self._kind == "box":
            self._need_one_picture(example)
            box = self._read_box(row)
            names = _texts(row, NAME_KEYS, "expression")
            keys = [key] if len(names) == 1 else [f"{key}.{number}" for number in range(1, len(names) + 1)]
            return [replace(example, key=each, question=name, box=box) for each, name in zip(keys, names, strict=True)]
        if not example.question:
            example = replace(example, question=_question(row))
        if self._kind == "choice":
            return [_with_choice(example, row)]
        answers = example.reference or tuple(_texts(row, ANSWER_KEYS, "answer"))
        if self._kind == "pope":
            answers = tuple(words(answer).lower().rstrip(".") for answer in answers[:1])
            if answers[0] not in (YES, NO):
                raise DataError(f"its answer is {answers[0][:80]!r}; yes or no is needed", kind="answer")
        if self._kind == "ten_answers" and len(answers) < LEAST_ANSWERS:
            raise DataError(
                f"it has {len(answers)} answer(s); VQA accuracy compares with those of ten people (at least "
                f"{LEAST_ANSWERS})",
                kind="answer",
                fix="list them all under 'answers', or use --task exact",
            )
        return [replace(example, reference=answers)]

    def _from_messages(self, row: Mapping[str, Any], key: str) -> Example:
        conversation = read(self._shaper.shape(row))
        if [message.role for message in conversation.messages] != ["user", "assistant"]:
            raise DataError(
                f"its turns are {', '.join(message.role for message in conversation.messages)}; one question and one "
                "answer can be evaluated",
                kind="turns",
            )
        asked, answer = conversation.messages
        return Example(
            key,
            _marked_text(asked),
            tuple(self._located(each) for each in conversation.images),
            tuple(self._located_video(each) for each in conversation.videos),
            reference=(_marked_text(answer),),
        )

    def _media(self, row: Mapping[str, Any]) -> tuple[tuple[ImageSource, ...], tuple[VideoSource, ...]]:
        parts: list[dict[str, Any]] = []
        for kind, keys in (("image", IMAGE_KEYS), ("video", VIDEO_KEYS)):
            given = next((row[each] for each in keys if row.get(each) not in (None, "", [])), None)
            several = list(given) if isinstance(given, list | tuple) else [] if given is None else [given]
            parts += [{"type": kind, kind: each} for each in several]
        if not parts:
            return (), ()
        shown = read({"messages": [{"role": "user", "content": parts}]})
        return tuple(map(self._located, shown.images)), tuple(map(self._located_video, shown.videos))

    def _located(self, source: ImageSource) -> ImageSource:
        if not isinstance(source, str) or source.startswith("data:"):
            return source
        if source.startswith(("http://", "https://")):
            raise DataError(
                f"{shorten(source)} is a web address; pictures and videos are read from files only",
                kind="address",
                fix="download it and give its path",
            )
        return self.image_root / source.removeprefix("file://")

    def _located_video(self, source: VideoSource) -> VideoSource:
        if isinstance(source, tuple):
            return tuple(self._located(frame) for frame in source)
        located = self._located(source)
        assert isinstance(located, str | bytes | Path)
        return located

    def _check_files(self, example: Example, index: int) -> None:
        frames = [frame for video in example.videos if isinstance(video, tuple) for frame in video]
        for kind, sources in (("picture", (*example.images, *frames)), ("video", example.videos)):
            for path in sources:
                if not isinstance(path, Path) or path in self._seen:
                    continue
                if not isfile(path):
                    told = f"{kind} {shorten(str(path))} is not there. Relative paths start from {self.image_root}"
                    fix = "give --image-root, or correct the row"
                    raise BadRecord(Problem(self.records.where(index), f"{kind}_missing", told, fix))
                self._seen.add(path)

    def _need_one_picture(self, example: Example) -> None:
        if len(example.images) != 1 or example.videos:
            raise DataError(
                f"it shows {len(example.images)} picture(s) and {len(example.videos)} video(s); exactly one picture is "
                f"needed, under one of {', '.join(IMAGE_KEYS[:3])}",
                kind="picture",
            )

    def _read_box(self, row: Mapping[str, Any]) -> Box:
        numbers = row.get("bbox", row.get("box"))
        if (
            not isinstance(numbers, list | tuple)
            or len(numbers) != 4
            or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in numbers)
        ):
            raise DataError(f"its 'bbox' is {str(numbers)[:80]}; four numbers are needed", kind="box")
        left, top, right, bottom = map(float, numbers)
        if self._box == "xywh":
            right, bottom = left + right, top + bottom
        return Box.of(left, top, right, bottom, self._box_space)

    def _join_captions(self) -> None:
        """One example for each picture, with the captions of all its rows."""
        firsts: dict[str, int] = {}
        for place, example in enumerate(self._examples):
            first = firsts.setdefault(example.cluster, place)
            if first != place:
                joined = self._examples[first].reference + example.reference
                self._examples[first] = replace(self._examples[first], reference=joined)
        kept = sorted(firsts.values())
        self._examples = [self._examples[place] for place in kept]
        self._places = [self._places[place] for place in kept]


def _question(row: Mapping[str, Any]) -> str:
    given = next((row[key] for key in QUESTION_KEYS if row.get(key) not in (None, "")), None)
    if not isinstance(given, str):
        what = "no question" if given is None else f"a question of type {type(given).__name__}"
        raise DataError(
            f"a row with {what}; one of the keys {', '.join(QUESTION_KEYS)} holds its text", kind="question"
        )
    return given


def _texts(row: Mapping[str, Any], keys: Sequence[str], what: str) -> list[str]:
    """One text or several, in any of the forms of published sets; numbers are taken as they are written."""
    key = next((each for each in keys if row.get(each) not in (None, "", [])), None)
    if key is None:
        given = ", ".join(map(str, list(row)[:12]))
        raise DataError(f"a row without {what}: one of {', '.join(keys)} is needed; it has {given}", kind=what)
    several = row[key] if isinstance(row[key], list | tuple) else [row[key]]
    texts = []
    for item in several:
        if isinstance(item, Mapping):  # refer: {"sent", "raw"}; VQA: {"answer", "answer_confidence"}
            item = next((item[name] for name in ("raw", "sent", "answer", "caption") if name in item), None)
        if isinstance(item, int | float) and not isinstance(item, bool):
            item = str(item)
        if not isinstance(item, str) or not item.strip():
            raise DataError(f"{key!r} holds {str(item)[:80]!r} where a text is needed", kind=what)
        texts.append(item)
    return texts


def _with_choice(example: Example, row: Mapping[str, Any]) -> Example:
    """Options below the question, each behind its letter, and the letter of the right one."""
    given = next((row[key] for key in OPTION_KEYS if row.get(key)), None)
    if given is None:
        given = [row[letter] for letter in LETTERS if row.get(letter) not in (None, "")]
    if not isinstance(given, list | tuple) or not 2 <= len(given) <= len(LETTERS):
        raise DataError(
            f"its options are {str(given)[:80]}; a list of 2 to {len(LETTERS)} under 'options' or 'choices', or the "
            "keys A, B, C ..., are needed",
            kind="options",
        )
    options = tuple(str(each) for each in given)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    letter = _letter(row, example.reference, options)
    return replace(example, question="\n".join([example.question, *lines]), options=options, reference=(letter,))


def _letter(row: Mapping[str, Any], said: tuple[str, ...], options: tuple[str, ...]) -> str:
    """The right letter: from a letter, the number of an option from 0, or its words."""
    value: Any = said[0] if said else next((row[key] for key in ANSWER_KEYS if row.get(key) not in (None, "")), None)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return LETTERS[value]
    if isinstance(value, str):
        text = value.strip().strip("().").upper()
        if len(text) == 1 and text in LETTERS[: len(options)]:
            return text
        if value in options:
            return LETTERS[options.index(value)]
    raise DataError(
        f"its answer is {str(value)[:80]!r}; the letter of one of {len(options)} options, its number from 0, or its "
        "words are needed",
        kind="answer",
    )


def _marked_text(message: Message) -> str:
    """The text of a message, with marks for pictures that stand inside it."""
    pieces = []
    for part in message.parts:
        if isinstance(part, TextPart | NamePart):
            pieces.append(part.text)
        elif isinstance(part, ImagePart) and part.standing == "in_text":
            pieces.append(IMAGE_MARK)
    return "".join(pieces)
