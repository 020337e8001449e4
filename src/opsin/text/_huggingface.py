"""The Hugging Face `tokenizers` back end (`tokenizer.json`), for byte-pair encodings."""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import tokenizers

from opsin.errors import TokenizerError
from opsin.text._merges import from_vocab_and_merges
from opsin.text.tokenizer import BaseTokenizer, Place, Tokens, read_added, read_json

SPACE = "\u2581"
Prefix = Literal["always", "first", "never"]
"""Which texts start with a space of the tokenizer's making: all, only the first of a conversation, or none."""


class HuggingFaceTokenizer(BaseTokenizer):
    """A `tokenizer.json` whose control tokens are taken out of everything that looks at text.

    Added tokens are not matched, there is no post-processor, and control tokens are struck from the vocabulary, so no
    text can reach them. Added tokens of nothing but white space are no control tokens and stay (GPT-NeoX has many).
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        data = read_json(files, "tokenizer.json") if "tokenizer.json" in files else from_vocab_and_merges(files)
        model = data.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            kind = model.get("type") if isinstance(model, dict) else None
            raise TokenizerError(
                f"tokenizer.json holds a model of type {kind!r}; only 'BPE', 'WordPiece' and 'Unigram' can be used"
            )
        try:
            vocab = {str(name): int(token_id) for name, token_id in model["vocab"].items()}
            added = {token["content"]: token for token in data.get("added_tokens") or []}
            blanks = {
                name: int(added[name]["id"]) for name in added if name.isspace() and not added[name].get("special")
            }
            controls = {name: int(token["id"]) for name, token in added.items()} | read_added(files)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise TokenizerError("tokenizer.json has a malformed 'vocab' or malformed 'added_tokens'") from None
        controls = {name: token_id for name, token_id in controls.items() if name not in blanks}
        last = max([*vocab.values(), *controls.values(), *blanks.values()], default=-1)
        super().__init__(files, controls, last + 1)
        self.swallowing |= {name for name, token in added.items() if token.get("rstrip")}
        is_byte_level = any(part.get("type") == "ByteLevel" for part in _parts(data.get("decoder")))
        self._letters = _byte_letters() if is_byte_level else None
        self._has_byte_tokens = bool(model.get("byte_fallback"))
        self._names = {token_id: name for name, token_id in vocab.items()}
        self._blanks = {token_id: name for name, token_id in blanks.items()}

        prefix = _prefix(data)
        self.strips_first_space = prefix != "never"
        legacy = read_json(files, "tokenizer_config.json").get("legacy")
        after_control: Prefix = prefix
        if prefix != "never":
            after_control = "always" if (prefix == "always" if legacy is None else legacy) else "never"
        data["model"] = _without(model, vocab, frozenset(controls), blanks)
        data["added_tokens"] = [added[name] for name in blanks]
        at_start: Prefix = "never" if prefix == "never" else "always"
        self._at_start = _build(data, at_start)
        self._after_control = self._at_start if after_control == at_start else _build(data, "never")

    def encode(self, text: str, place: Place) -> Tokens:
        """Ids of a text. None is ever a control token, whatever the text says."""
        backend = self._at_start if place == "start" else self._after_control
        encoding = backend.encode(text, add_special_tokens=False)
        return Tokens(encoding.ids, [start for start, _ in encoding.offsets])

    def _spell(self, token_id: int) -> bytes:
        if token_id in self._blanks:
            return self._blanks[token_id].encode()
        name = self._names.get(token_id, "")
        if self._letters is not None:
            return bytes(self._letters[letter] for letter in name)
        if self._has_byte_tokens and len(name) == 6 and name.startswith("<0x"):
            return bytes([int(name[3:5], 16)])
        return name.replace(SPACE, " ").encode()


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, which may be a sequence of parts."""
    if isinstance(tree, dict):
        yield tree
        for key in ("normalizers", "pretokenizers", "decoders"):
            for part in tree.get(key) or []:
                yield from _parts(part)


def _prefix(data: dict[str, Any]) -> Prefix:
    """How the file says it: by a `Prepend` normalizer (older files) or by `Metaspace` (newer ones)."""
    if any(part.get("type") == "Prepend" for part in _parts(data.get("normalizer"))):
        return "always"
    for part in _parts(data.get("pre_tokenizer")):
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            return "first" if scheme == "first" else "never" if scheme == "never" else "always"
    return "never"


def _without(
    model: dict[str, Any], vocab: dict[str, int], controls: frozenset[str], blanks: dict[str, int]
) -> dict[str, Any]:
    """The model without control tokens, and with the white space that is kept under its own ids."""
    model = {**model, "vocab": {name: token_id for name, token_id in vocab.items() if name not in controls} | blanks}
    unknown = model.get("unk_token")
    if unknown in controls and unknown in vocab:
        if model.get("byte_fallback"):
            model["unk_token"] = None  # every text can be spelt in bytes
        else:
            model["vocab"][unknown] = vocab[unknown]
    if controls & vocab.keys():
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
        model["merges"] = [pair for pair in pairs if controls.isdisjoint((*pair, "".join(pair)))]
    return model


def _build(data: dict[str, Any], prefix: Prefix) -> tokenizers.Tokenizer:
    data = {**data, "post_processor": None, "truncation": None, "padding": None}
    for key in ("normalizer", "pre_tokenizer"):
        data[key] = _with_prefix(copy.deepcopy(data.get(key)), prefix)
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # the library raises plain Exception for every kind of bad file
        raise TokenizerError(f"tokenizer.json cannot be used: {error}") from None


def _with_prefix(tree: Any, prefix: Prefix) -> Any:
    """A normalizer or pre-tokenizer that puts a space before all texts or before none."""
    if not isinstance(tree, dict) or (tree.get("type") == "Prepend" and prefix == "never"):
        return None
    for part in _parts(tree):
        for key in ("normalizers", "pretokenizers"):
            if key in part and prefix == "never":
                part[key] = [inner for inner in part[key] if inner.get("type") != "Prepend"]
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = prefix
            part.pop("add_prefix_space", None)
    return tree


def _byte_letters() -> dict[str, int]:
    """The letters byte-level vocabularies write bytes with: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
