"""InternVL-1.5: how far are we to GPT-4V? (arXiv:2404.16821), April 2024, and its two small sisters.

Figure 3 of the paper, each box with the code that it is here:

                      language response                        generate/decode.py:generate
                              ^
  +-----------------------------------------------------+
  |  InternLM2-Chat-20B   (2B: 1.8B; 4B: Phi-3-mini)     |     nn/decoder.py:Decoder   nn/rope.py:rotation
  +-----------------------------------------------------+
    ^ ^ ^ 256 a tile                      ^ ^ ^                nn/vlm.py:VLM.embed   (rows in their slots)
  +------------------------------+      +-----------+
  |  MLP                         |      | tokenizer |          nn/connectors.py:PixelShuffleRows
  |  pixel shuffle: 2x2 to one   |      |           |          text/tokenise.py:tokenise
  +------------------------------+      +-----------+
    ^ ^ ^ 1024 a tile                       question           text/render.py:render   families/_chats.py:INTERNLM2_CHAT
  +------------------------------+
  |  InternViT-6B  (2B, 4B: 300M) |                            nn/vision.py:VisionTower
  +------------------------------+
    ^ 448x448 tiles, row by row, then the thumbnail            media/prepare.py:prepare
  +------------------------------+
  |  dynamic high resolution     |                             spec/resolution.py:DynamicTiles
  +------------------------------+
    picture of any size

A 512x512 picture is one tile, 256 tokens; 800x1300 becomes 2x3 tiles and a thumbnail, 1792; 640x480 becomes 4x3 and a
thumbnail, 3328. Sizes: config.json of the repositories (OpenGVLab/InternVL-Chat-V1-5 and its sisters).
"""

from opsin.families._chats import INTERNLM2_CHAT, PHI3_CHAT
from opsin.families._family import Family, Preset
from opsin.families._internvl_hub import NATIVE, ORIGINAL, chat_for, read_config
from opsin.families._internvl_layouts import internvl_layouts, internvl_part_layouts
from opsin.families._internvl_write import write_config
from opsin.families._parts import INTERNLM2_1_8B, INTERNLM2_20B, INTERNVIT_6B, INTERNVIT_300M, PHI3_MINI_128K
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import PixelShuffleConnector
from opsin.spec.decoder import DecoderConfig, DynamicScaling, RopeConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import DynamicTiles
from opsin.spec.vision import VisionConfig


def _preset(
    id: str, name: str, vision: VisionConfig, decoder: DecoderConfig, chat: ChatFormat, parameters: int
) -> Preset:
    return Preset(
        id=id,
        config=VLMConfig(
            vision=vision,
            connector=PixelShuffleConnector(),
            decoder=decoder,
            resolution=DynamicTiles(tile_size=448),
            chat=chat,
            image_token_id=decoder.vocab_size - 7,  # `<IMG_CONTEXT>`, the third of nine added tokens
        ),
        hub=(f"OpenGVLab/{name}",),
        parameters=parameters,
        source=f"OpenGVLab/{name} config.json",
    )


PRESETS = (
    _preset("internvl-1.5-26b", "InternVL-Chat-V1-5", INTERNVIT_6B, INTERNLM2_20B, INTERNLM2_CHAT, 25_514_186_112),
    _preset(
        "internvl-1.5-2b", "Mini-InternVL-Chat-2B-V1-5", INTERNVIT_300M, INTERNLM2_1_8B, INTERNLM2_CHAT, 2_205_754_368
    ),
    _preset("internvl-1.5-4b", "Mini-InternVL-Chat-4B-V1-5", INTERNVIT_300M, PHI3_MINI_128K, PHI3_CHAT, 4_146_855_936),
)

TINY = Preset(
    id="internvl-1.5-tiny",
    config=VLMConfig(
        vision=INTERNVIT_6B.replace(image_size=28, patch_size=7, dim=32, num_layers=2, num_heads=4, mlp_dim=64),
        connector=PixelShuffleConnector(),
        decoder=DecoderConfig(
            vocab_size=384,
            dim=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=96,
            rope=RopeConfig(theta=1e6, scaling=DynamicScaling(factor=3.0, trained=4096)),
        ),
        resolution=DynamicTiles(tile_size=28, max_tiles=6),
        chat=INTERNLM2_CHAT,
        image_token_id=377,
    ),
    parameters=109_712,
    source="made up for tests: 4 slots a tile, queries grouped by key head, norms on queries and keys",
)

INTERNVL15 = Family(
    name="internvl15",
    title="InternVL-1.5",
    paper="How Far Are We to GPT-4V? Closing the Gap to Commercial Multimodal Models with Open-Source Suites, "
    "arXiv:2404.16821",
    presets=PRESETS,
    tiny=TINY,
    recipes=tuple(f"internvl-1.5/{stage}-{size}" for size in ("26b", "2b", "4b") for stage in ("pretrain", "finetune")),
    matches=lambda hub: hub.get("model_type") in (ORIGINAL, NATIVE),
    accepts=lambda config: config.connector.kind == "pixel_shuffle" and config.resolution.kind == "dynamic_tiles",
    chat_for=chat_for,
    read=read_config,
    write=write_config,
    layouts=internvl_layouts,
    part_layouts=internvl_part_layouts,
    tower=lambda hub: None,
)
