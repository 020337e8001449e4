"""InternVL's formats: pictures beside text and within it, numbers, white space, the end of a turn, Phi-3's tokens."""

import json

import pytest

from opsin.families._chats import INTERNLM2_CHAT, INTERNLM2_CHAT_LATER, INTERNVL_25, INTERNVL_HF, PHI3_CHAT
from opsin.spec.chat import ChatFormat
from opsin.text._sentencepiece import SentencePieceTokenizer
from opsin.text.messages import Message, assistant, system, user
from opsin.text.parse import parse
from opsin.text.render import ImageSpan, TextSpan, render
from opsin.text.tokenise import tokenise
from text.makers import TINY


def written(chat: ChatFormat, *messages: Message) -> str:
    """Training text without system text; pictures in braces, taught stretches between stars."""
    out = []
    for span in render(chat, [system(""), *messages], mode="train"):
        if isinstance(span, ImageSpan):
            out.append(f"{{{span.index}}}")
        else:
            text = span.text if isinstance(span, TextSpan) else span.token
            out.append(f"*{text}*" if span.supervised else text)
    return "".join(out).replace("**", "")


def marked(*values: str) -> tuple[Message, ...]:
    """A record of the authors' kind: `<image>` stands in the text."""
    count = sum(value.count("<image>") for value in values)
    turns = [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]
    return parse({"image": ["x.png"] * count, "conversations": turns}, where="test").messages


def test_answers_and_the_token_that_ends_them_are_taught_and_nothing_else() -> None:
    assert written(INTERNLM2_CHAT, user("Q?", images=[0]), assistant("A."), user("R?"), assistant("B.")) == (
        "<s><|im_start|>user\n<img>{0}</img>\nQ?<|im_end|><|im_start|>assistant\n*A.<|im_end|>*"
        "<|im_start|>user\nR?<|im_end|><|im_start|>assistant\n*B.<|im_end|>*"
    )
    assert written(PHI3_CHAT, user("Q?", images=[0]), assistant("A.")) == (
        "<s><|user|>\n<img>{0}</img>\nQ?<|end|><|assistant|>\n*A.<|end|>*"
    )


def test_later_formats_break_the_line_after_a_turn_and_do_not_teach_it() -> None:
    assert written(INTERNVL_25, user("Q?"), assistant("A.")) == (
        "<s><|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n*A.<|im_end|>*\n"
    )
    assert written(INTERNVL_HF, user("Q?"), assistant("A.")).startswith("<|im_start|>user\nQ?")


@pytest.mark.parametrize(
    ("chat", "question"),
    [
        (INTERNLM2_CHAT, "<image 1> (图1):<img>{0}</img><image 2> (图2):<img>{1}</img>\nQ?"),
        (INTERNLM2_CHAT_LATER, "Image-1: <img>{0}</img>\nImage-2: <img>{1}</img>\nQ?"),
        (INTERNVL_HF, "<img>{0}</img>\n<img>{1}</img>\nQ?"),
    ],
)
def test_several_pictures_beside_a_text_are_numbered(chat: ChatFormat, question: str) -> None:
    assert question in written(chat, user("Q?", images=[0, 1]), assistant("A."))


def test_numbers_go_on_through_the_conversation_and_a_single_picture_has_none() -> None:
    text = written(INTERNLM2_CHAT_LATER, user("Q?", images=[0]), assistant("A."), user("R?", images=[1, 2]))
    assert "user\n<img>{0}</img>\nQ?" in text
    assert "Image-2: <img>{1}</img>\nImage-3: <img>{2}</img>\nR?" in text


@pytest.mark.parametrize("chat", [INTERNLM2_CHAT, INTERNLM2_CHAT_LATER], ids=lambda chat: chat.name)
def test_text_that_places_its_pictures_says_itself_what_stands_around_them(chat: ChatFormat) -> None:
    assert "user\nA: <img>{0}</img>\nB: <img>{1}</img> or both?<|im_end|>" in written(
        chat, *marked("A: <image>\nB: <image> or both?", "Both.")
    )
    assert "user\n<img>{0}</img>What?<|im_end|>" in written(chat, *marked("<image>What?", "A."))


def test_white_space_around_a_turn_is_cut_in_prompts_as_in_training() -> None:
    text = written(INTERNLM2_CHAT, *marked("  <image>\n Q? \n", "\n A. B. \n"))
    assert "user\n<img>{0}</img>\n Q?<|im_end|>" in text
    assert "*A. B.<|im_end|>*" in text
    prompt = render(INTERNLM2_CHAT, [user("\n Q? ")], mode="prompt")
    assert TextSpan("Q?", False, "user") in prompt


def phi3_tokenizer(*, swallows: bool) -> SentencePieceTokenizer:
    """The tiny sentencepiece model with Phi-3's tokens, which take white space away where the published ones do."""
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    added = {
        str(700 + number): {"content": name, "rstrip": swallows and name != "<|end|>"}
        for number, name in enumerate(names)
    }
    config = {"legacy": False, "added_tokens_decoder": added}
    files = {"tokenizer.model": (TINY / "tokenizer.model").read_bytes()}
    return SentencePieceTokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()})


def test_tokens_that_take_white_space_away_do_so_and_answers_are_taught_from_their_first_letter() -> None:
    """Phi-3's tokenizer drops the line break that its template writes (`rstrip`)."""
    tokenizer = phi3_tokenizer(swallows=True)
    assert set(tokenizer.swallowing) == {"<|system|>", "<|user|>", "<|assistant|>"}
    spans = render(PHI3_CHAT, [system("S."), user("What is this?"), assistant("A dog.")], mode="train")
    text = tokenise(spans, tokenizer)
    plain = [*tokenizer.encode("S.", "after_control").ids, *tokenizer.encode("What is this?", "after_control").ids]
    answer = tokenizer.encode("A dog.", "after_control").ids
    controls = {name: tokenizer.control_id(name) for name in tokenizer.controls}
    assert [number for number in text.ids if number not in controls.values()] == [*plain, *answer]
    taught = [number for number, supervised in zip(text.ids, text.supervised, strict=True) if supervised]
    assert taught == [*answer, controls["<|end|>"]]
    owners = [spans[place] for number, place in zip(text.ids, text.spans, strict=True) if number in answer[:1]]
    assert TextSpan("A dog.", True, "assistant") in owners
    prompt = tokenise(render(PHI3_CHAT, [system("S."), user("What is this?")], mode="prompt"), tokenizer)
    assert text.ids[: len(prompt.ids)] == prompt.ids


def test_tokens_that_leave_white_space_alone_do_so() -> None:
    tokenizer = phi3_tokenizer(swallows=False)
    text = tokenise(render(PHI3_CHAT, [system("S."), user("Hi")], mode="prompt"), tokenizer)
    assert tokenizer.decode(text.ids) == "\nS.\nHi\n"
