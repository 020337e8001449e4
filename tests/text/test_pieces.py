"""WordPiece and Unigram tokenizers: the ids of transformers' classes, and control tokens out of reach."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from opsin.errors import TokenizerError
from opsin.text.tokenizer import Tokenizer, load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789[].,'!?-"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
WORDS += ["dog", "cat", "play", "##ing", "photo", "the", "of", "cls", "sep"]
TEXTS = ["A photo of the dog.", "the CAT, playing!", "[CLS] the dog [SEP]", "isn't it?", "naïve Zoë 你好", ""]
SPECIAL = ["<pad>", "</s>", "<unk>"]


def bert(folder: Path, *, as_vocab: bool) -> Tokenizer:
    """BERT's two kinds of files, with lower case."""
    if as_vocab:
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        return load_tokenizer(folder)
    vocab = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([*WORDS[:5], "[DEC]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def t5_json() -> dict[str, Any]:
    """T5's file: a sentencepiece Unigram, every word of which begins with a space; two extra tokens at the end."""
    words = [
        "\u2581",
        "\u2581the",
        "\u2581dog",
        "\u2581a",
        "s",
        "\u2581photo",
        "\u2581of",
        ".",
        "d",
        "o",
        "g",
        "t",
        "h",
    ]
    words += ["e", "<", ">", "/", "p", "a", "x", "r", "i", "_", "0", "1"]
    vocab = [(token, 0.0) for token in SPECIAL] + [(word, -2.0 - 0.01 * n) for n, word in enumerate(words)]
    vocab += [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=2))
    whole = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), whole])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*SPECIAL, "<extra_id_0>", "<extra_id_1>", "<image>"])
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


def t5(folder: Path) -> Tokenizer:
    (folder / "tokenizer.json").write_text(json.dumps(t5_json()))
    return load_tokenizer(folder)


@pytest.mark.parametrize("as_vocab", [True, False], ids=["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_bert_are_those_of_transformers(tmp_path: Path, as_vocab: bool, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours = bert(tmp_path, as_vocab=as_vocab)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=True)
    written = text.replace("[CLS]", "[ CLS ]").replace("[SEP]", "[ SEP ]")  # theirs makes control tokens of text
    ids = ours.encode(text, "after_control").ids
    assert ids == theirs(written, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(
        [i for i in ids if i != ours.control_id("[UNK]")], clean_up_tokenization_spaces=True
    )


def test_no_text_becomes_a_control_token(tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    for tokenizer in (bert(tmp_path, as_vocab=True), t5(tmp_path / "t5")):
        for control, token_id in tokenizer.controls.items():
            for text in (control, f"x{control}x", f" {control} ", f"\ufdd0{token_id}\ufdd1", f"\u2581{control}"):
                allowed = {tokenizer.controls.get("[UNK]"), tokenizer.controls.get("<unk>")}
                found = set(tokenizer.encode(text, "start").ids) & set(tokenizer.controls.values())
                assert found <= allowed, (control, text)


def test_ids_keep_their_places_when_control_tokens_are_hidden(tmp_path: Path) -> None:
    tokenizer = t5(tmp_path)
    plain = tokenizers.Tokenizer.from_str(json.dumps(t5_json()))
    for text in ("the dog", " a photo of the dogs.", "zzz", "the  dog\n"):
        assert tokenizer.encode(text, "start").ids == plain.encode(text, add_special_tokens=False).ids
    assert tokenizer.control_id("<extra_id_0>") == plain.token_to_id("<extra_id_0>")
    assert tokenizer.control_id("<image>") == tokenizer.vocab_size - 1


def test_text_of_t5_comes_back_without_the_space_in_front(tmp_path: Path) -> None:
    tokenizer = t5(tmp_path)
    ids = tokenizer.encode("a photo of the dogs.", "start").ids
    assert tokenizer.decode([*ids, tokenizer.control_id("</s>")]) == "a photo of the dogs."


def test_every_token_knows_where_it_starts(tmp_path: Path) -> None:
    tokens = bert(tmp_path, as_vocab=True).encode("The dog, playing", "after_control")
    assert tokens.starts == [0, 4, 7, 9, 13]


def test_a_tokenizer_is_saved_as_it_was_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    bert(source, as_vocab=True).save(tmp_path / "copy")
    copied = load_tokenizer(tmp_path / "copy")
    assert copied.encode("the dog", "start").ids == [WORDS.index("the"), WORDS.index("dog")]
    assert copied.controls == {word: WORDS.index(word) for word in WORDS[:5]}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("vocab.txt", b"dog\ncat\n", r"no \[UNK\] among its 2 lines"),
        ("vocab.txt", b"\xff\n", "not UTF-8"),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "malformed 'vocab'"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": []}}', "malformed 'vocab'"),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": [["a", "b"]]}}', "cannot be used"),
    ],
)
def test_files_that_make_no_tokenizer_are_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_opts_two_files_name_their_control_tokens_by_what_they_are_for(tmp_path: Path) -> None:
    """facebook/opt-2.7b has vocab.json, merges.txt, and its control tokens in special_tokens_map.json alone."""
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "\u0120": 5, "\u010a": 6, "\u0120a": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n\u0120 a\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    special = {"bos_token": {"content": "</s>"}, "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.controls == {"</s>": 2, "<pad>": 1}
    assert tokenizer.encode("a a\n", "after_control").ids == [4, 7, 6]
