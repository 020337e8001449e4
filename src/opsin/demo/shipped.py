"""The parts that the demo starts from, as the real recipe starts from CLIP and Vicuna: where they lie, what they are."""

from pathlib import Path

from opsin.demo.scene import PATCH, SIDE
from opsin.spec.decoder import DecoderConfig
from opsin.spec.vision import VisionConfig

PARTS = Path(__file__).parent / "parts"
"""Folder with tower.safetensors, decoder.safetensors and tokenizer.json; docs/demo_parts.md says how they were made."""

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
"""CLIP's shape at a hundredth of its size. As LLaVA does, the demo reads the output of the last block but one."""


def decoder_config(vocab_size: int) -> DecoderConfig:
    """The language model: Llama's shape."""
    return DecoderConfig(
        vocab_size=vocab_size, dim=160, num_layers=5, num_heads=5, num_kv_heads=5, mlp_dim=432, max_positions=1024
    )
