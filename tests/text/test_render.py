import random

import pytest

from opsin.errors import MessageError
from opsin.families._chats import (
    CHATML_DIRECT,
    CHATS,
    LLAVA_LLAMA_2,
    LLAVA_V0,
    MISTRAL_INSTRUCT,
    PLAIN,
    QWEN2_VL,
    QWEN2_VL_BASE,
    QWEN2_VL_NUMBERED,
    V0,
    V0_TRAIN,
    V1,
    V1_MMTAG,
    with_start_end,
)
from opsin.spec.chat import ChatFormat, ImageMarkup
from opsin.text.messages import ImagePart, Message, TextPart, VideoPart, assistant, system, user
from opsin.text.render import ControlSpan, ImageSpan, Mode, Span, TextSpan, render

INLINE_V1 = V1.replace(markup=ImageMarkup(placement="inline"))


def written(spans: list[Span]) -> str:
    """Spans as one string: pictures in braces, supervised stretches between stars."""
    out = []
    for span in spans:
        if isinstance(span, ImageSpan):
            out.append(f"{{{span.index}}}")
        else:
            text = span.text if isinstance(span, TextSpan) else span.token
            out.append(f"*{text}*" if span.supervised else text)
    return "".join(out).replace("**", "")


def without_system(chat: ChatFormat, *messages: Message, mode: Mode = "train") -> str:
    return written(render(chat, [system(""), *messages], mode=mode))


def test_v1_teaches_answers_and_their_end() -> None:
    turns = [user("Hi"), assistant("Hello."), user("Bye"), assistant("Bye.")]
    assert without_system(V1, *turns) == "<s>USER: Hi ASSISTANT:* Hello.</s>*USER: Bye ASSISTANT:* Bye.</s>*"


def test_v0_training_text_teaches_the_marks_that_end_an_answer() -> None:
    text = written(render(V0_TRAIN.replace(system="S."), [user("Hi"), assistant("Hello.")], mode="train"))
    assert text == "<s>S.\n\n*###* Human: Hi\n*### Assistant: Hello.\n### *"


def test_llama_2_writes_the_system_text_inside_the_first_question() -> None:
    chat = LLAVA_LLAMA_2.replace(system="S.")
    turns = [user("Hi", images=[0]), assistant("Hello."), user("Bye"), assistant("Bye.")]
    assert written(render(chat, turns, mode="train")) == (
        "<s>[INST] <<SYS>>\nS.\n<</SYS>>\n\n{0}\nHi [/INST]* Hello. </s>*<s>[INST] Bye [/INST]* Bye. </s>*"
    )


def test_mistral_has_no_token_between_turns() -> None:
    turns = [user("Hi"), assistant("Hello."), user("Bye")]
    text = written(render(MISTRAL_INSTRUCT, turns, mode="prompt"))
    assert text == "<s>[INST] Hi [/INST]* Hello. </s>*[INST] Bye [/INST]"


def test_chatml_teaches_answers_and_their_end() -> None:
    assert written(render(CHATML_DIRECT, [user("Hi"), assistant("Hello.")], mode="train")) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHi<|im_end|>"
        "<|im_start|>assistant\n*Hello.<|im_end|>*"
    )


def test_plain_throws_the_instruction_away() -> None:
    turns = [user("Write a summary.", images=[0]), assistant("a cat")]
    assert written(render(PLAIN, turns, mode="train")) == "<s>{0}*a cat\n*"
    assert written(render(PLAIN, turns[:1], mode="prompt")) == "<s>{0}"


def test_an_example_stands_before_the_conversation_and_is_not_taught() -> None:
    spans = render(V0, [user("Hi"), assistant("Hello.")], mode="train")
    plain = render(LLAVA_V0, [user("Hi"), assistant("Hello.")], mode="train")
    assert len(spans) > len(plain)
    assert [span for span in spans if not isinstance(span, ImageSpan) and span.supervised] == [
        span for span in plain if not isinstance(span, ImageSpan) and span.supervised
    ]


def test_every_span_names_its_source() -> None:
    spans = render(V1, [system("S."), user("Q?"), assistant("A.")], mode="train")
    sources = {span.text: span.source for span in spans if isinstance(span, TextSpan)}
    assert (sources["S."], sources["Q?"], sources["A."], sources["USER:"]) == (
        "system",
        "user",
        "assistant",
        "template",
    )
    assert [span for span in spans if isinstance(span, ControlSpan)] == [
        ControlSpan("<s>", False, "begin"),
        ControlSpan("</s>", True, "template"),
    ]


@pytest.mark.parametrize(
    ("parts", "front", "inline"),
    [
        ([ImagePart(0), TextPart("\nWhat?")], "{0}\nWhat?", "{0}\nWhat?"),
        ([TextPart("What?\n"), ImagePart(0)], "{0}\nWhat?", "What?\n{0}"),
        ([TextPart("Look at "), ImagePart(0), TextPart(" now ")], "{0}\nLook at  now", "Look at {0} now "),
        ([ImagePart(0)], "{0}", "{0}"),
        ([TextPart(" "), ImagePart(0), TextPart("\n")], "{0}", " {0}\n"),
        ([ImagePart(0), TextPart("and"), ImagePart(1)], "{0}\n{1}\nand", "{0}and{1}"),
        ([TextPart(" no picture, no cutting ")], " no picture, no cutting ", " no picture, no cutting "),
    ],
)
def test_pictures_stand_in_front_or_where_they_are(parts: list[TextPart | ImagePart], front: str, inline: str) -> None:
    message = Message("user", tuple(parts))
    assert without_system(V1, message, mode="prompt") == f"<s>USER: {front} ASSISTANT:"
    assert without_system(INLINE_V1, message, mode="prompt") == f"<s>USER: {inline} ASSISTANT:"


def test_markup_surrounds_each_picture() -> None:
    turn = user("What?", images=[0, 1])
    tagged = "<Image>{0}</Image>\n<Image>{1}</Image>\nWhat?"
    assert without_system(V1_MMTAG, turn, mode="prompt") == f"<s>USER: {tagged} ASSISTANT:"
    spans = render(with_start_end(V1), [turn], mode="prompt")
    start = spans.index(ControlSpan("<im_start>", False))
    assert spans[start : start + 4] == [
        ControlSpan("<im_start>", False),
        ImageSpan(0),
        ControlSpan("<im_end>", False),
        TextSpan("\n", False, "template"),
    ]


def test_a_system_message_replaces_the_default() -> None:
    assert "artificial intelligence" in written(render(V1, [user("Hi")], mode="prompt"))
    assert written(render(V1, [system("S."), user("Hi")], mode="prompt")) == "<s>S. USER: Hi ASSISTANT:"


def test_an_empty_turn_is_its_prefix_alone_where_the_authors_write_it_so() -> None:
    turns = [user("Hi"), assistant(""), user("Still there?"), assistant("Yes.")]
    assert without_system(V1, *turns) == "<s>USER: Hi ASSISTANT:USER: Still there? ASSISTANT:* Yes.</s>*"
    assert "### Assistant: \n" in written(render(V0_TRAIN, turns, mode="train")).replace("*", "")
    assert without_system(LLAVA_LLAMA_2, user("Hi"), assistant("A"), user(""), assistant("B")) == (
        "<s>[INST] Hi [/INST]* A </s> B </s>*"
    )


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_a_prompt_is_how_training_text_begins(chat: ChatFormat) -> None:
    generator = random.Random(0)
    texts = ["Hi", "  spaces ", "谢谢", "", "two\nlines", "</s>###"]
    for _ in range(50):
        turns: list[Message] = [system("S.")] if generator.random() < 0.3 else []
        num_images = 0
        for turn in range(generator.randrange(1, 4)):
            shown = list(range(num_images, num_images + generator.randrange(3)))
            num_images += len(shown)
            turns += [
                user(generator.choice(texts) or "x" * (turn == 0), images=shown),
                assistant(generator.choice(texts)),
            ]
        prompt = render(chat, turns[:-1], mode="prompt")
        assert render(chat, turns, mode="train")[: len(prompt)] == prompt


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_all_pictures_are_written_once_and_in_order(chat: ChatFormat) -> None:
    turns = [user("a", images=[0, 1]), assistant("b"), user("c", images=[2])]
    spans = render(chat, turns, mode="prompt")
    assert [span.index for span in spans if isinstance(span, ImageSpan)] == [0, 1, 2]


def test_a_greeting_is_left_out_where_user_and_assistant_alternate() -> None:
    turns = [assistant("Welcome!"), user("Hi"), assistant("Hello.")]
    assert without_system(V1, *turns) == "<s>USER: Hi ASSISTANT:* Hello.</s>*"
    assert "Welcome!" in without_system(V0_TRAIN, *turns)


def test_a_question_without_an_answer_is_written_for_training() -> None:
    assert without_system(V1, user("Hi"), assistant("Hello."), user("Bye")).endswith("</s>*USER: Bye ")


@pytest.mark.parametrize(
    ("chat", "mode", "messages", "message"),
    [
        (V1, "prompt", [], r"no user message among 0 message\(s\)"),
        (V1, "train", [system("S.")], r"no user message among 1 message\(s\)"),
        (V1, "train", [assistant("A.")], "no user message"),
        (
            V1,
            "prompt",
            [user("a"), assistant("b")],
            "message 2, the last one, is the assistant's.*end with a user message",
        ),
        (
            V1,
            "prompt",
            [user("a"), user("b")],
            "message 2 is the user's, and format 'v1' needs the assistant's there.*join",
        ),
        (V1, "train", [system("S."), user("a"), assistant("b"), assistant("c")], "message 4 is the assistant's"),
        (V1, "train", [assistant("a"), assistant("b"), user("c")], "message 2 is the assistant's"),
        (V1, "prompt", [user("a"), system("S.")], "message 2 is a system message; only the first"),
        (V1, "train", [user("a"), Message("assistant", (ImagePart(0),))], r"message 2 \(assistant\) holds a picture"),
        (V1, "train", [Message("system", (ImagePart(0),)), user("a")], r"message 1 \(system\) holds a picture"),
        (LLAVA_LLAMA_2, "prompt", [user("")], "the first user message is empty; format 'llava_llama_2'"),
    ],
)
def test_conversations_that_cannot_be_written_are_refused(
    chat: ChatFormat, mode: Mode, messages: list[Message], message: str
) -> None:
    with pytest.raises(MessageError, match=message):
        render(chat, messages, mode=mode)


def test_neighbouring_user_turns_are_written_where_the_format_can_say_it() -> None:
    for chat in (V0_TRAIN, LLAVA_V0, CHATML_DIRECT):
        text = written(render(chat, [user("first"), user("second")], mode="prompt"))
        assert text.index("first") < text.index("second")


# ---- videos and numbered pictures ------------------------------------------------------------------------------------


def test_videos_stand_between_the_markup_of_pictures_and_say_that_they_are_videos() -> None:
    spans = render(QWEN2_VL, [user("What happens?", images=[0], videos=[0])], mode="prompt")
    assert [span for span in spans if isinstance(span, ImageSpan)] == [ImageSpan(0), ImageSpan(0, "video")]
    assert without_system(QWEN2_VL, user("What happens?", videos=[0]), mode="prompt") == (
        "<|im_start|>user\n<|vision_start|>{0}<|vision_end|>What happens?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_pictures_and_videos_are_numbered_apart_over_the_whole_conversation() -> None:
    turns = [
        user("One?", images=[0], videos=[0]),
        assistant("Yes."),
        Message("user", (TextPart("Two? "), VideoPart(1), ImagePart(1), ImagePart(2))),
    ]
    text = without_system(QWEN2_VL_NUMBERED, *turns).replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    assert "user\nPicture 1: {0}Video 1: {0}One?" in text
    assert "user\nTwo? Video 2: {1}Picture 2: {1}Picture 3: {2}" in text


def test_a_base_format_writes_contents_alone() -> None:
    spans = render(QWEN2_VL_BASE, [Message("user", (ImagePart(0), TextPart("A photo of")))], mode="prompt")
    assert written(spans) == "<|vision_start|>{0}<|vision_end|>A photo of"


def test_only_users_show_videos() -> None:
    with pytest.raises(MessageError, match=r"message 2 \(assistant\) holds a video"):
        render(QWEN2_VL, [user("hi"), Message("assistant", (VideoPart(0),))], mode="train")
