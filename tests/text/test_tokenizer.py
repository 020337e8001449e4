import json
import random
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers

from opsin.errors import TokenizerError
from opsin.text._huggingface import HuggingFaceTokenizer
from opsin.text._sentencepiece import SentencePieceTokenizer
from opsin.text.tokenizer import TextStream, Tokenizer, load_tokenizer
from text.makers import TINY, byte_level_json, from_json, llama_json, tagged, two_files

TEXTS = [
    "",
    "hi",
    " hi",
    "  two  spaces  ",
    "USER: hi ASSISTANT: yes",
    "line\nline\r\n\n\tend",
    "naïve café, 你好 🙂🙂 e\u0301",
    "3.14159 -1e10",
    "\x00 nul \x7f",
    "a" * 300,
]


def _ids_with_controls(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which control tokens are meant: each piece between them by itself."""
    ids: list[int] = []
    place = "start"
    for piece in re.split("(<s>|</s>|<unk>)", text):
        if piece in tokenizer.controls:
            ids.append(tokenizer.control_id(piece))
            place = "after_control"
        elif piece:
            ids += tokenizer.encode(piece, place).ids  # type: ignore[arg-type]
    return ids


@pytest.mark.parametrize("legacy", [False, True])
def test_vicuna_gives_the_published_ids(vicuna_folder: Path, legacy: bool) -> None:
    facts = json.loads((vicuna_folder / "tokenizer_facts.json").read_text())
    tokenizer = load_tokenizer(vicuna_folder, legacy=legacy)
    assert tokenizer.vocab_size == facts["vocab_size"]
    for text, ids in facts[f"ids_legacy_{str(legacy).lower()}"].items():
        assert [facts["bos"], *_ids_with_controls(tokenizer, text)] == ids, text


def test_internlm2_gives_the_recorded_ids_without_a_dummy_prefix(shared: Path) -> None:
    file, case = shared / "tokenizers/internlm2/tokenizer.model", shared / "goldens/internvl/tokenize_internlm2"
    if not file.is_file() or not case.is_dir():
        pytest.skip(f"{file} or {case} is not there")
    added = {name: int(number) for number, name in json.loads((case / "case.json").read_text())["added_tokens"].items()}
    files = {"tokenizer.model": file.read_bytes(), "added_tokens.json": json.dumps(added).encode()}
    tokenizer = SentencePieceTokenizer(files)
    assert tokenizer.controls == added
    canary = json.loads((file.parent / "tokenizer_facts.json").read_text())["canary"]
    for place in ("start", "after_control"):
        assert tokenizer.encode(canary["text"], place).ids == canary["ids_no_bos"]
    # The ids of <|im_end|> and its kind are taken over from pieces that the model would find in text.
    assert set(tokenizer.encode("[UNUSED_TOKEN_145] [UNUSED_TOKEN_146]", "start").ids).isdisjoint(added.values())
    assert tokenizer.decode([added["<|im_end|>"]]) == ""


def test_qwen2_vocabulary_gives_the_recorded_ids(shared: Path) -> None:
    folder, case = shared / "tokenizers/qwen2", shared / "goldens/qwen2_vl/tokenizer/case.json"
    if not folder.is_dir() or not case.is_file():
        pytest.skip(f"{folder} or {case} is not there")
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = json.loads((folder / "special_tokens.json").read_text())
    backend.add_special_tokens(list(special))
    tokenizer = from_json(json.loads(backend.to_str()))
    assert tokenizer.controls == special
    for row in json.loads(case.read_text())["rows"]:
        tokens = tokenizer.encode(row["text"], "start")
        if any(name in row["text"] for name in special):
            assert set(tokens.ids).isdisjoint(special.values())  # the recorded tokenizer recognises them in text
        else:
            assert tokens.ids == row["ids"], row["text"]
        assert tokenizer.decode(tokens.ids) == unicodedata.normalize("NFC", row["text"])


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, "start").ids
    spelt = b"".join(map(tokenizer.token_bytes, ids)).decode()
    # Metaspace puts no space before a text that begins with one, and then decoding takes that one off.
    assert spelt in (text, " " + text)
    assert tokenizer.decode(ids) == (spelt.removeprefix(" ") if tokenizer.strips_first_space else spelt)


@pytest.mark.parametrize("place", ["start", "after_control"])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_spell_the_text_between_their_starts(tokenizer: Tokenizer, text: str, place: str) -> None:
    ids, starts = tokenizer.encode(text, place)  # type: ignore[arg-type]
    assert starts == sorted(starts)
    ends = sorted({*starts, len(text)})
    for start, end in pairwise(ends):
        spelt = b"".join(tokenizer.token_bytes(i) for i, at in zip(ids, starts, strict=True) if at == start)
        # The first token may have a space of the tokenizer's making in front, or be that space.
        allowed = [text[start:end], " " + text[start:end]] if start == 0 else [text[start:end]]
        assert spelt.decode() in allowed


def test_offsets_are_characters_of_the_text_also_where_it_is_normalised() -> None:
    data = byte_level_json() | {"normalizer": {"type": "NFC"}}
    tokens = from_json(data).encode("e\u0301e\u0301?", "start")
    assert sorted(set(tokens.starts)) == [0, 2, 4]


@pytest.mark.parametrize(
    ("shape", "config", "continued"),
    [
        ("first", None, "hi"),
        ("always", None, " hi"),
        ("prepend", None, " hi"),
        ("prepend", {"legacy": False}, "hi"),
        ("first", {"legacy": True}, " hi"),
    ],
)
def test_only_legacy_tokenizers_put_a_space_after_a_control_token(
    shape: str, config: dict[str, bool] | None, continued: str
) -> None:
    tokenizer = from_json(llama_json(shape), config)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("hi", "start").ids)) == b" hi"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode("hi", "after_control").ids)) == continued.encode()


@pytest.mark.parametrize("shape", ["first", "always", "prepend"])
def test_texts_with_control_tokens_get_the_ids_that_the_library_gives(shape: str) -> None:
    data = llama_json(shape)
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer = from_json(data)
    for text in ("hi", " hi", "USER hi", "a</s>USER", "</s> x", "<s>x</s>y <s>"):
        starts_with_control = text.startswith("<")
        if starts_with_control and shape == "first":
            continue  # there `first` counts characters of the whole text, and nothing asks for text in front of all
        assert _ids_with_controls(tokenizer, text) == library.encode(text).ids, text


@pytest.mark.parametrize("legacy", [False, True])
def test_decoding_agrees_with_sentencepiece(legacy: bool) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    tokenizer = load_tokenizer(TINY, legacy=legacy)
    generator = random.Random(0)
    for _ in range(200):
        text = "".join(generator.choice("ab xyz\n é你🙂USER:#") for _ in range(generator.randrange(30)))
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text)) == text


def test_added_white_space_is_ordinary_text() -> None:
    tokenizer = from_json(byte_level_json())
    assert "   " not in tokenizer.controls
    ids = tokenizer.encode("x   y", "start").ids
    assert b"   " in [tokenizer.token_bytes(i) for i in ids]
    assert tokenizer.decode(ids) == "x   y"


def test_control_tokens_are_reached_by_name_only(tokenizer: Tokenizer) -> None:
    for name, number in tokenizer.controls.items():
        assert tokenizer.control_id(name) == number < tokenizer.vocab_size
        assert tokenizer.token_bytes(number) == b""
        for place in ("start", "after_control"):
            assert number not in tokenizer.encode(name, place).ids  # type: ignore[arg-type]
            assert number not in tokenizer.encode(f"x{name}y", place).ids  # type: ignore[arg-type]


def test_pieces_of_a_sentencepiece_model_that_stand_for_control_tokens_are_out_of_reach() -> None:
    tokenizer = tagged()
    assert tokenizer.controls == {
        "<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 690, "<|im_end|>": 700, "<image>": 701,
    }  # fmt: skip
    assert 700 not in tokenizer.encode("x<|im_end|>", "start").ids  # a piece that the model itself finds in text
    taken_over = load_tokenizer(TINY).token_bytes(690).decode()
    assert 690 in load_tokenizer(TINY).encode(taken_over, "after_control").ids
    assert 690 not in tokenizer.encode(taken_over, "after_control").ids


def test_a_vocabulary_looked_up_whole_does_not_give_control_tokens() -> None:
    data = byte_level_json()
    data["model"]["ignore_merges"] = True  # as Llama 3 has: any word that is in the vocabulary is taken as it is
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = from_json(data)
    ids = tokenizer.encode("<|endoftext|>", "start").ids
    assert tokenizer.control_id("<|endoftext|>") not in ids
    assert tokenizer.decode(ids) == "<|endoftext|>"


def test_unknown_ids_spell_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, tokenizer.vocab_size, 10**9]) == ""


def test_a_missing_control_token_names_the_nearest() -> None:
    with pytest.raises(TokenizerError, match=r"no control token '<\|im_stop\|>' \(did you mean '<\|im_start\|>'"):
        from_json(byte_level_json()).control_id("<|im_stop|>")


def test_streamed_text_is_the_decoded_text_and_never_half_a_character(tokenizer: Tokenizer) -> None:
    generator = random.Random(1)
    for _ in range(50):
        text = "".join(generator.choice("ab é你🙂\n  USER") for _ in range(40)).lstrip(" ")
        ids = tokenizer.encode(text, "start").ids
        stream = TextStream(tokenizer)
        pieces = [stream.push(i) for i in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids) == text


def test_a_stream_that_ends_inside_a_character_says_so_at_the_end(tiny: Tokenizer) -> None:
    ids = tiny.encode("x🙂", "start").ids[:-1]
    stream = TextStream(tiny)
    assert "".join(map(stream.push, ids)) == "x"
    assert stream.finish() == "\ufffd"


def test_a_stream_looks_at_each_token_once(tiny: Tokenizer) -> None:
    class Counting:
        strips_first_space = True
        calls = 0

        def token_bytes(self, token_id: int) -> bytes:
            self.calls += 1
            return b"x"

    counting = Counting()
    stream = TextStream(counting)  # type: ignore[arg-type]
    for _ in range(1000):
        stream.push(0)
    assert counting.calls == 1000


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_tokenizer_loads_as_it_was(tmp_path: Path, legacy: bool) -> None:
    load_tokenizer(TINY, legacy=legacy).save(tmp_path / "new")
    assert (tmp_path / "new/tokenizer.model").read_bytes() == (TINY / "tokenizer.model").read_bytes()
    again, other = load_tokenizer(tmp_path / "new"), load_tokenizer(TINY, legacy=legacy)
    assert again.encode("USER: x", "after_control") == other.encode("USER: x", "after_control")


def test_legacy_is_read_from_the_folder(tmp_path: Path) -> None:
    load_tokenizer(TINY).save(tmp_path)
    spaced = load_tokenizer(tmp_path).encode("USER", "after_control")
    assert spaced == load_tokenizer(TINY, legacy=True).encode("USER", "after_control")
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    assert load_tokenizer(tmp_path).encode("USER", "after_control") != spaced


def test_tokenizer_model_is_preferred_to_tokenizer_json(tmp_path: Path) -> None:
    load_tokenizer(TINY).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("not even read")
    assert load_tokenizer(tmp_path).vocab_size == 700


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither tokenizer.model nor tokenizer.json"),
        ({"config.json": b"{}"}, r"\['config.json'\].*save_pretrained"),
        ({"vocab.json": b"{}"}, "vocab.json needs merges.txt beside it"),
        ({"vocab.json": b"{", "merges.txt": b""}, "vocab.json is not JSON"),
        ({"vocab.json": b"{}", "merges.txt": b"a b c"}, "merges.txt holds 'a b c', which is not a pair"),
        ({"vocab.json": b"{}", "merges.txt": b"a b"}, "names the class ''.*save_pretrained"),
        ({"tokenizer.model": b""}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer.model": b"\xff" * 100_000}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "tokenizer.model is not a sentencepiece model"),
        ({"tokenizer.json": b"{"}, "tokenizer.json is not valid JSON"),
        ({"tokenizer.json": b"\xff\xfe"}, "tokenizer.json is not valid JSON"),
        ({"tokenizer.json": b"[]"}, "tokenizer.json holds a list"),
        ({"tokenizer.json": b"{}"}, "model of type None"),
        ({"tokenizer.json": b'{"model": {"type": "WordLevel"}}'}, "type 'WordLevel'; only 'BPE'"),
        ({"tokenizer.json": b'{"model": {"type": "BPE"}}'}, "malformed 'vocab'"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}}}'}, "cannot be used"),
    ],
)
def test_folders_without_a_usable_tokenizer_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("cut", [1, 7, 100, 5000, -1])
def test_a_model_that_is_cut_inside_a_piece_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes()[:cut])
    with pytest.raises(TokenizerError, match="is not a sentencepiece model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        '{"added_tokens_decoder": {"x": {"content": "y"}}}',
        '{"added_tokens_decoder": []}',
        '{"added_tokens_decoder": {"3": 1}}',
    ],
)
def test_malformed_added_tokens_are_refused(tmp_path: Path, config: str) -> None:
    load_tokenizer(TINY).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(TokenizerError, match="added tokens"):
        load_tokenizer(tmp_path)


def test_vocab_and_merges_spell_as_the_tokenizer_json_that_they_were_taken_from() -> None:
    theirs, ours = from_json(byte_level_json()), HuggingFaceTokenizer(two_files("GPT2Tokenizer"))
    for text in TEXTS:
        if "   " not in text:  # added white space is in tokenizer.json alone
            assert ours.encode(text, "start") == theirs.encode(text, "start"), text


def test_qwen2_cuts_digits_one_by_one_and_composes_characters() -> None:
    tokenizer = HuggingFaceTokenizer(two_files("Qwen2TokenizerFast"))
    digits = tokenizer.encode("1234567890", "start")
    assert digits.starts == list(range(10))
    assert len(HuggingFaceTokenizer(two_files("GPT2Tokenizer")).encode("1234567890", "start").ids) < 10
    composed = tokenizer.encode("caf\u00e9!", "start")
    assert tokenizer.encode("cafe\u0301!", "start").ids == composed.ids
    assert tokenizer.decode(composed.ids) == "caf\u00e9!"
    # Tokens know where they begin in the text as it was written, before it was composed.
    assert tokenizer.encode("cafe\u0301!", "start").starts[-1] == 5


def test_a_tokenizer_of_two_files_is_saved_and_found_again(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(two_files("Qwen2Tokenizer"))
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.controls == tokenizer.controls
    assert again.encode("the picture shows", "start") == tokenizer.encode("the picture shows", "start")
