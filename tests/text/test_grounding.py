"""Boxes: spaces, the four formats there and back, and answers that cannot be read."""

import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opsin import families
from opsin.errors import MessageError
from opsin.families._grounding import INTERNVL_BOXES, LLAVA_BOXES, QWEN2_VL_BOXES, QWEN_VL_BOXES
from opsin.text.grounding import Box, from_square, read, spell, to_square, write
from opsin.text.tokenizer import load_tokenizer
from toys import byte_tokenizer

FORMATS = {"qwen": QWEN_VL_BOXES, "qwen2": QWEN2_VL_BOXES, "internvl": INTERNVL_BOXES, "llava": LLAVA_BOXES}
SIZE = (640, 480)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen", "<ref>a cat</ref><box>(100,250),(500,999)</box>"),
        ("qwen2", "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(100,250),(500,999)<|box_end|>"),
        ("internvl", "<ref>a cat</ref><box>[[100, 250, 500, 1000]]</box>"),
        # 120 of 480 px are 200 of the square of 640, which has 80 px of padding above the picture.
        ("llava", "[0.10, 0.31, 0.50, 0.88]"),
    ],
)
def test_a_box_is_written_as_each_family_writes_it(name, text):
    assert write([Box.of(64, 120, 320, 480, label="a cat")], FORMATS[name], SIZE) == text


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_again_within_a_step(name):
    draw = random.Random(name)
    for _ in range(300):
        size = (draw.randint(1, 3000), draw.randint(1, 3000))
        boxes = []
        for _ in range(draw.randint(1, 3)):
            (left, right), (top, bottom) = (sorted(draw.uniform(0, side) for _ in "ab") for side in size)
            boxes.append(Box.of(left, top, right, bottom))
        if FORMATS[name].quad:
            boxes.append(Box(tuple((draw.uniform(0, size[0]), draw.uniform(0, size[1])) for _ in range(4))))
        label = "" if name == "llava" else draw.choice(["", "a cat", "猫 (left), [2]"])
        found = read(f"Here: {write(boxes, FORMATS[name], size, label=label)}.", FORMATS[name], size)
        if name == "llava" and found.unread:  # a sliver of less than a step at the edge
            assert all("padding" in each for each in found.unread)
            continue
        assert not found.unread
        assert [each.label for each in found.boxes] == [label] * len(boxes)
        # Half a step of rounding; a whole one at the far edge, where half-open formats stop at 999.
        step = 0.00501 * max(size) if name == "llava" else 0.00101 * max(size)
        for box, again in zip(boxes, found.boxes, strict=True):
            for before, after in zip(box.points, again.points, strict=True):
                assert before == pytest.approx(after, abs=step)


def test_spaces_convert_there_and_back():
    draw = random.Random(0)
    spaces = ("pixels", "unit", "per_1000", "per_999")
    for _ in range(200):
        size = (draw.randint(1, 5000), draw.randint(1, 5000))
        (left, right), (top, bottom) = (sorted(draw.choice([0, draw.random(), 1]) for _ in "ab") for _ in "xy")
        box = Box.of(left, top, right, bottom, "unit")
        for space in spaces:
            assert box.to(space, size).to("unit", size).sides == pytest.approx(box.sides)
        pixels = box.to("pixels", size)
        assert from_square(to_square(pixels, size), size).sides == pytest.approx(pixels.sides)


@pytest.mark.parametrize(
    ("sides", "space", "word"),
    [
        ((0, 0, 1001, 5), "per_1000", "outside 0 to 1000"),
        ((0, 0, 1000, 5), "per_999", "outside 0 to 999"),
        ((-1, 0, 5, 5), "pixels", "outside"),
        ((5, 0, 1, 5), "pixels", "reversed"),
        ((0, math.nan, 1, 1), "unit", "finite"),
        ((0, 0, math.inf, 1), "pixels", "finite"),
    ],
)
def test_a_box_without_sense_is_one_clear_error(sides, space, word):
    with pytest.raises(MessageError, match=word):
        Box.of(*sides, space)


def test_a_box_outside_its_picture_is_an_error():
    with pytest.raises(MessageError, match="leaves the picture of 640x480"):
        write([Box.of(0, 0, 641, 5)], QWEN_VL_BOXES, SIZE)
    with pytest.raises(MessageError, match="mark '</ref>'"):
        write([Box.of(0, 0, 1, 5)], QWEN_VL_BOXES, SIZE, label="a</ref>b")
    with pytest.raises(MessageError, match="rectangles only"):
        write([Box(((0, 0), (1, 0), (1, 1), (0, 1)))], INTERNVL_BOXES, SIZE)


@pytest.mark.parametrize(
    ("name", "text", "boxes", "unread"),
    [
        ("qwen", "no box", 0, 0),
        ("qwen", "<box>(1,2),(3", 0, 1),
        ("qwen", "<box>(1,2)</box>", 0, 1),
        ("qwen", "<box>(9,2),(3,4)</box><box>(1,2),(3,4)</box>", 1, 1),
        ("qwen", "<box>(1,2),(3,4000)</box>", 0, 1),
        ("qwen", "(1,2),(3,4)</box>", 0, 1),
        ("qwen", "<ref>a<box>(1,2),(3,4)</box>", 1, 1),
        ("internvl", "<box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>", 2, 0),
        ("internvl", "<box>[1,2,3,4]</box>", 1, 0),
        ("internvl", "<box>[[1, 2, 3], [5, 6, 7, 8]]</box>", 0, 1),
        ("internvl", "<box>[[1, 2, 3, 4]</box>", 0, 1),
        ("internvl", "<box>[1, 2, 3, 4] (or so)</box>", 0, 1),
        ("llava", "see [note] and [0.1, 0.3, 0.5, 0.6]", 1, 0),
        ("llava", "[0.1, 0.2, 0.5]", 0, 1),
        ("llava", "[0.1, 0.2, 0.5, 0", 0, 1),
        ("llava", "[0.1, 0.0, 0.5, 0.05]", 0, 1),  # padding alone
        ("llava", "[10, 20, 50, 60]", 0, 1),
        ("llava", "[nan, 0.2, 0.5, 0.6]", 0, 1),
    ],
)
def test_what_cannot_be_read_is_reported(name, text, boxes, unread):
    found = read(text, FORMATS[name], SIZE)
    assert (len(found.boxes), len(found.unread)) == (boxes, unread), found


@pytest.mark.parametrize("name", FORMATS)
def test_no_answer_makes_the_reader_fail(name):
    draw = random.Random(name)
    alphabet = [*FORMATS[name].marks, *"[](),. 0159-", "nan", "1e9", "猫", "9" * 400]
    for _ in range(2000):
        read("".join(draw.choices(alphabet, k=draw.randint(0, 40))), FORMATS[name], SIZE)


def test_marks_that_are_control_tokens_are_spelt(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    grounding = QWEN_VL_BOXES.replace(box=("<im_start>", "<im_end>"))
    ids = [
        tokenizer.control_id("<im_start>"),
        *tokenizer.encode("(1,2),(3,4)", "after_control").ids,
        tokenizer.control_id("<im_end>"),
        tokenizer.control_id("</s>"),
    ]
    assert spell(ids, tokenizer, grounding) == "<im_start>(1,2),(3,4)<im_end>"


def test_marks_of_qwen2_come_back_from_its_own_tokens(shared):
    folder = shared / "tokenizers" / "qwen2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    tokenizer = load_tokenizer(folder)
    text = write([Box.of(64, 120, 320, 480)], QWEN2_VL_BOXES, SIZE, label="猫")
    pieces = re.split(r"(<\|\w+\|>)", text)
    ids = [
        token
        for piece in pieces
        for token in (
            [tokenizer.controls[piece]] if piece in tokenizer.controls else tokenizer.encode(piece, "after_control").ids
        )
    ]
    assert "<" not in tokenizer.decode(ids)
    assert spell(ids, tokenizer, QWEN2_VL_BOXES) == text


def test_presets_say_how_they_write_boxes():
    for preset, form in (("qwen2-vl-2b-instruct", QWEN2_VL_BOXES), ("llava-1.5-7b", LLAVA_BOXES)):
        assert families.preset(preset).config.chat.grounding == form


def test_the_example_of_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs/grounding.md").read_text()
    example = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    printed = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True).stdout
    printed = printed.splitlines()
    assert printed[0].startswith("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,250),(500,999)<|box_end|>")
    assert printed[1].startswith("[0.10, 0.31, 0.50, 0.88] (64.0, ")
    assert printed[2] == "(100.0, 250.0, 500.0, 1000.0)"
