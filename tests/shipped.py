"""A stand-in for the model that comes with opsin: tiny, random, in the place of the shipped folder."""

from pathlib import Path

import pytest
import torch

from opsin import families, weights
from opsin.spec.model import VLMConfig
from toys import byte_tokenizer


def write_shipped(folder: Path, config: VLMConfig | None = None) -> Path:
    """A native folder as it ships: config, half-precision weights, tokenizer."""
    config = config or families.preset("qwen2-vl-tiny").config
    vlm = weights.build(config, seed=1).to(torch.float16)
    weights.save_native(folder, vlm, config, byte_tokenizer(folder.with_name("tokenizer")))
    return folder


def put_in_place(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have `opsin-mini` lead there."""
    monkeypatch.setattr("opsin.weights.shipped.FOLDER", folder)
