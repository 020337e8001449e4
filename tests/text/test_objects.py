"""Names and boxes of records, in the words of each family, and conversations written down as records again."""

import random
from typing import Any

import pytest
from PIL import Image

import toys
from opsin import families
from opsin.encode import Encoder
from opsin.errors import MessageError
from opsin.families._chats import PLAIN, QWEN2_VL, V0_TRAIN, V1
from opsin.families._grounding import INTERNVL_BOXES, LLAVA_BOXES, QWEN2_VL_BOXES, QWEN_VL_BOXES
from opsin.spec.grounding import Grounding
from opsin.text.grounding import Box
from opsin.text.messages import (
    BoxPart,
    ControlPart,
    Conversation,
    ImagePart,
    Message,
    NamePart,
    TextPart,
    VideoPart,
    assistant,
    system,
    user,
)
from opsin.text.objects import spell
from opsin.text.parse import parse
from opsin.text.record import to_record
from opsin.text.render import ImageSpan, TextSpan, render
from opsin.text.tokenise import tokenise
from opsin.text.tokenizer import load_tokenizer

RECORD: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "<image><image>Where is <ref-object>?"},
        {"role": "assistant", "content": "<ref-object><bbox> and <bbox>"},
    ],
    "images": ["a.png", "b.png"],
    "objects": {
        "ref": ["a cat", "a cat"],
        "bbox": [[10, 20, 30, 40], [[0, 0, 50, 50], [50, 50, 100, 100]]],
        "image_id": [1, 1],
    },
}


def test_marks_take_names_and_boxes_in_order() -> None:
    first, second = parse(RECORD, where="x").messages
    assert first.parts[2:] == (TextPart("Where is "), NamePart("a cat"), TextPart("?"))
    boxes = [Box.of(10, 20, 30, 40)], [Box.of(0, 0, 50, 50), Box.of(50, 50, 100, 100)]
    assert second.parts == (
        NamePart("a cat"),
        BoxPart(tuple(boxes[0]), 1),
        TextPart(" and "),
        BoxPart(tuple(boxes[1]), 1),
    )


@pytest.mark.parametrize(
    ("grounding", "text"),
    [
        (QWEN_VL_BOXES, "<ref>a cat</ref><box>(100,400),(300,800)</box>"),
        (QWEN2_VL_BOXES, "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(100,400),(300,800)<|box_end|>"),
        (INTERNVL_BOXES, "<ref>a cat</ref><box>[[100, 400, 300, 800]]</box>"),
        (LLAVA_BOXES, "a cat[0.10, 0.45, 0.30, 0.65]"),
    ],
    ids=["qwen-vl", "qwen2-vl", "internvl", "llava"],
)
def test_each_family_writes_boxes_its_own_way(grounding: Grounding, text: str) -> None:
    messages = (assistant(""), Message("assistant", (NamePart("a cat"), BoxPart((Box.of(10, 20, 30, 40),), 0))))
    assert [message.text for message in spell(messages, grounding, lambda index: (100, 50))] == ["", text]


def test_marks_are_control_tokens_where_the_vocabulary_has_them() -> None:
    """Around a box that a record lists; the same marks in what people write stay text."""
    typed = "<|box_start|>(1,2),(3,4)<|box_end|>"
    box = BoxPart((Box.of(10, 20, 30, 40),), 0)
    messages = [user(typed), Message("assistant", (NamePart("a cat"), box))]
    controls = {"<|box_start|>", "<|box_end|>"}
    said = spell(messages, QWEN2_VL_BOXES, lambda index: (100, 50), controls=controls)
    assert said[0] == user(typed)
    named = "<|object_ref_start|>a cat<|object_ref_end|>"
    numbers = TextPart("(100,400),(300,800)")
    marks = ControlPart("<|box_start|>"), ControlPart("<|box_end|>")
    assert said[1].parts == (TextPart(named), marks[0], numbers, marks[1])
    spans = render(QWEN2_VL, said, mode="train")
    taught = [span for span in spans if not isinstance(span, ImageSpan) and span.supervised]
    assert [getattr(span, "token", "") or getattr(span, "text", "") for span in taught] == [
        *(named, "<|box_start|>", "(100,400),(300,800)", "<|box_end|>", "<|im_end|>"),
        *(["\n"] if len(taught) > 5 else []),
    ]


def test_a_mark_inside_a_name_is_refused() -> None:
    with pytest.raises(MessageError, match="the name '<box>' contains a mark of boxes"):
        spell([Message("assistant", (NamePart("<box>"),))], INTERNVL_BOXES, lambda index: (9, 9))


@pytest.mark.parametrize(("folder", "family"), [("qwen", "qwen-vl"), ("qwen2", "qwen2-vl")])
def test_boxes_are_taught_with_the_published_control_tokens(shared: Any, folder: str, family: str) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers" / folder)
    config = families.preset(f"{family}-tiny").config
    box = BoxPart((Box.of(10, 20, 30, 40),), 0)
    messages = [user("Where?"), Message("assistant", (NamePart("a cat"), box))]
    said = spell(messages, config.chat.grounding, lambda index: (100, 50), controls=tokenizer.controls)
    text = tokenise(render(config.chat, said, mode="train"), tokenizer)
    taught = [number for number, is_taught in zip(text.ids, text.supervised, strict=True) if is_taught]
    first = {"qwen": 151851, "qwen2": 151646}[folder]
    assert [number for number in taught if first <= number < first + 4] == [first, first + 1, first + 2, first + 3]


def test_several_boxes_of_one_place_are_written_together() -> None:
    _, second = spell(parse(RECORD, where="x").messages, INTERNVL_BOXES, lambda index: (100, 100))
    assert second.text == (
        "<ref>a cat</ref><box>[[100, 200, 300, 400]]</box> and <box>[[0, 0, 500, 500], [500, 500, 1000, 1000]]</box>"
    )
    assert len(second.parts) == 1


def test_a_box_may_leave_its_picture_by_rounding_only() -> None:
    def write(right: float) -> str:
        message = Message("assistant", (BoxPart((Box.of(10, 20, right, 40),), 0),))
        return spell([message], QWEN_VL_BOXES, lambda index: (100, 50))[0].text

    assert write(100.4) == "<box>(100,400),(999,800)</box>"
    with pytest.raises(MessageError, match="leaves the picture of 100x50 px"):
        write(101.5)


def test_a_model_without_boxes_refuses_them() -> None:
    with pytest.raises(MessageError, match="chat format has no way to write them"):
        spell(parse(RECORD, where="x").messages, None, lambda index: (9, 9))


def test_the_encoder_measures_pictures_as_they_are_shown(tmp_path: Any) -> None:
    """A picture on its side: boxes count from the upright one, which is what the model sees."""
    turned = toys.picture((40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    config = families.preset("llava-1.5-tiny").config
    config = config.replace(chat=config.chat.replace(grounding=QWEN_VL_BOXES))
    tokenizer = toys.byte_tokenizer(tmp_path / "tokenizer")
    conversation = Conversation(
        (user("Where?", images=[0]), Message("assistant", (BoxPart((Box.of(0, 0, 10, 40),), 0),))),
        (str(tmp_path / "a.jpg"),),
    )
    encoded = Encoder(config, tokenizer).encode(conversation, mode="train")
    taught = [span.text for span in encoded.spans if isinstance(span, TextSpan) and span.supervised]
    assert "<box>(0,0),(500,999)</box>" in "".join(taught)
    outside = Conversation(
        (user("Where?", images=[0]), Message("assistant", (BoxPart((Box.of(0, 0, 30, 40),), 0),))),
        (str(tmp_path / "a.jpg"),),
        id="c7",
    )
    with pytest.raises(MessageError, match=r"conversation 'c7': box .* leaves the picture of 20x40 px"):
        Encoder(config, tokenizer).encode(outside, mode="train")


def test_max_pixels_of_a_record_bounds_its_pictures(tmp_path: Any) -> None:
    tokenizer = toys.byte_tokenizer(tmp_path / "tokenizer")
    record = {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
        "images": [toys.picture((280, 280))],
    }
    counts = {}
    for limit in (None, 28 * 28, 10**9):
        conversation = parse({**record, "chat_template_kwargs": {"max_pixels": limit}}, where="x")
        assert conversation.max_pixels == limit
        native = Encoder(families.preset("qwen2-vl-tiny").config, tokenizer)
        counts[limit] = native.prepare_image(conversation, 0)[0].plan.num_slots
        _, notes = Encoder(families.preset("llava-1.5-tiny").config, tokenizer).prepare_image(conversation, 0)
        assert any("does not count" in note for note in notes) == (limit is not None)
    assert counts[10**9] == counts[None] == 4 * counts[28 * 28]
    with pytest.raises(MessageError, match="max_pixels is '9'; a whole number"):
        parse({**record, "chat_template_kwargs": {"max_pixels": "9"}}, where="x")


def test_an_answer_without_loss_is_not_taught() -> None:
    """Nor is a mark of the next question that would end it (V0)."""

    def written(*messages: Message) -> str:
        spans = render(V0_TRAIN.replace(system="S."), messages, mode="train")
        texts = [(span.text, span.supervised) for span in spans if isinstance(span, TextSpan)]
        return "".join(f"*{text}*" if supervised else text for text, supervised in texts).replace("**", "")

    taught = user("Hi"), assistant("Hello.")
    untaught = user("Bye"), Message("assistant", (TextPart("Bye."),), loss=False)
    assert written(*taught, *untaught) == (
        "S.\n\n*###* Human: Hi\n*### Assistant: Hello.\n###* Human: Bye\n### Assistant: Bye.\n### "
    )
    assert written(*untaught, *taught) == (
        "S.\n\n*###* Human: Bye\n### Assistant: Bye.\n### Human: Hi\n*### Assistant: Hello.\n### *"
    )
    for chat in (V1, PLAIN, QWEN2_VL):
        spans = render(chat, untaught, mode="train")
        assert not any(span.supervised for span in spans if not isinstance(span, ImageSpan))


def test_written_down_a_record_is_read_as_the_same_conversation() -> None:
    plain = parse(RECORD, where="x")
    assert to_record(plain) == {**RECORD, "objects": {**RECORD["objects"], "bbox_type": "real"}}
    shown = {
        "id": "7",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is <image> a mark?"}]},
            {"role": "assistant", "content": "Yes.", "loss": False},
            {"role": "user", "content": "<video>And now?"},
            {"role": "assistant", "content": "No."},
        ],
        "images": ["a.png"],
        "videos": [("1.png", "2.png")],
        "chat_template_kwargs": {"max_pixels": 999},
    }
    assert to_record(parse(shown, where="x")) == shown
    named = to_record(parse(shown, where="x"), place=lambda source: len(source))  # type: ignore[arg-type]
    assert (named["images"], named["videos"]) == ([5], [2])


def test_texts_that_hold_marks_of_objects_cannot_be_written() -> None:
    conversation = Conversation((user("What is <bbox>?", images=[0]), Message("assistant", (NamePart("x"),))), ("a",))
    with pytest.raises(MessageError, match="a text holds <ref-object> or <bbox>"):
        to_record(conversation)
    mixed = (BoxPart((Box.of(0, 0, 1, 1),), 0), BoxPart((Box.of(0, 0, 1, 1, "unit"),), 0))
    with pytest.raises(MessageError, match="boxes in pixels, unit"):
        to_record(Conversation((user("", images=[0]), Message("assistant", mixed)), ("a",)))


def test_any_conversation_survives_being_written_down() -> None:
    draw = random.Random(0)
    texts = ["", "Hi", "<image>", "a <video> b", "\n", "é<imag"]
    for number in range(300):
        num_images, num_videos = draw.randrange(3), draw.randrange(2)
        unshown: list[Any] = [ImagePart(i, draw.choice(("beside", "in_text"))) for i in range(num_images)]
        unshown += [VideoPart(i, draw.choice(("beside", "in_text"))) for i in range(num_videos)]
        messages = [system(draw.choice(texts))] if draw.random() < 0.3 else []
        while unshown or not messages:
            parts: list[Any] = []
            for _ in range(draw.randrange(4)):
                parts.append(TextPart(draw.choice(texts[1:])))
                if unshown and draw.random() < 0.5:
                    parts.append(unshown.pop(0))
                if num_images and draw.random() < 0.2:
                    parts += [
                        NamePart("cat"),
                        BoxPart((Box.of(1, 2, 3, 4 + draw.random()),), draw.randrange(num_images)),
                    ]
            messages.append(Message("user", tuple(parts)))
            messages.append(Message("assistant", (TextPart("A."),), draw.random() < 0.7))
        conversation = Conversation(
            tuple(messages),
            tuple(f"{i}.png" for i in range(num_images)),
            str(number) if number % 2 else "",
            tuple(f"{i}.mp4" for i in range(num_videos)),
        )
        again = parse(to_record(conversation), where="x")
        assert again == conversation
        standings = [[getattr(part, "standing", "") for part in message.parts] for message in conversation.messages]
        assert standings == [[getattr(part, "standing", "") for part in message.parts] for message in again.messages]
