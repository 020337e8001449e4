"""The parts that the demo starts from, as the real recipe starts from CLIP and Vicuna."""

from functools import cache
from pathlib import Path

from opsin.demo.scene import PATCH, SIDE
from opsin.families._chats import V1
from opsin.spec.connector import MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import Pad
from opsin.spec.vision import VisionConfig
from opsin.text.tokenizer import Tokenizer, load_tokenizer

PARTS = Path(__file__).parent / "parts"
"""Folder with the tokenizer, tower.safetensors and decoder.safetensors; docs/demo_parts.md says how they were made."""
TOWER_FILE = "tower.safetensors"
DECODER_FILE = "decoder.safetensors"

TOWER = VisionConfig(
    image_size=SIDE,
    patch_size=PATCH,
    dim=160,
    num_layers=6,
    num_heads=5,
    mlp_dim=480,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
"""CLIP's shape, small. As in LLaVA, the features are the output of the last block but one."""
CHAT = V1.replace(name="demo", system="")
"""LLaVA-1.5's format without its system text, which would be a fifth of every conversation here."""


def decoder_config(vocab_size: int) -> DecoderConfig:
    """The language model: Llama's shape, small."""
    return DecoderConfig(
        vocab_size=vocab_size, dim=160, num_layers=5, num_heads=5, num_kv_heads=5, mlp_dim=432, max_positions=1024
    )


@cache
def tokenizer() -> Tokenizer:
    """The shipped tokenizer."""
    return load_tokenizer(PARTS)


def config() -> VLMConfig:
    """The demo's model: LLaVA-1.5's construction (ViT features, two-layer MLP, padded squares) in miniature."""
    words = tokenizer()
    return VLMConfig(
        vision=TOWER,
        connector=MLPConnector(),
        decoder=decoder_config(words.vocab_size),
        resolution=Pad(tile_size=SIDE, fill=(127, 127, 127)),
        chat=CHAT,
        image_token_id=words.control_id("<image>"),
    )
