"""The sentencepiece back end (`tokenizer.model`): Llama, Vicuna, Mistral, Yi, InternLM2."""

from collections.abc import Iterator, Mapping
from typing import Any

import sentencepiece

from opsin.errors import TokenizerError
from opsin.text.tokenizer import BaseTokenizer, Place, Tokens, read_added, read_json

# sentencepiece_model.proto: the fields and values that are used here.
PIECES, NORMALIZER, PIECE_TEXT, PIECE_TYPE, ADD_DUMMY_PREFIX = 1, 3, 1, 3, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SPACE = "\u2581"


class SentencePieceTokenizer(BaseTokenizer):
    """A sentencepiece model with the added tokens and the `legacy` rule of Llama's tokenizers.

    sentencepiece puts a space (its dummy prefix) before each text it is given. At the start that is always so. After a
    control token it is so for `legacy` tokenizers, which hand each text between control tokens over by itself; newer
    ones do not, so `</s>USER` is `</s>`, `USER` and not `</s>`, `_US`, `ER`.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        config = read_json(files, "tokenizer_config.json")
        added = read_added(files)
        added_ids = frozenset(added.values())
        try:
            model, has_prefix = _without_markup(files["tokenizer.model"], added_ids)
            plain = sentencepiece.SentencePieceProcessor(model_proto=model + _dummy_prefix(False))
        except (RuntimeError, ValueError, LookupError) as error:
            raise TokenizerError(f"tokenizer.model is not a sentencepiece model: {error}") from None
        size = plain.get_piece_size()
        special = [i for i in range(size) if plain.is_control(i) or plain.is_unknown(i)]
        controls = {plain.id_to_piece(i): i for i in special if i not in added_ids} | added
        super().__init__(files, controls, max(size, 1 + max(controls.values(), default=0)))
        self._plain = plain
        self._size = size
        legacy = config.get("legacy", True) is not False
        at_start = has_prefix if legacy else config.get("add_prefix_space", True) is not False
        self._prefixed = (
            sentencepiece.SentencePieceProcessor(model_proto=model + _dummy_prefix(True)) if at_start else plain
        )
        self._after_control = self._prefixed if legacy else plain
        self.strips_first_space = at_start

    def encode(self, text: str, place: Place) -> Tokens:
        """Ids of a text. None is ever a control token, whatever the text says."""
        processor = self._prefixed if place == "start" else self._after_control
        ids, starts = _read_answer(processor.encode(text, out_type="serialized_proto"))
        if not text.isascii():
            starts = _to_characters(text, starts)
        return Tokens(ids, starts)

    def _spell(self, token_id: int) -> bytes:
        if token_id >= self._size:
            return b""
        piece: str = self._plain.id_to_piece(token_id)
        if self._plain.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace(SPACE, " ").encode()


def _without_markup(model: bytes, added_ids: frozenset[int]) -> tuple[bytes, bool]:
    """The model with every piece that stands for a control token out of reach of text.

    Such are the pieces whose ids added tokens take over (InternLM2's `[UNUSED_TOKEN_145]` is `<|im_end|>`) and those
    that a model finds in text although they look like tags (Yi's `<|im_end|>`). They become control pieces, which
    sentencepiece never produces. Returns the model and whether it has a dummy prefix.
    """
    parts: list[bytes] = []
    has_prefix = True
    number = 0
    for field, value, raw in _raw_fields(model):
        if field == NORMALIZER:
            has_prefix = bool(dict(_fields(value)).get(ADD_DUMMY_PREFIX, 1))
        if field == PIECES:
            # Most pieces are ordinary: their last field is the score, so their type need not be looked for.
            if number in added_ids or value[-2:-1] == _key(PIECE_TYPE, 0):
                values = dict(_fields(value))
                text, kind = values[PIECE_TEXT].decode(), values.get(PIECE_TYPE, NORMAL)
                is_tag = kind == USER_DEFINED and len(text) > 2 and text[0] == "<" and text[-1] == ">"
                if is_tag or (number in added_ids and kind not in (UNKNOWN, CONTROL)):
                    value += _key(PIECE_TYPE, 0) + _varint(CONTROL)  # of a field given twice, the last counts
                    raw = _key(PIECES, 2) + _varint(len(value)) + value
            number += 1
        parts.append(raw)
    return b"".join(parts), has_prefix


def _dummy_prefix(add: bool) -> bytes:
    """To append to a model: protobuf joins two values of one message, and the later one counts."""
    setting = _key(ADD_DUMMY_PREFIX, 0) + _varint(add)
    return _key(NORMALIZER, 2) + _varint(len(setting)) + setting


def _read_answer(data: bytes) -> tuple[list[int], list[int]]:
    """Ids and byte offsets of one encode call (a SentencePieceText of sentencepiece.proto).

    The same serialised answer is what every release of sentencepiece gives; its Python classes changed. As the fields
    of the message and of the pieces in it have keys of their own, the whole is read as one flat list of fields.
    """
    text_or_piece, pieces, token_id, surface, begin, end = 0x0A, 0x12, 0x10, 0x1A, 0x20, 0x28
    ids: list[int] = []
    starts: list[int] = []
    position, size = 0, len(data)
    while position < size:
        key = data[position]
        number, position = data[position + 1], position + 2
        if number > 127:
            number, position = _read_varint(data, position - 1)
        if key == token_id:
            ids.append(number)
        elif key == begin:
            starts.append(number)
        elif key in (text_or_piece, surface):
            position += number
        elif key not in (pieces, end):
            break  # the score, which is last
    assert len(ids) == len(starts), "sentencepiece left out an offset"
    return ids, starts


def _to_characters(text: str, offsets: list[int]) -> list[int]:
    """Byte offsets in the text's UTF-8 as character offsets."""
    positions = []
    for position, character in enumerate(text):
        positions += [position] * len(character.encode())
    positions.append(len(text))
    return [positions[offset] for offset in offsets]


def _key(field: int, wire: int) -> bytes:
    return bytes([field << 3 | wire])


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protobuf message: (number, int for numbers or bytes for anything else)."""
    for field, value, _ in _raw_fields(data):
        yield field, value


def _raw_fields(data: bytes) -> Iterator[tuple[int, Any, bytes]]:
    """As `_fields`, with the bytes of the whole field. Raises ValueError or IndexError for data that is no protobuf."""
    position = 0
    while position < len(data):
        begin = position
        key, position = _read_varint(data, position)
        wire = key & 7
        value: Any
        if wire == 0:
            value, position = _read_varint(data, position)
        elif wire in (1, 2, 5):
            if wire == 2:
                size, position = _read_varint(data, position)
            else:
                size = 8 if wire == 1 else 4
            value = data[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {wire} at byte {begin}")
        if position > len(data):
            raise ValueError(f"it ends inside a field that begins at byte {begin}")
        yield key >> 3, value, data[begin:position]


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """A number and the position after it."""
    value = data[position]
    if value < 128:
        return value, position + 1
    value &= 127
    for shift in range(7, 70, 7):
        position += 1
        byte = data[position]
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + 1
    raise ValueError(f"a number of more than 64 bits before byte {position}")
