"""Written templates say what `text.render` says: every chat format, rendered by transformers' own engine."""

from typing import Any

import pytest

from opsin.families._chats import CHATS
from opsin.spec.chat import Placeholder
from opsin.text.parse import parse
from opsin.text.render import ControlSpan, ImageSpan, render
from opsin.text.template import chat_template

MARK = Placeholder(image="<image>", video="<video>")


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


IMAGE = {"type": "image", "image": "a.png"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "words": [{"role": "user", "content": " hello "}],
    "picture": [{"role": "user", "content": [IMAGE, text(" what? ")]}],
    "picture alone": [{"role": "user", "content": [IMAGE]}],
    "two": [{"role": "user", "content": [IMAGE, IMAGE, text('compare "these"\n')]}],
    "after": [{"role": "user", "content": [text("first this "), IMAGE, text(" then that")]}],
    "turns": [
        {"role": "user", "content": [IMAGE, text("what?")]},
        {"role": "assistant", "content": " a cat "},
        {"role": "user", "content": [IMAGE, text("and this?")]},
        {"role": "assistant", "content": [text("a dog")]},
        {"role": "user", "content": "sure?"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [IMAGE, text("what?")]}],
}


@pytest.mark.parametrize("name", CHATS)
def test_a_template_writes_what_the_format_says(name: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    chat = CHATS[name]
    written = chat_template(chat, MARK, with_begin=True)
    if written is None:
        assert name.startswith(("blip2", "plain", "qwen_vl")), "formats that transformers has no template for either"
        return
    for key, messages in CONVERSATIONS.items():
        spans = render(chat, parse({"messages": messages}, where="test").messages, mode="prompt")
        wanted = "".join(
            MARK.image if isinstance(span, ImageSpan) else span.token if isinstance(span, ControlSpan) else span.text
            for span in spans
        )
        (found,), _ = utils.render_jinja_template([messages], chat_template=written, add_generation_prompt=True)
        assert found == wanted, key


def test_a_processor_that_writes_the_marks_itself_is_left_to_do_so() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    chat = CHATS["internvl2_5"]
    mark = Placeholder(image="<IMG_CONTEXT>", wraps=True)
    written = chat_template(chat, mark, with_begin=False)
    (found,), _ = utils.render_jinja_template([CONVERSATIONS["picture"]], chat_template=written)
    assert found.endswith("<|im_start|>user\n<IMG_CONTEXT>\n what?<|im_end|>\n")
    assert not found.startswith("<s>")
