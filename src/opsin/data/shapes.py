"""The shapes of records that published data sets come in, each turned into one that `text.parse` reads.

A shape is known by its keys, record by record, so that a file may mix them:

    conversations / messages    LLaVA, ShareGPT, HF, OpenAI: read as they are, Qwen-VL's and InternVL's boxes as objects
    texts                       Cauldron, FineVision: turns of `user` and `assistant`
    question + choices          ScienceQA, as LLaVA puts it (`QCM-LEA`)
    bbox + expression           RefCOCO and its kin
    question + answer(s)        VQA; also query + response, instruction (+ input) + output
    caption                     captions of a picture; of several captions each epoch takes the next
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opsin.data.marked_text import with_objects
from opsin.errors import MessageError, nearest

IMAGE_KEYS = ("image", "images", "image_path", "jpg", "jpeg", "png", "webp", "img", "file_name")
CAPTION_KEYS = ("caption", "captions", "text", "txt", "TEXT")
EXPRESSION_KEYS = ("expression", "expressions", "sentence", "sentences", "ref", "refs", "phrase", "answer", "caption")
QUESTION_KEYS = ("question", "query", "instruction")
ANSWER_KEYS = ("multiple_choice_answer", "answer", "answers", "response", "output")
KNOWN_KEYS = (
    *("conversations", "messages", "texts", "choices", "bbox", "objects", "video", "videos"),
    *QUESTION_KEYS,
    *IMAGE_KEYS,
    *CAPTION_KEYS,
    *EXPRESSION_KEYS,
    *ANSWER_KEYS,
)

LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}"
"""How boxes are asked for where a data file sets no `prompt`."""


@dataclass(frozen=True)
class Shaper:
    """How the records of one file are read."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Names that the file has for our keys: {ours: theirs}."""
    prompt: str | None = None
    """What is said beside a picture; {} is the record's own question or expression."""
    box: Literal["xywh", "xyxy"] = "xywh"
    """What the four numbers of a `bbox` are."""

    def shape(self, record: Any, *, epoch: int = 0) -> Any:
        """The record as `text.parse` reads it. Raises MessageError where no shape fits."""
        if not isinstance(record, Mapping):
            return record
        if self.columns:
            record = self._renamed(record)
        record = _unpacked(record)
        kind = self.kind(record)
        if kind is None:
            given = [str(key) for key in list(record)[:20]]
            close = next((hint for key in given if key not in KNOWN_KEYS and (hint := nearest(key, KNOWN_KEYS))), "")
            missing = [theirs for theirs in self.columns.values() if theirs not in record]
            close += f"; `columns` names {missing[0]!r}, which is not among them" if missing else ""
            raise MessageError(
                f"no known shape of record has its keys {given}{close}",
                kind="shape",
                fix="it needs 'conversations' or 'messages', or a picture with 'caption', or with 'question' and "
                "'answer'; `columns` names keys that are called otherwise",
            )
        if kind == "messages":
            return with_objects(record)
        readers: dict[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
            "texts": self._texts,
            "choices": self._choices,
            "box": self._box,
            "question": self._question,
            "caption": self._caption,
        }
        shaped = readers[kind](record, epoch)
        _, name = _first(record, ("id", "question_id", "image_id"))
        return shaped if name is None else {"id": name, **shaped}

    @staticmethod
    def kind(record: Mapping[str, Any]) -> str | None:
        """Which shape a record has; None for none that is known."""

        def has(*keys: str) -> bool:
            return any(record.get(key) is not None for key in keys)

        if has("conversations", "messages"):
            return "messages"
        if has("texts"):
            return "texts"
        if has("question") and has("choices"):
            return "choices"
        if has("bbox") and has(*EXPRESSION_KEYS):
            return "box"
        if any(key in record for key in QUESTION_KEYS):
            return "question"
        if any(key in record for key in CAPTION_KEYS) and any(key in record for key in (*IMAGE_KEYS, "video")):
            return "caption"
        return None

    def _renamed(self, record: Mapping[str, Any]) -> dict[str, Any]:
        named = {ours: record[theirs] for ours, theirs in self.columns.items() if theirs in record}
        taken = set(self.columns.values())
        return {key: value for key, value in record.items() if key not in taken and key not in self.columns} | named

    def _texts(self, record: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        turns = record["texts"]
        if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
            raise MessageError("'texts' is no list of turns with 'user' and 'assistant'", kind="turns")
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns, start=1):
            for role in ("user", "assistant"):
                if not isinstance(turn.get(role), str):
                    raise MessageError(f"turn {number} of 'texts' has no text under {role!r}", kind="turn")
            shown = _shown(record) if number == 1 else []
            messages += _exchange(shown, turn["user"], turn["assistant"])
        return {"messages": messages}

    def _choices(self, record: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        choices, answer = record["choices"], record.get("answer")
        if not isinstance(choices, list | tuple) or not choices:
            raise MessageError("'choices' is no list of options", kind="choices")
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise MessageError(
                f"'answer' is {str(answer)[:80]!r}; the number of one of {len(choices)} choices, from 0, is needed",
                kind="answer",
            )
        letters = [chr(ord("A") + number) for number in range(len(choices))]
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
        question = f"{record['question']}\nContext: {_said(record, 'hint') or 'N/A'}\nOptions: {options}"
        reasons = [_said(record, key) for key in ("lecture", "solution")]
        text = " ".join(filter(None, [*reasons, f"The answer is {letters[answer]}."]))
        return {"messages": _exchange(_shown(record), self._put(question), text)}

    def _box(self, record: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        key, expression = _first(record, EXPRESSION_KEYS)
        numbers = record["bbox"]
        if not isinstance(numbers, list | tuple) or len(numbers) != 4:
            raise MessageError(f"'bbox' is {str(numbers)[:80]}; four numbers are needed", kind="box")
        if self.box == "xywh" and all(isinstance(number, int | float) for number in numbers):
            left, top, width, height = numbers
            numbers = [left, top, left + width, top + height]
            self._check_box(record, numbers)
        return {
            "messages": _exchange(_shown(record), (self.prompt or LOCATE).replace("{}", "<ref-object>"), "<bbox>"),
            "objects": {
                "ref": [_next(expression, epoch, key, kind="expression")],
                "bbox": [list(numbers)],
                "bbox_type": "real",
            },
        }

    @staticmethod
    def _check_box(record: Mapping[str, Any], corners: list[float]) -> None:
        """Where a record says how large its picture is, a box of corners taken for one of sizes is seen."""
        width, height = record.get("width"), record.get("height")
        if not isinstance(width, int | float) or not isinstance(height, int | float):
            return
        if corners[2] > width + 1 or corners[3] > height + 1:
            raise MessageError(
                f"bbox {record['bbox']} as left, top, width, height leaves the picture of {width}x{height} px",
                kind="box",
                fix="set `box: xyxy` if these are corners",
            )

    def _question(self, record: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        name, question = _first(record, QUESTION_KEYS)
        if not isinstance(question, str):
            raise MessageError(f"its question is {type(question).__name__}; text is needed", kind="question")
        if record.get("history"):
            raise MessageError("a 'history' beside a question; write all turns as 'messages'", kind="turns")
        if name == "instruction" and (given := _said(record, "input")):
            question += f"\n{given}"
        key, answer = _first(record, ANSWER_KEYS)
        if answer is None:
            raise MessageError(
                f"a question without an answer; one of {', '.join(ANSWER_KEYS)} is needed", kind="answer"
            )
        return {"messages": _exchange(_shown(record), self._put(question), _most_given(answer, key))}

    def _caption(self, record: Mapping[str, Any], epoch: int) -> dict[str, Any]:
        key, caption = _first(record, CAPTION_KEYS)
        if caption is None:
            raise MessageError("a picture without a caption", kind="caption")
        shown = _shown(record)
        if not shown:
            raise MessageError("a caption without a picture", kind="picture")
        return {"messages": _exchange(shown, self._put(""), _next(caption, epoch, key, kind="caption"))}

    def _put(self, question: str) -> str:
        return question if self.prompt is None else self.prompt.replace("{}", question)


def _unpacked(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The record, with what tables often hold as JSON text as data."""
    packed = {}
    for key in ("conversations", "messages", "texts", "objects"):
        value = record.get(key)
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                packed[key] = json.loads(value)
            except json.JSONDecodeError as error:
                raise MessageError(f"{key!r} is a text that is not JSON: {error}", kind="json") from None
    return {**record, **packed} if packed else record


def _first(record: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The first of some keys that a record has, and its value; ("", None) for none of them."""
    return next(((key, record[key]) for key in keys if record.get(key) not in (None, "")), ("", None))


def _shown(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pictures and videos of a record as parts of a message."""
    parts = []
    for kind, keys in (("image", IMAGE_KEYS), ("video", ("video", "videos"))):
        _, given = _first(record, keys)
        several = given if isinstance(given, list | tuple) else [] if given is None else [given]
        if any(each is None for each in several):
            raise MessageError(f"one of its {kind}s is null", kind="picture" if kind == "image" else "video")
        parts += [{"type": kind, kind: each} for each in several]
    return parts


def _exchange(shown: list[dict[str, Any]], question: str, answer: str) -> list[dict[str, Any]]:
    said = [{"type": "text", "text": question}] if question else []
    return [{"role": "user", "content": [*shown, *said]}, {"role": "assistant", "content": answer}]


def _said(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    return value.strip() if isinstance(value, str) else ""


def _texts_of(value: Any, key: str, kind: str) -> list[str]:
    """One text or several, in any of the forms of published sets."""
    items = value if isinstance(value, list | tuple) else [value]
    texts = []
    for item in items:
        if isinstance(item, Mapping):  # refer: {"sent", "raw", "tokens"}; VQA: {"answer", "answer_confidence"}
            item = next((item[name] for name in ("raw", "sent", "answer", "caption") if name in item), None)
        if not isinstance(item, str) or not item.strip():
            raise MessageError(f"{key!r} holds {str(item)[:80]!r} where a text is needed", kind=kind)
        texts.append(item)
    if not texts:
        raise MessageError(f"{key!r} is empty", kind=kind)
    return texts


def _next(value: Any, epoch: int, key: str, *, kind: str) -> str:
    """Of several texts each epoch takes the next."""
    texts = _texts_of(value, key, kind)
    return texts[epoch % len(texts)]


def _most_given(value: Any, key: str) -> str:
    """The answer that most people gave; of equals the first."""
    return Counter(_texts_of(value, key, "answer")).most_common(1)[0][0]
