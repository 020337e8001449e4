"""The demo's tokenizer: whole words for its own sentences, letters and digits for what is to be read, else bytes.

A byte-pair encoding without merges: a piece that is a known word is one token, any other is spelled in bytes. Capitals
and digits are pieces of their own, so that a written word is spelled letter by letter, in pictures as in answers.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from opsin.demo.tasks import text_sample

CONTROLS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
PIECES = (
    r" ?(?:USER|ASSISTANT):|[A-Z](?![a-z])|\d| ?[A-Z][a-z]+| ?[a-z]+| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s"  # tried in order
)
NUM_SAMPLES = 5000
"""Samples whose text makes the vocabulary; all words occur within the first few hundred."""
DESCRIBE = ("Describe the picture.", "What do you see?", "What is in the picture?")
"""Instructions whose answer is the caption."""


def sentences() -> list[str]:
    """What the demo's pictures are captioned and asked, as often as it takes to hold every word."""
    text = ["USER: ASSISTANT: \n", *DESCRIBE, *(f" {line}" for line in DESCRIBE)]
    for index in range(NUM_SAMPLES):
        sample = text_sample(0, index, "train", num_questions=12)
        # Every sentence stands at a start, after a line break, and after a space.
        said = [sample.caption, *(question.text for question in sample.questions)]
        text += [f"{sentence}\n {sentence}" for sentence in said]
        text += [f" {question.answer}" for question in sample.questions]
    return text


def vocabulary(text: Iterable[str], *, controls: Sequence[str] = CONTROLS, pieces: str = PIECES) -> dict[str, int]:
    """Ids of all tokens, by their byte-level spelling: control tokens, the 256 bytes, then words in order."""
    letters = byte_letters()
    words = {piece for line in text for piece in re.findall(pieces, line) if len(piece) > 1}
    spelled = ["".join(letters[byte] for byte in word.encode()) for word in sorted(words)]
    return {token: index for index, token in enumerate([*controls, *(letters[b] for b in range(256)), *spelled])}


def write_tokenizer(
    folder: Path,
    vocab: Mapping[str, int],
    *,
    controls: Sequence[str] = CONTROLS,
    pieces: str = PIECES,
    ends: Mapping[str, str] = ENDS,
) -> int:
    """Write tokenizer.json and tokenizer_config.json; returns the number of tokens.

    pieces: what a text is cut into first, as a regular expression. ends: which control tokens have which part.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": pieces}, "behavior": "Isolated", "invert": False}
    data: dict[str, object] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in controls],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": dict(vocab),
            "merges": [],
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **ends, "clean_up_tokenization_spaces": False}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return len(vocab)


def byte_letters() -> list[str]:
    """The letter that byte-level vocabularies write each byte with: printable Latin-1 as itself, others from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, others = [], 0
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(256 + others))
            others += 1
    return letters
