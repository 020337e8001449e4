"""Every shape of docs/data.md is read as it says: the examples of that page, and what they become."""

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.containers import png, write_json, write_tar
from opsin.data.files import DatasetSource, FileSource
from opsin.data.shapes import Shaper
from opsin.errors import DataError, MessageError
from opsin.families._grounding import INTERNVL_BOXES, QWEN_VL_BOXES
from opsin.text.grounding import Box
from opsin.text.messages import BoxPart, Conversation, ImagePart, NamePart, VideoPart
from opsin.text.objects import spell
from opsin.text.parse import read
from opsin.text.record import to_record

PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
EXAMPLES: dict[str, Any] = {
    name: json.loads(text)
    for name, text in re.findall(r"^\*\*([^*]+)\*\*(?:(?!^\*\*)[\s\S])*?^```json\n(.*)\n```", PAGE, re.MULTILINE)
}
"""The examples of the page by the name that stands before each."""


def told(conversation: Conversation) -> list[str]:
    """Messages as short texts: {0} a picture in the text, [0] one beside it, <name>, and boxes by number."""
    lines = []
    for message in conversation.messages:
        text = ""
        for part in message.parts:
            if isinstance(part, ImagePart | VideoPart):
                text += f"{{{part.index}}}" if part.standing == "in_text" else f"[{part.index}]"
            elif isinstance(part, NamePart):
                text += f"<{part.text}>"
            elif isinstance(part, BoxPart):
                text += "".join(f"({', '.join(f'{side:g}' for side in box.sides)} {box.space})" for box in part.boxes)
            else:
                text += part.text
        lines.append(f"{message.role[0]}: {text}")
    return lines


EXPECTED = {
    "LLaVA.": ["u: {0}\nWhat is it?", "a: A cat."],
    "Messages with lists of media": ["u: {0}{1}Which is darker?", "a: The first."],
    "Content lists": ["u: [0]What is it?", "a: A cat."],
    "OpenAI": ["u: What is it?[0]", "a: A cat."],
    "Cauldron, FineVision": ["u: [0]What is it?", "a: A cat.", "u: Sure?", "a: Yes."],
    "Captions": ["u: [0]", "a: a cat"],
    "VQA rows.": ["u: [0]How many?", "a: two"],
    "Choices": [
        "u: [0]Which is soft?\nContext: N/A\nOptions: (A) stone (B) wool",
        "a: Things differ. Wool bends. The answer is B.",
    ],
    "Expressions and boxes": [
        "u: [0]Please provide the bounding box coordinate of the region this sentence describes: <the cat>",
        "a: (3, 4, 13, 12 pixels)",
    ],
    "Qwen-VL's texts": [
        "u: Picture 1: {0}\nWhere is <the cat>?",
        "a: <the cat>(0.1, 0.2, 0.433, 0.6 unit)",
    ],
    "InternVL's texts": [
        "u: {0}\nWhere are <cats>?",
        "a: <cats>(0.1, 0.2, 0.433, 0.6 unit)(0.5, 0, 1, 0.9 unit)",
    ],
    "Objects": ["u: {0}Where is <the cat>?", "a: (3, 4, 13, 12 pixels)"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(png(seed))
    return tmp_path


def test_the_page_has_an_example_of_every_shape() -> None:
    assert EXAMPLES.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("container", ["json", "jsonl", "parquet", "tar", "rows"])
def test_examples_of_the_page_are_read_as_they_say(folder: Path, name: str, container: str) -> None:
    record = EXAMPLES[name]
    pictures = [folder / "a.png", folder / "b.png"][: 2 if name.startswith("Messages") else 1]
    if container == "tar":
        source = FileSource(write_tar(folder / "x.tar", {"1.json": record}))
    elif container == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        if name == "OpenAI":  # a column has one type: makers of tables write messages of mixed types as text
            record = {**record, "messages": json.dumps(record["messages"])}
        parquet.write_table(arrow.Table.from_pylist([record, record]), folder / "x.parquet")
        source = FileSource(folder / "x.parquet")
        assert told(source.sample(1, 0)) == EXPECTED[name]
    elif container == "rows":
        source = DatasetSource([record], image_root=folder)
    else:
        source = FileSource(write_json(folder / f"x.{container}", [record]))
    conversation = source.sample(0, 0)
    assert told(conversation) == EXPECTED[name]
    assert list(conversation.images) == pictures
    assert list(source.problems()) == []
    assert source.modality_lengths(0)[0] > 0


def test_one_file_may_mix_shapes_pictures_text_and_videos(folder: Path) -> None:
    (folder / "clip.mp4").write_bytes(b"not decoded here")
    text = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    video = {
        **text,
        "video": "clip.mp4",
        "conversations": [{"from": "human", "value": "<video>Hi"}, *text["conversations"][1:]],
    }
    source = FileSource(write_json(folder / "x.json", [*EXAMPLES.values(), text, video]))
    assert [told(source.sample(index, 0)) for index in range(len(EXPECTED))] == list(EXPECTED.values())
    assert told(source.sample(len(EXPECTED), 0)) == ["u: Hi", "a: Hello."]
    assert source.sample(len(EXPECTED) + 1, 0).videos == (folder / "clip.mp4",)
    signs = [length > 0 for length in source.modality_lengths(0)]
    assert signs == [True] * len(EXPECTED) + [False, True]


def test_each_epoch_takes_the_next_of_several_captions(folder: Path) -> None:
    source = FileSource(write_json(folder / "x.json", [EXAMPLES["Captions"]]))
    assert [source.sample(0, epoch).messages[1].text for epoch in range(3)] == ["a cat", "a small cat", "a cat"]


def test_prompts_and_columns_are_the_files_own(folder: Path) -> None:
    def read(record: dict[str, Any], **options: Any) -> list[str]:
        return told(FileSource(write_json(folder / "x.json", [record]), shaper=Shaper(**options)).sample(0, 0))

    short = "{}\nAnswer shortly."
    assert read(EXAMPLES["VQA rows."], prompt=short)[0] == "u: [0]How many?\nAnswer shortly."
    assert read(EXAMPLES["Captions"], prompt="Describe it.")[0] == "u: [0]Describe it."
    assert read(EXAMPLES["Expressions and boxes"], prompt="Find {}.")[0] == "u: [0]Find <the cat>."
    renamed = {"title": "a cat", "photo": "a.png", "caption": "ignored"}
    assert read(renamed, columns={"caption": "title", "image": "photo"}) == ["u: [0]", "a: a cat"]
    corners = {"image": "a.png", "expression": "the cat", "bbox": [3, 4, 13, 12]}
    assert read(corners, box="xyxy")[1] == "a: (3, 4, 13, 12 pixels)"


@pytest.mark.parametrize(
    "record",
    [
        {"query": "Add.\n1 and 2", "response": "3"},
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "history": []},
        {"question": "Add.\n1 and 2", "answers": [{"answer": "3"}, {"answer": "4"}, {"answer": "3"}]},
    ],
)
def test_questions_have_other_names_too(folder: Path, record: dict[str, Any]) -> None:
    assert told(FileSource(write_json(folder / "x.json", [record])).sample(0, 0)) == ["u: Add.\n1 and 2", "a: 3"]


def test_text_that_only_looks_like_boxes_stays_text(folder: Path) -> None:
    said = "In HTML <ref>a</ref> and <box>x</box> are no tags, and <img> stands alone."
    record = {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "Yes."}]}
    assert told(FileSource(write_json(folder / "x.json", [record])).sample(0, 0))[0] == f"u: {said}"


@pytest.mark.parametrize("name", ["Qwen-VL's texts", "InternVL's texts"])
def test_boxes_in_texts_come_back_to_the_digit_for_their_own_family(name: str) -> None:
    grounding, form, last = (
        (QWEN_VL_BOXES, "<ref>it</ref><box>({0},{0}),({1},{1})</box>", 999)
        if name.startswith("Qwen")
        else (INTERNVL_BOXES, "<ref>it</ref><box>[[{0}, {0}, {1}, {1}]]</box>", 1000)
    )
    for number in range(last + 1):
        text = form.format(number, last)
        turns = [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": text}]
        messages = read(Shaper().shape({"messages": turns, "images": ["a.png"]})).messages
        assert spell(messages, grounding, lambda index: (641, 427))[1].text == text


def test_quadrilaterals_of_qwen_vl_are_read(folder: Path) -> None:
    text = "<ref>SALE</ref><quad>(0,0),(500,0),(500,250),(0,250)</quad>"
    turns = [{"from": "user", "value": "<img>a.png</img>OCR"}, {"from": "assistant", "value": text}]
    part = FileSource(write_json(folder / "x.json", [{"conversations": turns}])).sample(0, 0).messages[1].parts[1]
    assert part == BoxPart((Box(((0, 0), (0.5, 0), (0.5, 0.25), (0, 0.25)), "unit"),), 0)


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"image": "a.png", "captoin": "x"}, "shape", r"no known shape .*\(did you mean 'caption'"),
        ({"image": "a.png", "caption": None}, "caption", "a picture without a caption"),
        ({"image": None, "caption": "x"}, "picture", "a caption without a picture"),
        ({"image": "a.png", "question": "x"}, "answer", "a question without an answer"),
        ({"query": "x", "response": "y", "history": [["a", "b"]]}, "turns", "write all turns as 'messages'"),
        ({"image": "a.png", "question": "x", "answers": []}, "answer", "'answers' is empty"),
        ({"image": "a.png", "question": "x", "choices": ["a"], "answer": 1}, "answer", "one of 1 choices"),
        ({"image": "a.png", "ref": "x", "bbox": [1, 2, 3]}, "box", "four numbers are needed"),
        ({"image": "a.png", "ref": "x", "bbox": [5, 5, 28, 9], "width": 30, "height": 20}, "box", "set `box: xyxy`"),
        ({"images": ["a.png"], "texts": [{"user": "x"}]}, "turn", "turn 1 of 'texts' has no text under 'assistant'"),
        ({"messages": "[{"}, "json", "'messages' is a text that is not JSON"),
        ({**EXAMPLES["Objects"], "objects": {"ref": ["x"], "bbox": []}}, "marks", "list 0 bbox but the texts have 1"),
        ({**EXAMPLES["Objects"], "objects": {"ref": ["x"], "bbox": [[1, 2]]}}, "box", "bbox 1: 2 numbers"),
        ({**EXAMPLES["Objects"], "objects": {"ref": ["x"], "bbox": [[9, 9, 1, 1]]}}, "box", "corners are reversed"),
        (
            {**EXAMPLES["Objects"], "objects": {"ref": ["x"], "bbox": [[1, 2, 3, 4]], "image_id": [1]}},
            "objects",
            "a box is on picture 1",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "loss": True}, {"role": "assistant", "content": "y"}]},
            "loss",
            "only answers of the assistant's can be taught",
        ),
    ],
)
def test_what_is_wrong_with_a_record_is_told_with_its_kind(
    folder: Path, record: dict[str, Any], kind: str, message: str
) -> None:
    path = write_json(folder / "x.jsonl", [EXAMPLES["LLaVA."], record])
    with pytest.raises(DataError, match=rf"x.jsonl record 2 \(line 2\): .*{message}"):
        FileSource(path)
    source = FileSource(path, on_bad="keep")
    assert [problem.kind for problem in source.problems()] == [kind]
    assert list(source.bad) == [1]
    assert source.bad[1].where == source.where(1) == f"{path} record 2 (line 2)"
    with pytest.raises(DataError, match=message):
        source.sample(1, 0)


JUNK: list[Any] = [
    *(None, 1, -1, 1.5, float("inf"), True, "", "x", "<image>", "<bbox>", "<ref-object>", "\ud800", b"", b"x"),
    *([], {}, [None], [[]], [{}], {"a": 1}, [1, 2, 3, 4], [9, 9, 1, 1], ["a", "b"], "<img>a</img>"),
    *("<box>[[1, 2, 3, 4]]</box>", "<ref>a</ref><box>(1,2),(3,4)</box>"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*path, key)
        yield from places(each, (*path, key))


def test_whatever_a_record_holds_it_is_read_or_refused() -> None:
    """What is read survives being written down, what is refused is refused with its kind; nothing else is raised."""
    draw = random.Random(0)
    read_well, kinds, unwritten = 0, set(), set()
    for _ in range(4000):
        record = copy.deepcopy(draw.choice(list(EXAMPLES.values())))
        for _ in range(draw.randrange(1, 4)):
            *way, last = draw.choice(list(places(record)) or [("id",)])
            owner = record
            for key in way:
                owner = owner[key]
            if draw.random() < 0.2 and last in (owner if isinstance(owner, dict) else range(len(owner))):
                del owner[last]
            else:
                owner[last] = copy.deepcopy(draw.choice(JUNK))
        try:
            conversation = read(Shaper().shape(record))
        except MessageError as error:
            kinds.add(error.kind)
            continue
        read_well += 1
        try:
            record = to_record(conversation)
        except MessageError as error:
            unwritten.add(error.kind)
            continue
        assert read(record) == conversation
    assert 200 < read_well < 2000
    assert "" not in kinds
    assert unwritten <= {"marks"}


def test_published_files_are_read_as_they_are(shared: Path) -> None:
    """Captions of photos and of aerial pictures, and the demonstration sets of LLaMA-Factory (without their media)."""
    for name, length in (("coco_small/annotations", 363), ("ucm_captions/captions", 2100)):
        source = FileSource(shared / "data" / f"{name}.jsonl")
        assert len(source) == length
        first = source.sample(0, 0)
        assert told(first)[0] == "u: [0]"
        assert first.messages[1].text != source.sample(0, 1).messages[1].text
    for name, kind in (("mllm_demo", "picture_missing"), ("mllm_video_demo", "video_missing")):
        source = FileSource(shared / "data/ref_demo_images" / f"llamafactory_{name}.json", on_bad="keep")
        assert {problem.kind for problem in source.problems()} == {kind}
