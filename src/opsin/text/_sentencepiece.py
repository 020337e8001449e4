"""The sentencepiece back end (`tokenizer.model`): Llama, Vicuna, Mistral, Yi, InternLM2."""

from collections.abc import Iterator, Mapping
from typing import Any

import sentencepiece

from opsin.errors import TokenizerError
from opsin.text.tokenizer import BaseTokenizer, Place, Tokens, read_added, read_json

# sentencepiece_model.proto: the fields and values that are used here.
PIECES, NORMALIZER, PIECE_TEXT, PIECE_TYPE, ADD_DUMMY_PREFIX = 1, 3, 1, 3, 3
CONTROL, USER_DEFINED = 3, 4
# sentencepiece.proto: the answer to one encode call.
ANSWER_PIECES, ANSWER_ID, ANSWER_BEGIN = 2, 2, 4
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
        try:
            model, has_prefix, marked = _without_markup(files["tokenizer.model"], frozenset(added.values()))
            plain = sentencepiece.SentencePieceProcessor(model_proto=model + _dummy_prefix(False))
        except (RuntimeError, ValueError, IndexError) as error:
            raise TokenizerError(f"tokenizer.model is not a sentencepiece model: {error}") from None
        size = plain.get_piece_size()
        special = [i for i in range(size) if plain.is_control(i) or plain.is_unknown(i)]
        controls = {plain.id_to_piece(i): i for i in [*special, *marked] if i not in added.values()} | added
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
        ids, starts = [], []
        for field, piece in _fields(processor.encode(text, out_type="serialized_proto")):
            if field == ANSWER_PIECES:
                values = dict(_fields(piece))
                ids.append(values[ANSWER_ID])
                starts.append(values.get(ANSWER_BEGIN, 0))
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


def _without_markup(model: bytes, added_ids: frozenset[int]) -> tuple[bytes, bool, list[int]]:
    """The model with every piece that stands for a control token out of reach of text.

    Such are the pieces whose ids added tokens take over (InternLM2's `[UNUSED_TOKEN_145]` is `<|im_end|>`) and those
    that a model finds in text although they look like tags (Yi's `<|im_end|>`). They become control pieces, which
    sentencepiece never produces. Returns the model, whether it has a dummy prefix, and the ids of the tags.
    """
    parts: list[bytes] = []
    tags: list[int] = []
    has_prefix = True
    number = 0
    for field, value, raw in _raw_fields(model):
        if field == NORMALIZER:
            has_prefix = bool(dict(_fields(value)).get(ADD_DUMMY_PREFIX, 1))
        if field == PIECES:
            # Most pieces are ordinary: their last field is the score, so their type need not be looked for.
            if number in added_ids or value[-2:-1] == _key(PIECE_TYPE, 0):
                values = dict(_fields(value))
                text = values[PIECE_TEXT].decode()
                is_tag = values.get(PIECE_TYPE) == USER_DEFINED and len(text) > 2 and text[0] == "<" and text[-1] == ">"
                if is_tag:
                    tags.append(number)
                if is_tag or number in added_ids:
                    value += _key(PIECE_TYPE, 0) + _varint(CONTROL)  # of a field given twice, the last counts
                    raw = _key(PIECES, 2) + _varint(len(value)) + value
            number += 1
        parts.append(raw)
    return b"".join(parts), has_prefix, tags


def _dummy_prefix(add: bool) -> bytes:
    """To append to a model: protobuf joins two values of one message, and the later one counts."""
    setting = _key(ADD_DUMMY_PREFIX, 0) + _varint(add)
    return _key(NORMALIZER, 2) + _varint(len(setting)) + setting


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
    position, end = 0, len(data)
    while position < end:
        begin = position
        key = shift = 0
        while True:
            byte = data[position]
            position += 1
            key |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        wire = key & 7
        value: Any
        if wire in (0, 2):
            number = shift = 0
            while True:
                byte = data[position]
                position += 1
                number |= (byte & 127) << shift
                if byte < 128:
                    break
                shift += 7
            value = number
            if wire == 2:
                value = data[position : position + number]
                position += number
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value = data[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {wire} at byte {begin}")
        if position > end:
            raise ValueError(f"it ends inside a field that begins at byte {begin}")
        yield key >> 3, value, data[begin:position]
