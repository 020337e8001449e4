"""Small tokenizers of every shape that is read, made without a network."""

import json
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from opsin.text._huggingface import HuggingFaceTokenizer
from opsin.text._sentencepiece import SentencePieceTokenizer
from opsin.text.tokenizer import Tokenizer, load_tokenizer
from parity.case import ROOT

TINY = ROOT / "tests" / "goldens" / "text" / "tokenizers" / "tiny"
"""A Llama-like sentencepiece model of 700 pieces with byte fallback."""
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the picture shows a red umbrella and two dogs",
    "Human: what is this? Assistant: this is a stop sign",
    "user system assistant <s> </s> im_start im_end | endoftext",
    "naïve café 你好 🙂 1234567890",
] * 4


def byte_level_json() -> dict[str, Any]:
    """A byte-level encoding as Qwen2 and GPT-NeoX have: control tokens, one merely added token, added white space."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],  # first in the vocabulary, as in GPT-NeoX
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(CONTROLS)
    tokenizer.add_tokens(["<tool>", "   "])
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


def llama_json(shape: str) -> dict[str, Any]:
    """A byte-fallback encoding in which spaces are U+2581, with one of three ways to put a space before a text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "\u2581"]
    merges = [("U", "S"), ("E", "R"), ("US", "ER"), ("\u2581", "h"), ("\u2581h", "i"), ("\u2581", "\u2581")]
    vocab = {piece: number for number, piece in enumerate([*pieces, *(left + right for left, right in merges)])}
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    if shape == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=shape, split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return json.loads(tokenizer.to_str())  # type: ignore[no-any-return]


def two_files(kind: str) -> dict[str, bytes]:
    """The encoding of `byte_level_json` as vocab.json and merges.txt of a class of tokenizers."""
    data = byte_level_json()
    controls = {token["content"]: token["id"] for token in data["added_tokens"] if token["special"]}
    vocab = {name: number for name, number in data["model"]["vocab"].items() if name not in controls}
    config = {
        "tokenizer_class": kind,
        "added_tokens_decoder": {str(number): {"content": name} for name, number in controls.items()},
    }
    merges = "".join(f"{' '.join(pair)}\n" for pair in data["model"]["merges"])
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": f"#version: 0.2\n{merges}".encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def from_json(data: dict[str, Any], config: dict[str, Any] | None = None) -> HuggingFaceTokenizer:
    files = {"tokenizer.json": json.dumps(data).encode()}
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return HuggingFaceTokenizer(files)


def tagged() -> SentencePieceTokenizer:
    """A sentencepiece model that finds tags in text, as Yi's does, and whose config adds tokens over and after it."""
    model = (TINY / "tokenizer.model").read_bytes()
    added = {"0": "<unk>", "1": "<s>", "2": "</s>", "690": "<|im_start|>", "701": "<image>"}
    config = {"added_tokens_decoder": {number: {"content": content} for number, content in added.items()}}
    tag = b"<|im_end|>"
    # One more piece (field 1): its text (field 1) and its type (field 3), user defined.
    piece = b"\x0a" + bytes([len(tag)]) + tag + b"\x15\0\0\0\0" + b"\x18\x04"
    model += b"\x0a" + bytes([len(piece)]) + piece
    return SentencePieceTokenizer({"tokenizer.model": model, "tokenizer_config.json": json.dumps(config).encode()})


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece": lambda: load_tokenizer(TINY, legacy=False),
    "sentencepiece, legacy": lambda: load_tokenizer(TINY, legacy=True),
    "sentencepiece with tags": tagged,
    "byte level": lambda: from_json(byte_level_json()),
    "vocab and merges": lambda: HuggingFaceTokenizer(two_files("GPT2Tokenizer")),
    "metaspace first": lambda: from_json(llama_json("first")),
    "metaspace always": lambda: from_json(llama_json("always")),
    "prepend": lambda: from_json(llama_json("prepend")),
}
