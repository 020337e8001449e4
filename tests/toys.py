"""Small stand-ins that tests share: a byte-level tokenizer, pictures drawn from a seed."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers

from opsin.text.tokenizer import Tokenizer, load_tokenizer

CONTROLS = (
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>", "<Image>", "</Image>"),
    *("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<img>", "</img>", "<pad>"),
)


def tokenizer_folder(folder: Path, *, controls: Sequence[str] = CONTROLS) -> Path:
    """A folder with a tokenizer.json that spells every text byte by byte: control tokens first, then 256 bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*controls, *letters))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(controls))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    return folder


def byte_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of `tokenizer_folder`, loaded as a user's would be."""
    return load_tokenizer(tokenizer_folder(folder))


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of smooth colours and some noise, the same for the same size and seed."""
    random = np.random.default_rng([seed, *size])
    width, height = size
    coarse = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(smooth, np.int16) + noise, 0, 255).astype(np.uint8))
