"""Tiny models with weights large enough that their next tokens are far from ties."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from opsin import families, weights
from opsin.encode import Encoder
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.text.tokenizer import Tokenizer
from toys import byte_tokenizer

TINY = ("llava-tiny", "llava-1.5-tiny", "llava-next-tiny")


@dataclass
class Toy:
    """What `weights.Model` holds, as far as answering goes."""

    vlm: VLM
    config: VLMConfig
    tokenizer: Tokenizer

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.config, self.tokenizer)


def sharpen(vlm: VLM, factor: float = 4.0) -> VLM:
    """Fresh weights give almost even logits, whose order rounding could change; larger ones do not."""
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.mul_(factor)
    return vlm.eval()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session", params=TINY)
def toy(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Toy:
    """Every family's tiny model."""
    config = families.preset(request.param).config
    return Toy(sharpen(weights.build(config, seed=1)), config, tokenizer)


@pytest.fixture(scope="session")
def llava15(tokenizer: Tokenizer) -> Toy:
    """One tiny model, where one is enough."""
    config = families.preset("llava-1.5-tiny").config
    return Toy(sharpen(weights.build(config, seed=1)), config, tokenizer)
