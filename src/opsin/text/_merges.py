"""Byte-pair encodings kept as `vocab.json` and `merges.txt` (GPT-2's two files), said the way tokenizer.json says them.

What the two files leave out stands in no file: how text is normalised and cut before merging belongs to the class of
the tokenizer, which tokenizer_config.json names.
"""

import json
from collections.abc import Mapping
from typing import Any

from opsin.errors import TokenizerError
from opsin.text.tokenizer import read_json

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts text into words, digits one by one (Qwen's tokenization_qwen.py, PAT_STR)."""


def from_vocab_and_merges(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The content of the tokenizer.json that belongs to these files. Raises TokenizerError."""
    if "merges.txt" not in files:
        raise TokenizerError("vocab.json needs merges.txt beside it; copy it from the model's repository")
    config = read_json(files, "tokenizer_config.json")
    try:
        lines = files["merges.txt"].decode("utf-8").split("\n")
        vocab = json.loads(files["vocab.json"])
    except ValueError:
        raise TokenizerError("vocab.json is not JSON, or merges.txt is not UTF-8") from None
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    wrong = next((line for line in merges if line.count(" ") != 1), None)
    if wrong is not None:
        raise TokenizerError(f"merges.txt holds {wrong[:60]!r}, which is not a pair of pieces")
    normalizer, pre_tokenizer = _reading(str(config.get("tokenizer_class", "")), config)
    return {
        "added_tokens": [
            {"id": vocab[name], "content": name, "special": True} for name in _special(files) if name in vocab
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": False},
    }


def _special(files: Mapping[str, bytes]) -> list[str]:
    """Control tokens that the files name by what they are for, such as `bos_token`: OPT lists its own nowhere else."""
    given = [
        value
        for name in ("tokenizer_config.json", "special_tokens_map.json")
        for key, value in read_json(files, name).items()
        if key.endswith("_token") and value
    ]
    names = [value.get("content") if isinstance(value, Mapping) else value for value in given]
    return sorted({name for name in names if isinstance(name, str)})


def _reading(kind: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Normaliser and pre-tokenizer of a class of tokenizers."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    match kind.removesuffix("Fast"):
        case "Qwen2Tokenizer":
            words = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
            return {"type": "NFC"}, {"type": "Sequence", "pretokenizers": [words, byte_level]}
        case "GPT2Tokenizer":
            return None, byte_level | {
                "use_regex": True,
                "add_prefix_space": bool(config.get("add_prefix_space", False)),
            }
        case _:
            raise TokenizerError(
                f"tokenizer_config.json names the class {kind!r}; vocab.json and merges.txt alone are enough for "
                "Qwen2Tokenizer and GPT2Tokenizer only. transformers' AutoTokenizer writes a tokenizer.json with "
                "save_pretrained"
            )
