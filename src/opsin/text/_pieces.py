"""The Hugging Face `tokenizers` back end for the two encodings of pieces: WordPiece (BERT) and Unigram (T5).

WordPiece   words cut at marks, the longest piece first; pieces inside a word begin with `##`; [UNK] for the rest
Unigram     the likeliest cut; spaces are U+2581, and every text, or every word, begins with one
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from opsin.errors import TokenizerError
from opsin.text.tokenizer import BaseTokenizer, Place, Tokens, read_added, read_json

SPACE = "\u2581"
BERT_CONTROLS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLOSING = frozenset(".,?!")
"""Marks that stand at the word before them (transformers, clean_up_tokenization)."""
SHORT_FORMS = re.compile(r" (n't|'(?:m|s|ve|re))")
"""What stands at the word before it, likewise."""


class PieceTokenizer(BaseTokenizer):
    """A `tokenizer.json` of either kind, or BERT's `vocab.txt`, whose control tokens no text can reach.

    Added tokens are not matched in text and there is no post-processor, so what text could still become is a piece of
    the same spelling; those are given a spelling that no text has, at their place in the vocabulary, which is the id.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        data = read_json(files, "tokenizer.json") if "tokenizer.json" in files else _from_vocab(files)
        try:
            model, kind = dict(data["model"]), data["model"]["type"]
            names = _names(model)
            added = {token["content"]: int(token["id"]) for token in data.get("added_tokens") or []}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise TokenizerError("tokenizer.json has a malformed 'vocab' or malformed 'added_tokens'") from None
        controls = added | read_added(files)
        super().__init__(files, controls, max([*names, *controls.values()], default=-1) + 1)
        self._names = names
        self._is_unigram = kind == "Unigram"
        self._inside = str(model.get("continuing_subword_prefix", "##"))
        self._unknown = model.get("unk_id") if self._is_unigram else controls.get(str(model.get("unk_token")))
        self.strips_first_space = True
        hidden = {token_id for token_id in controls.values() if token_id != self._unknown}
        if self._is_unigram:
            model["vocab"] = [
                [_unspeakable(number), score] if number in hidden else [name, score]
                for number, (name, score) in enumerate(model["vocab"])
            ]
        else:
            model["vocab"] = {_unspeakable(i) if i in hidden else name: i for i, name in names.items()}
        plain = {
            **data,
            "model": model,
            "added_tokens": [],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        try:
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises plain Exception for every kind of bad file
            raise TokenizerError(f"tokenizer.json cannot be used: {error}") from None

    def encode(self, text: str, place: Place) -> Tokens:
        """Ids of a text. None but the unknown token is ever a control token, whatever the text says."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if self._control_ids.isdisjoint(encoding.ids):
            return Tokens(encoding.ids, [start for start, _ in encoding.offsets])
        kept = [i if i not in self._control_ids else self._unknown for i in encoding.ids]
        pairs = [(i, start) for i, (start, _) in zip(kept, encoding.offsets, strict=True) if i is not None]
        return Tokens([i for i, _ in pairs], [start for _, start in pairs])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, control tokens left out; of WordPiece with its short forms joined again (`isn't`)."""
        text = super().decode(ids)
        return text if self._is_unigram else SHORT_FORMS.sub(r"\1", text.replace(" ' ", "'"))

    def _spell(self, token_id: int) -> bytes:
        name = self._names.get(token_id, "")
        if self._is_unigram:
            return name.replace(SPACE, " ").encode()
        if name.startswith(self._inside):
            return name.removeprefix(self._inside).encode()
        return name.encode() if name in CLOSING else f" {name}".encode()


def _names(model: Mapping[str, Any]) -> dict[int, str]:
    """Id -> piece."""
    if model["type"] == "Unigram":
        return {number: str(name) for number, (name, _) in enumerate(model["vocab"])}
    return {int(token_id): str(name) for name, token_id in model["vocab"].items()}


def _unspeakable(token_id: int) -> str:
    """A spelling for a control token: characters that Unicode keeps out of all text, U+FDD0 and U+FDD1."""
    return f"\ufdd0{token_id}\ufdd1"


def _from_vocab(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The content of the tokenizer.json that belongs to BERT's vocab.txt. Raises TokenizerError."""
    try:
        lines = files["vocab.txt"].decode("utf-8").splitlines()
    except ValueError:
        raise TokenizerError("vocab.txt is not UTF-8") from None
    vocab = {line.rstrip("\n"): number for number, line in enumerate(lines)}
    if "[UNK]" not in vocab:
        raise TokenizerError(f"vocab.txt has no [UNK] among its {len(vocab)} lines: it is not BERT's")
    config = read_json(files, "tokenizer_config.json")
    controls = [{"id": vocab[name], "content": name, "special": True} for name in BERT_CONTROLS if name in vocab]
    return {
        "added_tokens": controls,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
            "strip_accents": config.get("strip_accents"),
            "lowercase": bool(config.get("do_lower_case", True)),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }
