"""LLaVA-NeXT, also called LLaVA-1.6 (llava-vl.github.io/blog/2024-01-30-llava-next), January 2024.

The blog's figure of dynamic high resolution, each box with the code that it is here:

                              language response                       generate/decode.py:generate
                                      ^
  +--------------------------------------------------------------+
  |      Vicuna v1.5 7B, 13B | Mistral 7B | Nous-Hermes-2-Yi 34B  |    nn/decoder.py:Decoder
  +--------------------------------------------------------------+
     ^ ^ ^ ^ 576         ^ ^ ^ ^ h' (w' + 1)           ^ ^ ^          nn/vlm.py:VLM.embed
     whole picture       mosaic, line by line,       question         spec/resolution.py:AnyRes.layout
         |               black bars cut away,            |            (which row fills which slot)
         |               a newline row after each        |            nn/layout.py:row_table
  +---------------------------------------+              |
  |     two-layer MLP on every tile       |              |            nn/connectors.py:MLPRows
  +---------------------------------------+              |
  +---------------------------------------+              |
  |  CLIP ViT-L/14-336, fine-tuned, 24x24 |              |            nn/vision.py:VisionTower
  +---------------------------------------+              |
      ^             ^      ^      ^      ^               |
   +-----+       +-----+-----+                           |
   |     |       |  1  |  2  |                           |            media/prepare.py:prepare
   +-----+       +-----+-----+                           |
   resized to    |  3  |  4  |                     text/render.py:render
   336x336,      +-----+-----+                     families/_chats.py:
   stretched     best of five mosaics, aspect        V1, MISTRAL_INSTRUCT, CHATML_DIRECT
                 kept, black bars                                     spec/resolution.py:AnyRes.tiling

Tokens of a picture: 576 + h' (w' + 1), from 1176 for a square of 336 px to 2928 for one of 672 px.

The -hf presets are the same weights as transformers' converters left them, with transformers' arithmetic: it reads the
mosaics as (height, width), so that ties fall the other way, and it rounds before it cuts the bars (`compat="hf"`).
Small pictures get other tiles, and a few sizes another number of tokens.
Sizes: docs/MODEL_ZOO.md of haotian-liu/LLaVA @c121f04, section "LLaVA-v1.6", and the repositories' config.json.
"""

from opsin.families._chats import CHATML_DIRECT, MISTRAL_INSTRUCT, V1, with_start_end
from opsin.families._family import Family, HubConfig, Preset
from opsin.families._hub import (
    NEXT_PINPOINTS,
    is_original_layout,
    is_transformers_layout,
    read_config,
    tower_repository,
)
from opsin.families._hub_write import write_config
from opsin.families._layouts import llava_layouts, llava_part_layouts
from opsin.families._parts import CLIP_L_336, HF_EXTRA_ROWS, LLAMA2_7B, LLAMA2_13B, MISTRAL_7B, YI_34B
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import MLPConnector
from opsin.spec.decoder import DecoderConfig, RopeConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import AnyRes
from opsin.spec.vision import VisionConfig

YI_ROWS = (YI_34B.vocab_size, YI_34B.vocab_size + HF_EXTRA_ROWS)
"""Vocabulary rows of the 34B, authors' and converted: they tell its chat format from Vicuna's."""


def _original(id: str, decoder: DecoderConfig, chat: ChatFormat, repository: str, parameters: int) -> Preset:
    """As the authors published it (config.json: `image_aspect_ratio` anyres, `mm_patch_merge_type` spatial_unpad)."""
    return Preset(
        id=id,
        config=VLMConfig(
            vision=CLIP_L_336,
            connector=MLPConnector(num_layers=2),
            decoder=decoder,
            resolution=AnyRes(tile_size=336, resolutions=NEXT_PINPOINTS, merge="spatial_unpad"),
            chat=chat,
        ),
        hub=(f"liuhaotian/{repository}",),
        parameters=parameters,
        source=f"liuhaotian/{repository} config.json",
        twin=f"{id}-hf",
    )


def _converted(original: Preset, repository: str, parameters: int) -> Preset:
    """As transformers' converters published it."""
    config = original.config
    rows = config.decoder.vocab_size
    return Preset(
        id=f"{original.id}-hf",
        config=config.replace(
            decoder=config.decoder.replace(vocab_size=rows + HF_EXTRA_ROWS),
            resolution=AnyRes(tile_size=336, resolutions=NEXT_PINPOINTS, merge="spatial_unpad", compat="hf"),
            image_token_id=rows,  # `<image>` is the first row that was added: config.json, image_token_index
        ),
        hub=(f"llava-hf/{repository}",),
        parameters=parameters,
        source=f"llava-hf/{repository} config.json",
        twin=original.id,
    )


VICUNA_7B = _original("llava-next-vicuna-7b", LLAMA2_7B, V1, "llava-v1.6-vicuna-7b", parameters=7_062_906_880)
VICUNA_13B = _original("llava-next-vicuna-13b", LLAMA2_13B, V1, "llava-v1.6-vicuna-13b", parameters=13_350_844_416)
MISTRAL = _original(
    "llava-next-mistral-7b", MISTRAL_7B, MISTRAL_INSTRUCT, "llava-v1.6-mistral-7b", parameters=7_566_223_360
)
YI = _original("llava-next-34b", YI_34B, CHATML_DIRECT, "llava-v1.6-34b", parameters=34_751_166_464)

PRESETS = (
    VICUNA_7B,
    VICUNA_13B,
    MISTRAL,
    YI,
    _converted(VICUNA_7B, "llava-v1.6-vicuna-7b-hf", parameters=7_063_431_168),
    _converted(VICUNA_13B, "llava-v1.6-vicuna-13b-hf", parameters=13_351_499_776),
    _converted(MISTRAL, "llava-v1.6-mistral-7b-hf", parameters=7_566_747_648),
    _converted(YI, "llava-v1.6-34b-hf", parameters=34_752_083_968),
)

TINY = Preset(
    id="llava-next-tiny",
    config=VLMConfig(
        vision=VisionConfig(image_size=42, patch_size=14, dim=32, num_layers=3, num_heads=4, mlp_dim=64),
        connector=MLPConnector(num_layers=2),
        decoder=DecoderConfig(
            vocab_size=384,
            dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=96,
            rope=RopeConfig(theta=1e6),
        ),
        resolution=AnyRes(
            tile_size=42, resolutions=((42, 84), (84, 42), (84, 84), (126, 42), (42, 126)), merge="spatial_unpad"
        ),
        chat=MISTRAL_INSTRUCT,
        image_token_id=383,
    ),
    parameters=162_176,
    source="made up for tests: grouped keys, five mosaics of tiles with an odd side, newlines",
)


def _matches(hub: HubConfig) -> bool:
    if is_transformers_layout(hub):
        return hub.get("model_type") == "llava_next"
    return is_original_layout(hub) and str(hub.get("image_aspect_ratio")).startswith("anyres")


def _chat_for(hub: HubConfig) -> ChatFormat:
    """By language model: Mistral's type, the 34B's vocabulary, else Vicuna."""
    text = hub.get("text_config") or hub
    if "mistral" in str(text.get("model_type")):
        chat = MISTRAL_INSTRUCT
    else:
        chat = CHATML_DIRECT if text.get("vocab_size") in YI_ROWS else V1
    return with_start_end(chat) if hub.get("mm_use_im_start_end") else chat


LLAVA_NEXT = Family(
    name="llava_next",
    title="LLaVA-NeXT",
    paper="LLaVA-NeXT: Improved reasoning, OCR, and world knowledge (blog, 2024-01-30)",
    presets=PRESETS,
    tiny=TINY,
    recipes=("llava-next/pretrain", "llava-next/finetune"),
    matches=_matches,
    accepts=lambda config: config.resolution.kind == "anyres" and config.connector.kind in ("linear", "mlp"),
    chat_for=_chat_for,
    read=read_config,
    write=write_config,
    layouts=llava_layouts,
    part_layouts=llava_part_layouts,
    tower=tower_repository,
)
