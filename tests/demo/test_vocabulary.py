"""The demo's tokenizer: any text survives it, words are whole, what is to be read is spelled."""

from pathlib import Path

import pytest

from opsin.demo.shipped import CHAT, PARTS
from opsin.demo.tasks import text_sample
from opsin.demo.vocabulary import CONTROLS, sentences, vocabulary, write_tokenizer
from opsin.families._chats import PLAIN
from opsin.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(PARTS)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text, "start").ids]


def test_the_shipped_tokenizer_is_what_the_recipe_makes(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, vocabulary(sentences()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (PARTS / name).read_bytes()


def test_the_vocabulary_is_small_and_has_the_control_tokens_of_the_chat_formats(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size < 1000
    assert set(tokenizer.controls) == set(CONTROLS)
    used = {piece.token for chat in (CHAT, PLAIN) for piece in chat.begin if piece.kind == "control"}
    assert used | {*CHAT.stop_tokens} <= set(CONTROLS)


def test_words_are_whole_and_what_is_read_is_spelled(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, "What colour is the red circle?") == [
        "What",
        " colour",
        " is",
        " the",
        " red",
        " circle",
        "?",
    ]
    assert pieces(tokenizer, "USER: ASSISTANT: BAKE 427") == ["USER:", " ASSISTANT:", " ", *"BAKE", " ", *"427"]


@pytest.mark.parametrize("text", ["Ünï ☃ 日本", "</s> <image> <s>", "USER: hello\n\n  world\t!", "", "camelCase ABC1x"])
def test_any_text_comes_back_and_never_as_a_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, "start").ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.controls.values())


def test_the_demo_never_needs_bytes_for_its_own_words(tokenizer: Tokenizer) -> None:
    for split in ("train", "heldout"):
        for index in range(200):
            shown = text_sample(9, index, split, num_questions=12)
            for text in (shown.caption, *(f"{question.text} {question.answer}" for question in shown.questions)):
                assert all(len(piece) > 1 or not piece.islower() for piece in pieces(tokenizer, text))
