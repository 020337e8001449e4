"""The tiktoken back end: Qwen's rank file `qwen.tiktoken`, one piece in base64 and its rank on each line.

Control tokens stand in no file: they follow the ranks in the order of tokenization_qwen.py, and are written down below.
"""

import base64
import unicodedata
from collections.abc import Mapping

import tiktoken

from opsin.errors import TokenizerError
from opsin.text._merges import QWEN2_WORDS
from opsin.text.tokenizer import BaseTokenizer, Place, Tokens

RANKS = "qwen.tiktoken"
CONTROLS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
"""Qwen's control tokens and the nine that Qwen-VL adds (tokenization_qwen.py)."""


class TiktokenTokenizer(BaseTokenizer):
    """Byte-pair encoding by ranks. Text is normalised (NFC) first, and never becomes a control token."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        ranks = _read_ranks(files[RANKS])
        super().__init__(
            files, {name: len(ranks) + number for number, name in enumerate(CONTROLS)}, len(ranks) + len(CONTROLS)
        )
        self._pieces = {rank: piece for piece, rank in ranks.items()}
        self._encoding = tiktoken.Encoding("qwen", pat_str=QWEN2_WORDS, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str, place: Place) -> Tokens:
        """Ids of a text. None is ever a control token, whatever the text says."""
        normal = unicodedata.normalize("NFC", text)
        ids = self._encoding.encode_ordinary(normal)
        starts, offset = [], 0
        for token_id in ids:
            starts.append(offset)
            offset += len(self._pieces[token_id])
        if not normal.isascii():
            places = [place for place, letter in enumerate(normal) for _ in letter.encode("utf-8", "replace")]
            starts = [places[min(start, len(places) - 1)] for start in starts]
        if normal != text:
            places = _places(text, normal)
            starts = [places[start] for start in starts]
        return Tokens(ids, starts)

    def _spell(self, token_id: int) -> bytes:
        return self._pieces[token_id]


def _read_ranks(data: bytes) -> dict[bytes, int]:
    """Pieces and their ranks, which must be 0, 1, 2, ... and begin with the 256 bytes in some order."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError:
            raise TokenizerError(
                f"{RANKS} line {number} is {line[:40]!r}, not a piece in base64 and its rank; download the file again"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(
            f"{RANKS} holds {len(ranks)} pieces whose ranks are not 0 to {len(ranks) - 1}, or lacks single bytes; "
            "it is cut short or not a rank file: download it again"
        )
    return ranks


def _places(text: str, normal: str) -> list[int]:
    """For every character of the normalised text, the character of `text` that it comes from.

    Letters join with the marks after them, so stretches that begin at a letter without a mark are normalised alone.
    """
    places: list[int] = []
    begin = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or (unicodedata.is_normalized("NFC", text[end]) and not unicodedata.combining(text[end])):
            places += [begin] * len(unicodedata.normalize("NFC", text[begin:end]))
            begin = end
    # The few letters that join without being marks (Hangul jamo) make the stretches too short: stay inside the text.
    return (places + [len(text) - 1] * len(normal))[: len(normal)]
