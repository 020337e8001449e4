"""LLaVA-1.5: improved baselines with visual instruction tuning (arXiv:2310.03744), October 2023.

Figure 1 (right) of the paper, each box with the code that it is here. What changed since LLaVA stands in [brackets].

               language response                          generate/decode.py:generate
                        ^
  +-----------------------------------------------+
  |       Vicuna v1.5, 7B or 13B  [Llama 2]       |       nn/decoder.py:Decoder
  +-----------------------------------------------+
       ^   ^   ^                    ^   ^   ^             nn/vlm.py:VLM.embed  (rows in their slots, token embeddings)
  +-----------------+      +--------------------+
  | vision-language |      |  tokenizer and     |         nn/connectors.py:MLPRows  (spec/connector.py:MLPConnector)
  | connector [MLP] |      |  embedding         |         text/tokenizer.py:Tokenizer
  +-----------------+      +--------------------+
       ^   ^   ^                    ^                     features: [24 x 24 = 576] of 1024 channels
  +-----------------+               |
  | CLIP ViT-L/14   |               |                     nn/vision.py:VisionTower  (layer -2, no class token)
  |    [336 px]     |               |
  +-----------------+               |
          ^                         |
        image                 user question               media/prepare.py:prepare     text/render.py:render
  [padded to a square      [+ response format]
   with the mean colour]      families/_chats.py:V1
   (spec/resolution.py:Pad)

The -hf presets are the same weights as transformers' converters left them: 64 more vocabulary rows, of which 32000 is
`<image>`, and a preprocessor that crops the central square where the authors pad. That changes what the model sees of
any picture that is not square.

LLaVA-1.5-HD (section 3.4, figure 2): the picture is cut into up to six 224 px tiles, a whole view comes
first, rows of the mosaic end with a learned token. Neither code nor weights were published.
Sizes: docs/MODEL_ZOO.md of haotian-liu/LLaVA @c121f04, section "LLaVA-v1.5".
"""

import re

from opsin.families._chats import V1, with_start_end
from opsin.families._family import Family, HubConfig, Preset
from opsin.families._hub import is_original_layout, is_transformers_layout, read_config, tower_repository
from opsin.families._hub_write import write_config
from opsin.families._layouts import is_llava, llava_layouts, llava_part_layouts
from opsin.families._parts import CLIP_L_224, CLIP_L_336, HF_EXTRA_ROWS, LLAMA2_7B, LLAMA2_13B
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import AnyRes, CenterCrop, Pad
from opsin.spec.vision import VisionConfig

HD_GRIDS = (
    *((1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (2, 2), (2, 3)),
    *((2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (3, 2)),
)
"""Mosaics of LLaVA-1.5-HD, tiles (wide, high). The paper names the set; the order, which decides ties, is ours."""


def _original(id: str, decoder: DecoderConfig, repository: str, parameters: int) -> Preset:
    """As the authors published it (config.json: `image_aspect_ratio` pad, `mm_projector_type` mlp2x_gelu)."""
    return Preset(
        id=id,
        config=VLMConfig(
            vision=CLIP_L_336,
            connector=MLPConnector(num_layers=2),
            decoder=decoder,
            resolution=Pad(tile_size=336),
            chat=V1,
        ),
        hub=(f"liuhaotian/{repository}",),
        parameters=parameters,
        source=f"liuhaotian/{repository} config.json",
        tower_hub="openai/clip-vit-large-patch14-336",
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
            resolution=CenterCrop(tile_size=336),
            image_token_id=rows,  # `<image>` is the first row that was added: config.json, image_token_index
        ),
        hub=(f"llava-hf/{repository}",),
        parameters=parameters,
        source=f"llava-hf/{repository} config.json, preprocessor_config.json (do_center_crop)",
        twin=original.id,
    )


LLAVA_15_7B = _original("llava-1.5-7b", LLAMA2_7B, "llava-v1.5-7b", parameters=7_062_902_784)
LLAVA_15_13B = _original("llava-1.5-13b", LLAMA2_13B, "llava-v1.5-13b", parameters=13_350_839_296)

PRESETS = (
    LLAVA_15_7B,
    LLAVA_15_13B,
    _converted(LLAVA_15_7B, "llava-1.5-7b-hf", parameters=7_063_427_072),
    _converted(LLAVA_15_13B, "llava-1.5-13b-hf", parameters=13_351_494_656),
    Preset(
        id="llava-1.5-13b-hd",
        config=LLAVA_15_13B.config.replace(
            vision=CLIP_L_224,
            resolution=AnyRes(
                tile_size=224,
                resolutions=tuple((224 * wide, 224 * high) for wide, high in HD_GRIDS),
                merge="spatial_unpad",
            ),
        ),
        parameters=13_350_516_736,
        source="arXiv:2310.03744, section 3.4; the size of the newline row and its place follow LLaVA-NeXT's code",
        tower_hub="openai/clip-vit-large-patch14",
        access="Its weights were never published. Train it (llava-1.5/finetune-hd), or use llava-next-vicuna-13b",
    ),
)

TINY = Preset(
    id="llava-1.5-tiny",
    config=VLMConfig(
        vision=VisionConfig(image_size=42, patch_size=14, dim=32, num_layers=3, num_heads=4, mlp_dim=64),
        connector=MLPConnector(num_layers=2),
        decoder=DecoderConfig(vocab_size=384, dim=48, num_layers=2, num_heads=4, num_kv_heads=4, mlp_dim=96),
        resolution=Pad(tile_size=42),
        chat=V1,
        image_token_id=383,
    ),
    parameters=132_048,
    source="made up for tests: 9 slots a picture",
)


def _matches(hub: HubConfig) -> bool:
    if is_transformers_layout(hub):
        return hub.get("model_type") == "llava" and hub.get("projector_hidden_act") != "linear"
    return (
        is_original_layout(hub)
        and not str(hub.get("image_aspect_ratio")).startswith("anyres")
        # Other projectors are claimed too, so that the reader can say which ones it knows.
        and not re.fullmatch("linear|mlp1x_gelu", str(hub.get("mm_projector_type", "linear")))
    )


def _chat_for(hub: HubConfig) -> ChatFormat:
    return with_start_end(V1) if hub.get("mm_use_im_start_end") else V1


LLAVA15 = Family(
    name="llava15",
    title="LLaVA-1.5",
    paper="Improved Baselines with Visual Instruction Tuning, arXiv:2310.03744",
    presets=PRESETS,
    tiny=TINY,
    recipes=("llava-1.5/pretrain", "llava-1.5/finetune", "llava-1.5/finetune-lora", "llava-1.5/finetune-hd"),
    matches=_matches,
    accepts=lambda config: config.connector.kind == "mlp" and is_llava(config),
    chat_for=_chat_for,
    read=read_config,
    write=write_config,
    layouts=llava_layouts,
    part_layouts=llava_part_layouts,
    tower=tower_repository,
)
