"""The model: LLaVA-1.5's construction in miniature, for pictures of 400x100 px.

Patches of 25 px fit the layout: a box is 4x4 of them, a gap 4x2, and none mixes box and gap. Each becomes a row of the
language model. The tower's place table is stretched over the picture's 4x16 patches, as the bicubic forms of published
towers are.
"""

from opsin.demo.shipped import CHAT
from opsin.spec.connector import MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native
from opsin.spec.vision import VisionConfig
from opsin.text.tokenizer import Tokenizer

PATCH = 25
ROWS, COLUMNS = 4, 16
"""Patches of a picture, down and across."""
TOWER = VisionConfig(
    image_size=PATCH * COLUMNS,
    patch_size=PATCH,
    dim=160,
    num_layers=4,
    num_heads=5,
    mlp_dim=480,
    out_layers=(-1,),
    class_token="none",
    positions="learned_bicubic",
    last_norm=False,
    mean=(0.7, 0.7, 0.6),
    std=(0.3, 0.3, 0.3),
)
RESOLUTION = Native(factor=PATCH, min_pixels=1, max_pixels=PATCH**2 * ROWS * COLUMNS, video=None)


def config(words: Tokenizer) -> VLMConfig:
    """The whole model, with a row for each token of the tokenizer."""
    return VLMConfig(
        vision=TOWER,
        connector=MLPConnector(),
        decoder=DecoderConfig(
            vocab_size=words.vocab_size,
            dim=160,
            num_layers=4,
            num_heads=5,
            num_kv_heads=5,
            mlp_dim=432,
            max_positions=1024,
        ),
        resolution=RESOLUTION,
        chat=CHAT.replace(name="nlvr"),
        image_token_id=words.control_id("<image>"),
    )
