"""What both runs start from: pairs of pictures and captions, a tokenizer, and models that know nothing.

    python experiments/ucm/prepare.py DATA [OUT]

DATA  folder with captions.jsonl (image, split, captions) and the pictures
OUT   data/{train,val}-pairs.jsonl    one record per picture and caption, shuffled, to train on and to judge by
      data/{val,test}.jsonl           one record per picture with its five captions, for `opsin eval`
      tokenizer/                      BERT's kind (WordPiece): the words of the training captions, and single letters
      start/                          the model of stage 1: tower, Q-Former with its text side, heads
      start-captions/                 the model of stage 2: the same tower and Q-Former, and a small language model
"""

import argparse
import json
import math
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsin import weights
from opsin.families.blip2 import EVA_VIT_G, OPT_2_7B
from opsin.spec.chat import AssistantTurn, ChatFormat, Control, ImageMarkup, UserTurn
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import QFormerConfig, RetrieverConfig
from opsin.spec.resolution import Squash
from opsin.text.cleaning import clean_caption
from opsin.text.tokenizer import load_tokenizer

CONTROLS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
TILE, LONGEST = 72, 32
"""Side in pixels that pictures are stretched to; tokens of the longest text."""
TOWER = EVA_VIT_G.replace(image_size=TILE, patch_size=12, dim=128, num_layers=3, num_heads=4, mlp_dim=512)
QFORMER = QFormerConfig(num_queries=6, dim=96, num_layers=3, num_heads=4, mlp_dim=384, dropout=0.0)
DECODER = OPT_2_7B.replace(dim=96, num_layers=2, num_heads=4, num_kv_heads=4, mlp_dim=384, max_positions=64)
CHAT = ChatFormat(
    name="caption",
    begin=(Control(token="[DEC]"),),
    user=UserTurn(text="discard"),
    assistant=AssistantTurn(),
    end=(Control(token="[SEP]", supervised=True),),
    markup=ImageMarkup(placement="first"),
    stop_tokens=("[SEP]",),
)
"""The picture's rows, `[DEC]`, the caption, `[SEP]`."""


def records(data: Path, split: str) -> list[dict[str, Any]]:
    """The pictures of one split, with their captions."""
    with (data / "captions.jsonl").open(encoding="utf-8") as file:
        return [record for record in map(json.loads, file) if record["split"] == split]


def write_data(data: Path, folder: Path) -> None:
    """The files of records. Paths of pictures are as seen from there."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        pictures = [
            {"image": os.path.relpath(data / record["image"], folder), "captions": record["captions"]}
            for record in records(data, split)
        ]
        pairs = [{"image": each["image"], "caption": text} for each in pictures for text in each["captions"]]
        random.Random(0).shuffle(pairs)  # a pass over the file in its order then meets many pictures
        for name, rows in ((f"{split}-pairs", pairs), (split, pictures)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_tokenizer(folder: Path, captions: Iterator[str]) -> None:
    """A tokenizer.json of BERT's kind. Words that it has never seen are spelt in letters."""
    words = {word for caption in captions for word in re.findall(r"\w+|[^\w\s]", clean_caption(caption))}
    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *range(ord("0"), ord("9") + 1))]
    pieces = [*CONTROLS, *letters, *(f"##{letter}" for letter in letters), *sorted(words - set(letters))]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": name, "special": True} for number, name in enumerate(CONTROLS)],
        "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


@torch.no_grad()
def spread(module: nn.Module) -> None:
    """Give linear layers random weights that keep the size of what goes through them.

    Those of `weights.init` (a deviation of 0.02, as published) suit models that are six and more times as wide.
    """
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.normal_(std=1 / math.sqrt(layer.in_features), generator=generator)


def prepare(data: Path, out: Path) -> None:
    """Write everything that the runs read."""
    write_data(data, out / "data")
    write_tokenizer(out / "tokenizer", (text for record in records(data, "train") for text in record["captions"]))
    tokenizer = load_tokenizer(out / "tokenizer")
    compares = RetrieverConfig(
        vision=TOWER,
        qformer=QFORMER,
        resolution=Squash(tile_size=TILE),
        vocab_size=tokenizer.vocab_size,
        max_positions=LONGEST,
        max_tokens=LONGEST,
        embed_dim=64,
    )
    retriever = weights.build_retriever(compares)
    spread(retriever)
    weights.export_retriever(out / "start", retriever, tokenizer=tokenizer)
    describes = VLMConfig(
        vision=TOWER,
        connector=QFORMER,
        decoder=DECODER.replace(vocab_size=tokenizer.vocab_size),
        resolution=Squash(tile_size=TILE),
        chat=CHAT,
    )
    vlm = weights.build(describes)
    spread(vlm)
    weights.save_native(out / "start-captions", vlm, describes, tokenizer)
    for name, model in (("stage 1", retriever), ("stage 2", vlm)):
        print(f"{name}: {sum(each.numel() for each in model.parameters()):,} parameters")
    print(f"vocabulary: {tokenizer.vocab_size} pieces")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write what the runs of this experiment read.")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/ucm"))
    given = parser.parse_args()
    prepare(given.data, given.out)
