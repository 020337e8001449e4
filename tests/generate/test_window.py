"""A chat longer than its model's window: the oldest exchanges leave the prompt, and nothing else changes."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from opsin import families
from opsin.encode import Encoder
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.generate.session import ANY_SIZE, Chat
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.text.messages import Conversation, assistant, system, user
from opsin.text.tokenizer import Tokenizer
from opsin.text.window import only
from toys import picture

SAMPLING = Sampling(max_new_tokens=4)
TEXT = "What do you see on this one?"


@dataclass
class Windowed:
    """What `weights.Model` holds, as far as a chat goes."""

    vlm: VLM
    config: VLMConfig
    tokenizer: Tokenizer
    generation: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def windowed(llava15) -> Windowed:
    """A model all of whose pictures take as many tokens, with a window of two exchanges and a bit."""
    slots = llava15.config.plan(ANY_SIZE).num_slots
    model = Windowed(llava15.vlm, llava15.config, llava15.tokenizer)
    chat = Chat(model, sampling=SAMPLING, system_text="s")
    chat.ask(TEXT, picture((40, 40)))
    exchange = chat.prompt.num_tokens + 6
    model.generation = {"max_window_size": 2 * exchange + slots // 2}
    return model


def test_what_no_longer_fits_the_window_is_left_out_whole_and_the_rest_is_answered_alike(windowed):
    chat = Chat(windowed, sampling=SAMPLING, system_text="s")
    shown = [picture((40, 40), seed) for seed in range(5)]
    for number, image in enumerate(shown):
        answer = chat.ask(TEXT, image)
        left_out = max(0, number - 2)
        assert chat.num_left_out == 2 * left_out, "exchanges leave whole"
        assert len(chat.prompt.images) == number + 1 - left_out
        said = [each.text for each in chat.messages if each.role == "assistant"]
        turns = [system("s")]
        for place in range(left_out, number):
            turns += [user(TEXT, images=[place - left_out]), assistant(said[place])]
        turns.append(user(TEXT, images=[number - left_out]))
        prompt = Encoder(windowed.config, windowed.tokenizer).encode(
            Conversation(tuple(turns), tuple(shown[left_out : number + 1]))
        )
        fresh = generate(windowed.vlm, [prompt], windowed.tokenizer, SAMPLING)[0]
        assert chat.prompt.ids.tolist() == prompt.ids.tolist()
        assert answer.ids == fresh.ids
    assert len(chat.messages) == 11, "the chat itself forgets nothing"
    chat.reset()
    assert chat.num_left_out == 0


def test_pictures_are_prepared_once_also_where_their_numbers_change(windowed, monkeypatch):
    opened = []
    real = Encoder.prepare_image

    def count(self, conversation, index):
        opened.append(index)
        return real(self, conversation, index)

    monkeypatch.setattr(Encoder, "prepare_image", count)
    chat = Chat(windowed, sampling=SAMPLING, system_text="s")
    for seed in range(5):
        chat.ask(TEXT, picture((40, 40), seed))
    assert len(opened) == 5


def test_without_a_window_everything_stays(llava15):
    chat = Chat(llava15, sampling=SAMPLING)
    for seed in range(4):
        chat.ask(TEXT, picture((40, 40), seed))
    assert chat.num_left_out == 0
    assert len(chat.prompt.images) == 4


def test_qwen_vl_chat_has_the_published_window():
    assert families.preset("qwen-vl-chat").generation["max_window_size"] == 6144
    assert "max_window_size" not in families.preset("qwen-vl").generation


def test_messages_that_are_left_show_what_they_showed():
    turns = (user("a", images=[0], videos=[0]), assistant("b"), user("c", images=[1, 2], videos=[1]))
    whole = Conversation(turns, ("0.png", "1.png", "2.png"), videos=("0.mp4", "1.mp4"))
    left, images, videos = only(whole, turns[2:])
    assert (left.images, left.videos) == (("1.png", "2.png"), ("1.mp4",))
    assert (images, videos) == ([1, 2], [1])
    assert left.messages == (user("c", images=[0, 1], videos=[0]),)
    assert only(whole, turns)[0] == whole
