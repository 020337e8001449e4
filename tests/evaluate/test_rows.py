"""Rows of users' files as examples, and what is said about rows that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest

import toys
from evaluations import Writer
from opsin.data.problems import BadRecord
from opsin.errors import DataError
from opsin.evaluate.examples import Example, conversation
from opsin.evaluate.rows import Rows
from opsin.text.messages import ImagePart, NamePart, TextPart

TEN = ["red"] * 7 + ["blue"] * 3


def test_questions_with_answers_of_any_form(write: Writer) -> None:
    path = write(
        {"image": "a.png", "question": "How many?", "answer": 3, "group": "count"},
        {"image": "b.png", "question": "Which?", "answers": [{"answer": "red"}, {"answer": "blue"}]},
        {"image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "red"}]},
        {"question": "Two and two?", "answer": "4"},
    )  # fmt: skip
    rows = Rows(path, "answers")
    assert [each.key for each in rows] == ["1", "2", "3", "4"]
    assert [each.reference for each in rows] == [("3",), ("red", "blue"), ("red",), ("4",)]
    assert [each.group for each in rows] == ["count", "", "", ""]
    assert rows[2].question == "<image>\nColour?"
    # Questions about one picture are one cluster.
    assert rows[0].cluster == rows[2].cluster != rows[1].cluster


def test_boxes_become_corners_and_every_expression_an_example(write: Writer) -> None:
    path = write(
        {"image": "a.png", "bbox": [10, 20, 30, 40], "sentences": ["a dog", {"sent": "the dog"}]},
        {"image": "b.png", "bbox": [1, 2, 3, 4], "expression": "a cat"},
    )
    rows = Rows(path, "box")
    assert [(each.key, each.question) for each in rows] == [("1.1", "a dog"), ("1.2", "the dog"), ("2", "a cat")]
    assert rows[0].box is not None
    assert rows[0].box.sides == (10, 20, 40, 60)
    corners = Rows(
        write({"image": "a.png", "bbox": [0.1, 0.2, 0.3, 0.4], "ref": "x"}), "box", box="xyxy", box_space="unit"
    )
    assert corners[0].box is not None
    assert (corners[0].box.space, corners[0].box.sides) == ("unit", (0.1, 0.2, 0.3, 0.4))


def test_captions_of_one_picture_come_together(write: Writer) -> None:
    path = write(
        {"image": "a.png", "caption": "one"},
        {"image": "b.png", "captions": ["two", "three"]},
        {"image": "a.png", "caption": "four"},
    )
    rows = Rows(path, "captions")
    assert [each.reference for each in rows] == [("one", "four"), ("two", "three")]
    assert [each.key for each in rows] == ["1", "2"]


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["cat", "dog"], "answer": "B"},
        {"options": ["cat", "dog"], "answer": 1},
        {"choices": ["cat", "dog"], "answer": "dog"},
        {"A": "cat", "B": "dog", "answer": "(b)"},
    ],
)
def test_options_of_a_choice_stand_below_its_question(write: Writer, row: dict[str, Any]) -> None:
    (example,) = Rows(write({"image": "a.png", "question": "What is it?", **row}), "choice")
    assert example.question == "What is it?\nA. cat\nB. dog"
    assert example.reference == ("B",)
    assert example.options == ("cat", "dog")


def test_pope_rows_as_published(write: Writer) -> None:
    path = write({"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no", "category": "random"})
    (example,) = Rows(path, "pope", group="category")
    assert (example.question, example.reference, example.group) == ("Is there a dog?", ("no",), "random")


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ({"image": "a.png", "question": "What?"}, "answers", "a row without answer: one of answers, answer"),
        ({"image": "a.png", "answer": "x"}, "answers", "a row with no question"),
        ({"image": "d.png", "question": "?", "answer": "x"}, "answers", r"picture .*d\.png is not there.*--image-root"),
        ({"image": "a.png", "question": "?", "answer": "x"}, "ten_answers", r"it has 1 answer.*use --task exact"),
        ({"image": "a.png", "question": "?", "answer": "maybe"}, "pope", "'maybe'; yes or no is needed"),
        ({"question": "?", "caption": "x"}, "captions", r"shows 0 picture\(s\).*exactly one picture is needed"),
        ({"image": ["a.png", "b.png"], "caption": "x"}, "captions", r"shows 2 picture\(s\)"),
        ({"image": "a.png", "ref": "x", "bbox": [1, 2, 3]}, "box", r"\[1, 2, 3\]; four numbers are needed"),
        ({"image": "a.png", "ref": "x", "bbox": [9, 9, -2, 1]}, "box", "corners are reversed|outside"),
        ({"image": "a.png", "question": "?", "answer": "A"}, "choice", "its options are .*'options' or 'choices'"),
        ({"image": "a.png", "question": "?", "options": ["x", "y"], "answer": "C"}, "choice", "one of 2 options"),
        ({"image": "http://x.org/a.png", "question": "?", "answer": "x"}, "answers", "is a web address"),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            "answers",
            "its turns are user; one question and one answer",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_place(
    write: Writer, row: dict[str, Any], kind: Any, message: str
) -> None:
    path = write(row)
    with pytest.raises(BadRecord, match=message) as caught:
        Rows(path, kind)
    assert f"{path} record 1 (line 1): " in str(caught.value)


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no record"):
        Rows(tmp_path / "rows.jsonl", "answers")


def test_columns_name_keys_that_are_called_otherwise(write: Writer) -> None:
    path = write({"img": "a.png", "q": "What?", "gold": "x"})
    (example,) = Rows(path, "answers", columns={"image": "img", "question": "q", "answer": "gold"})
    assert (example.question, example.reference, len(example.images)) == ("What?", ("x",), 1)


def test_pictures_of_tables_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    toys.picture((40, 30)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    table = arrow.table({"image": [{"bytes": data, "path": None}] * 2, "question": ["x", "y"], "answer": ["1", "2"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = Rows(tmp_path / "rows.parquet", "answers")
    assert rows.light[1].images != (data,)
    assert rows[1].images == (data,)
    assert [each.reference for each in rows[0:2]] == [("1",), ("2",)]


def test_sets_as_they_are_published(tmp_path: Path) -> None:
    """COCO captions: one example for each picture. VQA v2: two files, ten answers, pictures by number."""
    toys.picture((30, 20)).save(tmp_path / "COCO_val2014_000000000009.jpg")
    toys.picture((30, 20), 1).save(tmp_path / "COCO_val2014_000000000025.jpg")
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in (9, 25)]
    said = [(9, "a dog"), (25, "a cat"), (9, "one dog")]
    annotations = [{"image_id": image, "id": n, "caption": text} for n, (image, text) in enumerate(said)]
    coco = tmp_path / "captions_val2014.json"
    coco.write_text(json.dumps({"images": images, "annotations": annotations}))
    assert [each.reference for each in Rows(coco, "captions")] == [("a dog", "one dog"), ("a cat",)]
    questions = [{"question_id": n, "image_id": 9, "question": f"Question {n}?"} for n in (1, 2)]
    answers = [{"question_id": n, "image_id": 9, "answers": [{"answer": "x"}] * 10} for n in (2, 1)]
    vqa = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    vqa.write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": answers}))
    first, second = Rows(vqa, "ten_answers")
    assert first.images == second.images == (tmp_path / "COCO_val2014_000000000009.jpg",)
    assert first.cluster == second.cluster
    assert first.reference == ("x",) * 10


def test_a_prompt_stands_around_the_question_and_pictures_in_front() -> None:
    example = Example("1", "What {}?", ("a.png",))
    (message,) = conversation(example, "Look. {}\nShort!").messages
    assert message.parts == (ImagePart(0), TextPart("Look. What {}?\nShort!"))
    (marked,) = conversation(Example("1", "First <image> or <image>?", ("a", "b")), "{}").messages
    assert marked.parts == (
        *(TextPart("First "), ImagePart(0, "in_text"), TextPart(" or "), ImagePart(1, "in_text"), TextPart("?")),
    )
    with pytest.raises(DataError, match=r"example 1: 1 picture\(s\) but 2 <image> mark"):
        conversation(Example("1", "<image><image>", ("a",)), "{}")
    (named,) = conversation(Example("1", "a dog", ("a.png",)), "Where is {}?", name_question=True).messages
    assert named.parts == (ImagePart(0), TextPart("Where is "), NamePart("a dog"), TextPart("?"))


def test_without_its_picture_an_example_stays_in_its_cluster() -> None:
    example = Example("1", "<image>\nWhat?", ("a.png",))
    bare = example.without_pictures()
    assert (bare.question, bare.images, bare.cluster) == ("What?", (), "a.png")
