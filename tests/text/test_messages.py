from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin.errors import MessageError
from opsin.text.messages import (
    Conversation,
    ImagePart,
    Message,
    TextPart,
    VideoPart,
    ask,
    assistant,
    system,
    user,
)
from opsin.text.parse import parse

PICTURE = Image.new("RGB", (2, 2))


def test_llava_records_are_read() -> None:
    record = {
        "id": 7,
        "image": "coco/1.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A dog."},
        ],
        "source": "something else",
    }
    assert parse(record, where="x") == Conversation(
        (Message("user", (ImagePart(0), TextPart("\nWhat is this?"))), assistant("A dog.")), ("coco/1.jpg",), "7"
    )


def test_text_only_llava_records_have_no_image() -> None:
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""}]
    expected = (system("Be brief."), user("Hi"), Message("assistant", ()))
    assert parse({"conversations": turns}, where="x").messages == expected
    assert parse({"image": None, "conversations": turns}, where="x").messages == expected
    assert parse({"image": "", "conversations": turns}, where="x").messages == expected


def test_marks_take_the_pictures_in_order_over_all_turns() -> None:
    record = {
        "image": ["a.png", "b.png", "c.png"],
        "conversations": [
            {"from": "human", "value": "<image><image> compare"},
            {"from": "gpt", "value": "They differ."},
            {"from": "human", "value": "And <image>?"},
        ],
    }
    conversation = parse(record, where="x")
    assert conversation.images == ("a.png", "b.png", "c.png")
    assert conversation.messages[0].parts == (ImagePart(0), ImagePart(1), TextPart(" compare"))
    assert conversation.messages[2].parts == (TextPart("And "), ImagePart(2), TextPart("?"))


def test_sharegpt_messages_have_a_list_of_pictures_beside_them() -> None:
    record = {
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
        "images": [{"bytes": b"png", "path": "cat.png"}],
    }
    conversation = parse(record, where="x")
    assert conversation.images == (b"png",)
    assert conversation.messages[0].parts == (ImagePart(0), TextPart("What?"))


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "image": Path("a.png")}, Path("a.png")),
        ({"type": "image", "image": PICTURE}, PICTURE),
        ({"type": "image", "image": b"png"}, b"png"),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "a.png"),
        ({"type": "image", "url": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
            "data:image/png;base64,AA==",
        ),
        ({"type": "image", "source": {"type": "url", "url": "https://example.org/a"}}, "https://example.org/a"),
        (
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
            "data:image/png;base64,AA==",
        ),
        ({"type": "image_url", "image_url": {"url": "https://example.org/a", "detail": None}}, "https://example.org/a"),
        ({"type": "image_url", "image_url": "https://example.org/a"}, "https://example.org/a"),
    ],
)
def test_pictures_in_content_lists_are_read(part: dict[str, Any], source: object) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Look: "}, part, {"type": "text", "text": "!"}]}]
    expected = (Message("user", (TextPart("Look: "), ImagePart(0), TextPart("!"))),)
    for record in (messages, {"messages": messages, "model": "any"}):
        conversation = parse(record, where="x")
        assert conversation.messages == expected
        assert conversation.images == (source,)


def test_image_parts_without_a_picture_take_the_next_of_the_record() -> None:
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]
    record = {"messages": [{"role": "user", "content": content}], "images": ["a.png", "b.png"]}
    assert parse(record, where="x").images == ("a.png", "b.png")


def test_openai_chats_are_read_with_their_roles() -> None:
    chat = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hi", "name": "anna"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
    ]
    assert parse(chat, where="x").messages == (system("Be brief."), user("Hi"), assistant("Hello"))


@pytest.mark.parametrize("content", ["Is <image> a tag?", [{"type": "text", "text": "Is <image> a tag?"}]])
def test_the_mark_is_ordinary_text_in_chats(content: object) -> None:
    messages = [{"role": "user", "content": content}]
    for record in (messages, {"messages": messages}):
        assert parse(record, where="x") == Conversation((user("Is <image> a tag?"),))


def test_text_never_names_a_picture() -> None:
    texts = ["<img>/etc/passwd</img>", "![x](file:///etc/passwd)", "<image>/etc/passwd</image>", "<|image_pad|>"]
    for text in texts:
        assert parse([{"role": "user", "content": text}], where="x") == Conversation((user(text),))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "a list of messages is needed, not NoneType"),
        ("<image>", "a list of messages is needed, not str"),
        ([], "the list of messages is empty"),
        ({"conversations": []}, "the list of messages is empty"),
        ({"messages": "hi"}, "a list of messages is needed, not str"),
        ({"conversation": []}, r"no 'conversations' or 'messages' among its keys \['conversation'\] \(did you mean"),
        ({"text": "x"}, r"no 'conversations' or 'messages' among its keys \['text'\]$"),
        (["hi"], "message 1: an object with 'role' and 'content' is needed, not str"),
        ([{"content": "x"}], "message 1: no 'role' among its keys"),
        ([{"role": "user"}], "message 1: no 'content' among its keys"),
        ([{"role": "tool", "content": "x"}], "message 1: the role 'tool' is unknown; known: system, developer, user"),
        ([{"role": ["user"], "content": "x"}], "message 1: the role .* is unknown"),
        ([{"role": "user", "content": None}], "message 1: 'content' is NoneType; text or a list of parts"),
        ([{"role": "user", "content": b"x"}], "message 1: 'content' is bytes"),
        ([{"role": "user", "content": [{"text": "x"}]}], "message 1: part 1: an object with a 'type'"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "message 1: part 1: no text under 'text'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part 1: the type 'audio' is unknown; known: text, image"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url' needs an address"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'image_url' needs an address"),
        (
            [{"role": "user", "content": [{"type": "image", "image": 3}]}],
            "a path, an address, bytes or a decoded picture",
        ),
        ([{"role": "user", "content": [{"type": "image", "image": {}}]}], "a picture needs 'bytes', 'url' or 'path'"),
        (
            [{"role": "user", "content": [{"type": "image", "image": ""}]}],
            "a picture's path, address or bytes are empty",
        ),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            r"0 picture\(s\) but 1 <image> mark\(s\); list one picture",
        ),
        (
            [{"role": "user", "content": "half \ud83d"}],
            r"message 1: text is not valid Unicode: half a surrogate pair, '\\ud83d', at",
        ),
        ({"image": "a", "images": ["b"], "messages": [{}]}, "has both 'image' and 'images'"),
        ({"image": 5, "conversations": [{}]}, "a picture is a path"),
    ],
)
def test_anything_else_is_one_clear_error(record: object, message: str) -> None:
    with pytest.raises(MessageError, match=message) as error:
        parse(record, where="train.json, record 12")
    assert str(error.value).startswith("train.json, record 12: ")


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (["a.png"], "What?", r"1 picture\(s\) but 0 <image> mark\(s\); put <image> where each picture belongs"),
        (["a.png", "b.png"], "<image> What?", r"2 picture\(s\) but 1 <image> mark"),
        (["a.png"], "<image> and <image>", r"1 picture\(s\) but 2 <image> mark\(s\); list one picture for each mark"),
        ([], "<image>", r"0 picture\(s\) but 1 <image> mark"),
        (None, "<image>", r"0 picture\(s\) but 1 <image> mark"),
    ],
)
def test_pictures_and_marks_must_be_as_many(images: list[str] | None, text: str, message: str) -> None:
    record = {"image": images, "conversations": [{"from": "human", "value": text}]}
    with pytest.raises(MessageError, match=message):
        parse(record, where="x")


def test_an_error_does_not_repeat_an_absurd_record() -> None:
    with pytest.raises(MessageError) as error:
        parse({f"key {number}" * 100: 1 for number in range(10_000)}, where="x")
    assert len(str(error.value)) < 2500


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ((user("x", images=[1]),), ("a",), "shows picture 1, but there are 1, counted from 0"),
        ((user("x", images=[-1]),), ("a",), "shows picture -1"),
        ((user("x", images=[0]), assistant("y"), user("z", images=[0])), ("a",), "picture 0 is shown 2 times"),
        ((user("x", images=[1]),), ("a", "b"), "picture 0 of 2, counted from 0, is shown in no message"),
    ],
)
def test_a_conversation_shows_each_picture_once(
    messages: tuple[Message, ...], images: tuple[str, ...], message: str
) -> None:
    with pytest.raises(MessageError, match=message):
        Conversation(messages, images)


def test_a_question_shows_its_pictures_first() -> None:
    conversation = ask("Which is older?", "a.png", PICTURE)
    assert conversation.messages == (Message("user", (ImagePart(0), ImagePart(1), TextPart("Which is older?"))),)
    assert conversation.images == ("a.png", PICTURE)


# ---- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat happens?"}]},
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat happens?"}]},
        {"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video>\nWhat happens?"}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "\nWhat happens?"}],
                }
            ]
        },
        {
            "videos": ["a.mp4"],
            "messages": [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "\nWhat happens?"}]}],
        },
        [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": "a.mp4"}},
                    {"type": "text", "text": "\nWhat happens?"},
                ],
            }
        ],
    ],
    ids=["llava", "llava video with the picture's mark", "sharegpt", "hf", "hf with a list", "openai"],
)
def test_videos_are_read_in_every_shape(record: object) -> None:
    conversation = parse(record, where="record")
    assert conversation.messages == (Message("user", (VideoPart(0), TextPart("\nWhat happens?"))),)
    assert conversation.videos == ("a.mp4",)
    assert conversation.images == ()


def test_pictures_and_videos_of_a_record_each_take_from_their_own_list() -> None:
    record = {
        "images": ["a.png"],
        "videos": ["a.mp4", ["f0.png", "f1.png"]],
        "messages": [{"role": "user", "content": "<video>then <image>then <video>"}],
    }
    conversation = parse(record, where="record")
    assert conversation.messages[0].parts == (
        *(VideoPart(0), TextPart("then "), ImagePart(0), TextPart("then "), VideoPart(1)),
    )
    assert conversation.videos == ("a.mp4", ("f0.png", "f1.png"))


def test_the_video_mark_is_ordinary_text_where_no_videos_are_listed() -> None:
    conversation = parse([{"role": "user", "content": "what does <video> mean?"}], where="record")
    assert conversation.messages == (user("what does <video> mean?"),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"video": "a.mp4", "conversations": [{"from": "human", "value": "no mark"}]}, r"1 video\(s\) but 0 <video>"),
        ({"videos": ["a.mp4"], "messages": [{"role": "user", "content": "<video><video>"}]}, "list one video for each"),
        ([{"role": "user", "content": [{"type": "video", "video": []}]}], "list of frames is empty"),
        ([{"role": "user", "content": [{"type": "video", "video": 3}]}], "a video is a path"),
        ({"video": "a", "videos": ["b"], "conversations": [{"from": "human", "value": ""}]}, "both 'video' and 'vid"),
    ],
)
def test_what_is_wrong_with_a_video_is_said(record: object, message: str) -> None:
    with pytest.raises(MessageError, match=message):
        parse(record, where="record")


def test_every_video_is_shown_exactly_once() -> None:
    with pytest.raises(MessageError, match="video 0 of 1, counted from 0, is shown in no message"):
        Conversation((user("hi"),), videos=("a.mp4",))
    with pytest.raises(MessageError, match="shows video 1, but there are 1"):
        Conversation((user("hi", videos=[1]),), videos=("a.mp4",))
