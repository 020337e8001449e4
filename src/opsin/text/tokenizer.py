"""Text to ids and back. Text never becomes a control token: those are asked for by name.

Back ends: sentencepiece (`tokenizer.model`), tiktoken (`qwen.tiktoken`) and Hugging Face tokenizers (`tokenizer.json`,
`vocab.json` with `merges.txt`, or `vocab.txt`). Each reports where in the text every token starts, so that
nothing has to be tokenised a second time to find out which ids belong to an answer.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from opsin.errors import TokenizerError, nearest

Place = Literal["start", "after_control"]
"""Where a text stands: at the start of a conversation or after a picture (LLaVA tokenises the texts between pictures
one by one, so each is a start of its own), or right after a control token."""

MAIN_FILES = ("tokenizer.model", "qwen.tiktoken", "tokenizer.json", "vocab.json", "vocab.txt")
"""Files of which a tokenizer has at least one."""

FILES = (
    *(*MAIN_FILES, "merges.txt", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json"),
)
"""Files that say what a tokenizer does. What else a repository holds is not read."""

MARK = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
"""How a control token stands in a tokenizer.json and in a tokenizer_config.json."""


class Tokens(NamedTuple):
    """Ids of a text, and where each begins."""

    ids: list[int]
    starts: list[int]
    """Character in the text at which the token begins, never decreasing. A space that the tokenizer puts in front of a
    text begins at 0; the bytes of one character all begin at that character."""


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, control tokens included."""

    @property
    def controls(self) -> Mapping[str, int]:
        """Id of every control token."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files it was loaded from, by name."""

    @property
    def strips_first_space(self) -> bool:
        """Whether texts start with a space of the tokenizer's making, which decoding takes off again."""

    @property
    def swallowing(self) -> Collection[str]:
        """Control tokens that take the white space of a text after them away (`rstrip`; Phi-3's turn marks)."""

    def encode(self, text: str, place: Place) -> Tokens:
        """Ids of a text. None is ever a control token, whatever the text says.

        (In a vocabulary without bytes, the unknown token stands for characters that cannot be spelt.)
        """

    def control_id(self, token: str) -> int:
        """Id of a control token. Raises TokenizerError naming the nearest one."""

    def token_bytes(self, token_id: int) -> bytes:
        """What one id spells, in UTF-8 that may end inside a character; nothing for control tokens and unknown ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, control tokens left out."""

    def save(self, folder: Path) -> None:
        """Write the files it was loaded from."""


class TextStream:
    """Decodes ids one at a time: pieces of text that, joined, are what `decode` gives for all ids at once.

    Each call costs as much as its own token, however long the answer, and no piece ends inside a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips_space = tokenizer.strips_first_space

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often empty inside a character of several tokens."""
        data = self._tokenizer.token_bytes(token_id)
        if data and self._strips_space:
            self._strips_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What was held back: a replacement character when the ids end inside a character."""
        return self._decoder.decode(b"", final=True)


class BaseTokenizer(ABC):
    """What all back ends share: control tokens, decoding and files."""

    def __init__(self, files: Mapping[str, bytes], controls: Mapping[str, int], vocab_size: int) -> None:
        self.files = dict(files)
        self.controls: Mapping[str, int] = dict(controls)
        self.vocab_size = vocab_size
        self.strips_first_space = False
        self.swallowing = read_swallowing(files)
        self._control_ids = frozenset(self.controls.values())
        self._spellings: dict[int, bytes] = {}

    def control_id(self, token: str) -> int:
        """Id of a control token. Raises TokenizerError naming the nearest one."""
        try:
            return self.controls[token]
        except KeyError:
            raise TokenizerError(
                f"the tokenizer has no control token {token!r}{nearest(token, self.controls)} among its "
                f"{len(self.controls)}; the chat format belongs to another tokenizer"
            ) from None

    def token_bytes(self, token_id: int) -> bytes:
        """What one id spells; nothing for control tokens and ids without a token."""
        spelling = self._spellings.get(token_id)
        if spelling is None:
            known = 0 <= token_id < self.vocab_size and token_id not in self._control_ids
            spelling = self._spellings[token_id] = self._spell(token_id) if known else b""
        return spelling

    @abstractmethod
    def encode(self, text: str, place: Place) -> Tokens:
        """Ids of a text. None is ever a control token, whatever the text says."""

    @abstractmethod
    def _spell(self, token_id: int) -> bytes:
        """What a known id that is no control token spells."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, control tokens left out."""
        stream = TextStream(self)
        return "".join(map(stream.push, ids)) + stream.finish()

    def save(self, folder: Path) -> None:
        """Write the files it was loaded from."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)


def has_tokenizer(folder: Path) -> bool:
    """Whether `load_tokenizer` would find one there."""
    return any((folder / name).is_file() for name in MAIN_FILES)


def load_tokenizer(folder: Path, *, legacy: bool | None = None) -> Tokenizer:
    """The tokenizer of a model folder; `tokenizer.model` where there is one, since the published ids were made with it.

    legacy: Llama tokenizers only: whether text after a control token starts with a space of the tokenizer's making, as
    text at the start does. None reads it from the folder (Vicuna v1.5 says false; files that say nothing mean true).
    Raises TokenizerError when the folder holds no tokenizer or one that cannot be read.
    """
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if legacy is not None:
        config = read_json(files, "tokenizer_config.json")
        files["tokenizer_config.json"] = json.dumps({**config, "legacy": legacy}, indent=2).encode()
    try:
        if "tokenizer.model" in files:
            from opsin.text._sentencepiece import SentencePieceTokenizer

            return SentencePieceTokenizer(files)
        if "qwen.tiktoken" in files:
            from opsin.text._tiktoken import TiktokenTokenizer

            return TiktokenTokenizer(files)
        model = read_json(files, "tokenizer.json").get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        if kind in ("WordPiece", "Unigram") or ("vocab.txt" in files and kind is None and "vocab.json" not in files):
            from opsin.text._pieces import PieceTokenizer

            return PieceTokenizer(files)
        if "tokenizer.json" in files or "vocab.json" in files:
            from opsin.text._huggingface import HuggingFaceTokenizer

            return HuggingFaceTokenizer(files)
    except TokenizerError as error:
        raise TokenizerError(f"{folder}: {error}") from None
    found = sorted(path.name for path in folder.iterdir())[:20] if folder.is_dir() else "no such folder"
    raise TokenizerError(
        f"{folder} holds neither tokenizer.model nor tokenizer.json, nor qwen.tiktoken, nor vocab.json with "
        f"merges.txt (found: {found}). "
        "Copy one from the model's repository; transformers' AutoTokenizer writes a tokenizer.json from older files "
        "with save_pretrained."
    )


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """One of the files as a JSON object; empty when there is no such file. Raises TokenizerError."""
    if name not in files:
        return {}
    try:
        data = json.loads(files[name])
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise TokenizerError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise TokenizerError(f"{name} holds a {type(data).__name__} where a JSON object is needed")
    return data


def read_added(files: Mapping[str, bytes]) -> dict[str, int]:
    """Tokens that tokenizer_config.json and added_tokens.json add, by name. Raises TokenizerError."""
    added: dict[str, int] = {}
    try:
        for name, token_id in read_json(files, "added_tokens.json").items():
            added[name] = int(token_id)
        for token_id, token in read_json(files, "tokenizer_config.json").get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(token_id)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise TokenizerError("the added tokens in tokenizer_config.json or added_tokens.json are malformed") from None
    return added


def read_swallowing(files: Mapping[str, bytes]) -> frozenset[str]:
    """Tokens in tokenizer_config.json that take the white space after them away, by name. Raises TokenizerError."""
    try:
        listed = read_json(files, "tokenizer_config.json").get("added_tokens_decoder", {}).values()
        return frozenset(token["content"] for token in listed if token.get("rstrip"))
    except (AttributeError, KeyError, TypeError):
        raise TokenizerError("the added tokens in tokenizer_config.json are malformed") from None
