"""A sentencepiece model as a tokenizer.json, for programs that read nothing else (transformers 5 for LLaVA).

sentencepiece's BPE joins, of all neighbours that together are a piece, those whose piece has the highest score. Hugging
Face's joins by the place in a list of pairs: the list of all ways to cut a piece in two, by the piece's score.
"""

from collections.abc import Mapping
from typing import Any

import sentencepiece

from opsin.text._sentencepiece import NORMALIZER, SPACE, _fields
from opsin.text.tokenizer import MARK, read_json

TRAINER, MODEL_TYPE, BPE = 2, 3, 2
RULES, STRIPS = 1, 4
"""Of a NormalizerSpec: the name of its rules, and whether it removes white space. By default it does."""


def to_json(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """tokenizer.json of a folder with a tokenizer.model; None for a model that such a file cannot say.

    Text is encoded as the model does, save that with `legacy: false` a text that begins with a space gets no other one
    in front. A text begins with `<s>`.
    """
    model = files["tokenizer.model"]
    fields = {field: dict(_fields(value)) for field, value in _fields(model) if field in (TRAINER, NORMALIZER)}
    rules, kind = fields.get(NORMALIZER, {}), fields.get(TRAINER, {}).get(MODEL_TYPE)
    if kind != BPE or rules.get(RULES) != b"identity" or rules.get(STRIPS, 1):
        return None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(number) for number in range(processor.get_piece_size())]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    controls = [n for n in vocab.values() if processor.is_control(n) or processor.is_unknown(n)]
    joined = (n for n in vocab.values() if n not in set(controls) and not processor.is_byte(n))
    merges: list[list[str]] = []
    for number in sorted(joined, key=lambda n: (-processor.get_score(n), n)):
        piece = pieces[number]
        cuts = [(piece[:place], piece[place:]) for place in range(1, len(piece))]
        merges += sorted(
            ([left, right] for left, right in cuts if left in vocab and right in vocab),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
    config = read_json(files, "tokenizer_config.json")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    always = config.get("legacy", True) is not False
    first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    begin = config.get("add_bos_token", True) and "<s>" in vocab
    one, two = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    start = [{"SpecialToken": {"id": "<s>", "type_id": side}} for side in (0, 1)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": pieces[number], **MARK} for number in controls],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
        if always
        else None,
        "pre_tokenizer": None if always else first,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start[0], one],
            "pair": [start[0], one, start[1], two],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}},
        }
        if begin
        else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(processor.is_byte(number) for number in vocab.values()),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
