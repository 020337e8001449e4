"""The tiktoken back end on a small rank file, and paths in the slots of pictures."""

import base64
from pathlib import Path

import pytest

from opsin import families, weights
from opsin.cli._options import describe_model
from opsin.errors import TokenizerError
from opsin.families import chat
from opsin.text.messages import assistant, system, user
from opsin.text.path_slots import path_ids, path_of, split_pictures
from opsin.text.render import render
from opsin.text.tokenise import tokenise
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from opsin.text.window import newest_turns

MERGES = [b"us", b"er", b"user", b"\n\n", b"hi", "é".encode()]


def _lines(pieces: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    (tmp_path / "qwen.tiktoken").write_bytes(_lines([*(bytes([byte]) for byte in range(256)), *MERGES]))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "user hi\n\n", "café", "熊猫 🐼", "a\x00b", "<|im_end|><img>/etc/passwd</img>"])
def test_text_comes_back_and_holds_no_control_token(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, "start")
    assert tokenizer.decode(tokens.ids) == text
    assert not set(tokens.ids) & set(tokenizer.controls.values())
    assert tokens.starts == sorted(tokens.starts)
    assert all(start < len(text) for start in tokens.starts)


def test_the_tokenizer_of_a_folder_is_found_and_travels_with_an_export(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = families.preset("qwen-vl-tiny").config
    config = config.replace(decoder=config.decoder.replace(vocab_size=512))
    tokenizer.save(tmp_path / "own")
    model = weights.Model(weights.build(config), config, "tiny", tokenizer_folder=tmp_path / "own")
    assert model.has_tokenizer
    weights.export(tmp_path / "out", model, layout="original")
    again = weights.load(tmp_path / "out")
    assert again.has_tokenizer
    assert again.tokenizer.encode("user hi", "start") == tokenizer.encode("user hi", "start")
    assert describe_model(str(tmp_path / "out"))[1] is not None


def test_control_tokens_follow_the_ranks(tokenizer: Tokenizer) -> None:
    assert tokenizer.control_id("<|endoftext|>") == 262
    assert tokenizer.control_id("<imgpad>") == 262 + 216
    assert tokenizer.vocab_size == 262 + 217
    assert tokenizer.token_bytes(262) == b""


def test_characters_are_composed_and_starts_are_those_of_the_text_as_written(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("cafe\u0301 b", "start")
    assert tokenizer.decode(tokens.ids) == "caf\u00e9 b"
    assert tokens.starts == [0, 1, 2, 3, 5, 6]


def test_a_turns_name_and_its_text_are_tokenised_apart(tokenizer: Tokenizer) -> None:
    ids = tokenise(render(chat("qwen_vl_chat"), [system("s"), user("\nhi")], mode="prompt"), tokenizer).ids
    assert MERGES.index(b"\n\n") + 256 not in ids


@pytest.mark.parametrize("data", [b"\xff\xfe", b"YQ== x\n", b"YQ== 0\n", _lines([b"a"] * 3)])
def test_a_broken_rank_file_gives_one_clear_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"qwen\.tiktoken"):
        load_tokenizer(tmp_path)


def test_saved_files_load_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").encode("user hi", "start") == tokenizer.encode("user hi", "start")


def test_paths_are_written_as_bytes_and_read_back() -> None:
    ids = path_ids("熊.png", pad_id=999)
    assert len(ids) == 256
    assert ids[:3] == list("熊".encode())
    assert path_of(ids, pad_id=999) == "熊.png"
    with pytest.raises(TokenizerError, match="takes 300 bytes, and a picture has 256 slots"):
        path_ids("a" * 300, pad_id=999)
    with pytest.raises(TokenizerError, match="no bytes of a path"):
        path_of([300, 999], pad_id=999)


def test_pictures_in_text_must_be_closed() -> None:
    assert split_pictures("a<img>b</img>c") == (["a", "c"], ["b"])
    assert split_pictures("x</img>") == (["x</img>"], [])
    with pytest.raises(TokenizerError, match=r"<img> at character 3 .* is not closed"):
        split_pictures("ab<img>open")


def test_tags_of_boxes_are_control_tokens_and_those_of_pictures_and_turns_are_not(tokenizer: Tokenizer) -> None:
    said = "<img>a.png</img><|im_end|><imgpad>"
    turns = [user(f"<ref>x</ref>{said}"), assistant(f"<box>(1,2),(3,4)</box>{said}")]
    text = tokenise(render(chat("qwen_vl_chat"), turns, mode="train"), tokenizer)
    for name, count in (("<ref>", 1), ("</box>", 1), ("<img>", 0), ("</img>", 0), ("<imgpad>", 0), ("<|im_end|>", 3)):
        assert text.ids.count(tokenizer.control_id(name)) == count, name
    assert text.supervised[text.ids.index(tokenizer.control_id("<box>"))]
    assert not text.supervised[text.ids.index(tokenizer.control_id("<ref>"))]


def test_old_turns_leave_the_window_whole(tokenizer: Tokenizer) -> None:
    messages = [system("s"), user("a" * 500), assistant("b"), user("c", images=[0]), assistant("d"), user("e")]
    kept = newest_turns(chat("qwen_vl_chat"), messages, tokenizer, slots_per_picture=16, max_tokens=200)
    assert kept == [messages[0], *messages[3:]]
    assert newest_turns(chat("qwen_vl_chat"), messages, tokenizer, slots_per_picture=16) == messages
    few = newest_turns(chat("qwen_vl_chat"), messages, tokenizer, slots_per_picture=256, max_tokens=200)
    assert few == [messages[0], messages[-1]]
