"""Sets that come as one JSON object, whose records are put together from several places.

COCO        {"images": [...], "annotations": [{"image_id": 9, "caption": "..."} ...]}, also boxes with expressions
VQA v2      {"questions": [...]} and, in a second file, {"annotations": [{"question_id": 9, "answers": [...]} ...]}
ScienceQA   problems.json, {"1": {"question": ..., "choices": [...]} ...}, and pid_splits.json
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.data.problems import BadRecord, Problem
from opsin.data.records import Places, load_json
from opsin.data.scan import JsonScan, Place, digest
from opsin.errors import DataError, nearest

LISTS = ("images", "annotations", "questions")


@dataclass(frozen=True)
class ObjectFile:
    """Where the parts of a file stand that is one JSON object."""

    path: Path
    lists: dict[str, Places]
    """Of the lists that are known: the place of each item."""
    members: dict[str, Place]
    """Every other member that is an object."""
    values: dict[str, Any]
    """Every other member that is a text or a number."""


def read_object(path: Path) -> ObjectFile:
    """Look through a file once. Raises DataError with the line where it is not JSON."""
    lists: dict[str, Places] = {}
    members: dict[str, Place] = {}
    values: dict[str, Any] = {}
    with JsonScan(path) as scan:
        for key in scan.members():
            if key in LISTS and scan.peek() == "[":
                lists[key] = Places()
                lists[key].extend(scan.items(), None)
                continue
            value, place = scan.value(f"the value of {key!r}")
            if isinstance(value, dict):
                members[key] = place
            elif isinstance(value, str | int):
                values[key] = value
    return ObjectFile(path, lists, members, values)


class CocoRecords:
    """One record for each annotation of a COCO file: its caption or box, with the file of its picture."""

    def __init__(self, file: ObjectFile, *, limit: int | None = None) -> None:
        """Raises DataError where there is no annotation."""
        self.path = file.path
        self._places = file.lists["annotations"]
        self._length = len(self._places) if limit is None else min(limit, len(self._places))
        self.fingerprint = digest(file.path)
        self._images: dict[Any, dict[str, Any]] = {}
        for number in range(len(file.lists["images"])):
            image = load_json(file.path, file.lists["images"][number])
            if isinstance(image, dict) and isinstance(image.get("id"), int | str):
                kept = ("file_name", "width", "height", "caption")
                self._images[image["id"]] = {key: image[key] for key in kept if key in image}
        if not self._length:
            raise DataError(f"{file.path} has no annotations", kind="empty")

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        """File, number and line of an annotation, both from 1."""
        return f"{self.path} annotation {index + 1} (line {self._places[index].line})"

    def load(self, index: int, *, light: bool = False) -> Any:
        """An annotation and what is known of its picture."""
        record = load_json(self.path, self._places[index])
        if not isinstance(record, dict):
            raise BadRecord(Problem(self.where(index), "image_id", f"an annotation is no {type(record).__name__}"))
        number = record.get("image_id")
        image = self._images.get(number) if isinstance(number, int | str) else None
        if image is None or "file_name" not in image:
            told = f"its image_id {str(number)[:80]!r} is not among the {len(self._images)} images with a file_name"
            raise BadRecord(Problem(self.where(index), "image_id", told))
        return image | record


class VqaRecords:
    """The questions of VQA v2 with their answers."""

    def __init__(self, file: ObjectFile, *, answers: Path | None, image_root: Path, limit: int | None = None) -> None:
        """answers: the file of annotations; found beside that of the questions when not given. image_root: tells under
        which names pictures lie there."""
        self.path = file.path
        self._places = file.lists["questions"]
        self._length = len(self._places) if limit is None else min(limit, len(self._places))
        self._answers = read_object(answers or _beside(file.path))
        if "annotations" not in self._answers.lists:
            raise DataError(f"{self._answers.path} has no 'annotations': give the file of the answers", kind="answers")
        if not self._length:
            raise DataError(f"{file.path} has no questions", kind="empty")
        self._by_question: dict[Any, int] = {}
        for number in range(len(self._answers.lists["annotations"])):
            answer = load_json(self._answers.path, self._answers.lists["annotations"][number])
            if isinstance(answer, dict) and isinstance(answer.get("question_id"), int | str):
                self._by_question[answer["question_id"]] = number
        self.fingerprint = f"{digest(file.path)} {digest(self._answers.path)}"
        subset = str(file.values.get("data_subtype", self._answers.values.get("data_subtype", "")))
        forms = [f"COCO_{subset}_{{:012d}}.jpg", f"{subset}/COCO_{subset}_{{:012d}}.jpg", "{:012d}.jpg"]
        forms.append(f"{subset}/{{:012d}}.jpg")
        question = load_json(file.path, self._places[0])
        first = question.get("image_id") if isinstance(question, dict) else None
        there = [form for form in forms if isinstance(first, int) and (image_root / form.format(first)).is_file()]
        self._form = (there or forms)[0]

    def __len__(self) -> int:
        return self._length

    def where(self, index: int) -> str:
        """File, number and line of a question, both from 1."""
        return f"{self.path} question {index + 1} (line {self._places[index].line})"

    def load(self, index: int, *, light: bool = False) -> Any:
        """A question, its picture, and its answers."""
        record = load_json(self.path, self._places[index])
        if not isinstance(record, dict) or not isinstance(record.get("image_id"), int):
            raise BadRecord(Problem(self.where(index), "image_id", "no question with a whole number as its 'image_id'"))
        name = record.get("question_id")
        number = self._by_question.get(name) if isinstance(name, int | str) else None
        if number is None:
            told = f"{self._answers.path} has no answer to question_id {str(name)[:80]}"
            raise BadRecord(Problem(self.where(index), "answer", told))
        answers = load_json(self._answers.path, self._answers.lists["annotations"][number])
        return answers | record | {"image": self._form.format(record["image_id"])}


class ScienceQaRecords:
    """The problems of one split of ScienceQA."""

    def __init__(self, file: ObjectFile, *, split: str, image_root: Path, limit: int | None = None) -> None:
        """split: one of pid_splits.json, which lies beside the problems. image_root: where pictures lie."""
        self.path, self._file, self._image_root = file.path, file, image_root
        splits_path = file.path.parent / "pid_splits.json"
        try:
            splits = json.loads(splits_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{splits_path}, which says what belongs to a split, cannot be read: {error}") from None
        if not isinstance(splits, dict):
            raise DataError(f"{splits_path} is no object of splits", kind="file")
        if not isinstance(splits.get(split), list):
            raise DataError(f"{splits_path} has no split {split!r}{nearest(split, splits)}; it has {', '.join(splits)}")
        self._split, self._ids = split, [str(each) for each in splits[split]][:limit]
        if not self._ids:
            raise DataError(f"{splits_path}: split {split!r} is empty", kind="empty")
        self.fingerprint = f"{digest(file.path)} {digest(splits_path)}"

    def __len__(self) -> int:
        return len(self._ids)

    def where(self, index: int) -> str:
        """File, id and line of a problem."""
        place = self._file.members.get(self._ids[index])
        return f"{self.path} problem {self._ids[index]!r}" + (f" (line {place.line})" if place else "")

    def load(self, index: int, *, light: bool = False) -> Any:
        """A problem, its picture named as it lies in the published folders or beside them."""
        name = self._ids[index]
        place = self._file.members.get(name)
        if place is None:
            raise BadRecord(
                Problem(self.where(index), "member_missing", f"split {self._split!r} names it; it is not there")
            )
        record = load_json(self.path, place)
        if not isinstance(record, dict):
            raise BadRecord(Problem(self.where(index), "shape", f"a problem is no {type(record).__name__}"))
        if isinstance(record.get("image"), str) and record["image"]:
            folders = [f"{record.get('split', self._split)}/{name}", name]
            there = [folder for folder in folders if (self._image_root / folder / record["image"]).is_file()]
            record["image"] = f"{(there or folders)[0]}/{record['image']}"
        return {"id": name, **record}


def _beside(questions: Path) -> Path:
    """The file of answers under the name that it is published with."""
    name = questions.name.replace("_OpenEnded_", "_").replace("questions", "annotations")
    found = questions.with_name(name)
    if found == questions or not found.is_file():
        raise DataError(
            f"{questions} holds questions without answers, and {found} is not there; name the file of the annotations "
            "under `answers`",
            kind="answers",
        )
    return found
