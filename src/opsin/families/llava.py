"""LLaVA: visual instruction tuning (arXiv:2304.08485), April 2023. One linear layer between CLIP and Vicuna.

Figure 1 of the paper, each box with the code that it is here:

               language response X_a                      generate/decode.py:generate
                        ^
  +-----------------------------------------------+
  |            language model f_phi               |       nn/decoder.py:Decoder
  +-----------------------------------------------+
       ^   ^   ^   H_v              ^   ^   ^  H_q        nn/vlm.py:VLM.embed  (rows in their slots, token embeddings)
  +-----------------+               |   |   |
  |  projection W   |               |   |   |             nn/connectors.py:MLPRows  (one linear layer)
  +-----------------+               |   |   |
       ^   ^   ^   Z_v              |   |   |             features: 16 x 16 = 256 of 1024 channels
  +-----------------+               |   |   |
  |  vision encoder |               |   |   |             nn/vision.py:VisionTower  (CLIP ViT-L/14, layer -2)
  +-----------------+               |   |   |
          ^                         |   |   |
       image X_v         language instruction X_q         media/prepare.py:prepare     text/render.py:render
   shortest side to 224,    families/_chats.py:
   central square           LLAVA_V0, V1, LLAVA_LLAMA_2
   (spec/resolution.py:CenterCrop)

Training has two stages: W alone on captions, then W and f_phi on instructions; the tower stays frozen.
Sizes: docs/MODEL_ZOO.md of haotian-liu/LLaVA @c121f04, sections "LLaVA-v1" and "Legacy Models".
"""

from opsin.families._chats import LLAVA_LLAMA_2, LLAVA_V0, V1, with_start_end
from opsin.families._family import Family, HubConfig, Preset
from opsin.families._hub import is_original_layout, is_transformers_layout, read_config, tower_repository
from opsin.families._hub_write import write_config
from opsin.families._layouts import is_llava, llava_layouts, llava_part_layouts
from opsin.families._parts import CLIP_L_224, CLIP_L_336, LLAMA2_7B, LLAMA2_13B, VICUNA_7B_V1, VICUNA_13B_V1
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import LinearConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import CenterCrop
from opsin.spec.vision import VisionConfig

CLIP_224_HUB, CLIP_336_HUB = "openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336"

V0_ROWS, V1_1_ROWS = 32004, 32003
"""Vocabulary rows: `<im_patch>`, `<im_start>`, `<im_end>`, and in v0 a `[PAD]`, are added to LLaMA's 32000 (config.json
of the delta repositories). They tell a v0 checkpoint, whose turns end with `###`, from a v1.1 one."""

_DELTA = (
    "Published as a difference to LLaMA weights (liuhaotian/{repository}), which nobody can run as it is. Add it to "
    "LLaMA with the authors' llava.model.apply_delta, convert the result to safetensors, and give the folder's path"
)


def _config(vision: VisionConfig, decoder: DecoderConfig, chat: ChatFormat) -> VLMConfig:
    return VLMConfig(
        vision=vision,
        connector=LinearConnector(),
        decoder=decoder,
        resolution=CenterCrop(tile_size=vision.image_size),
        chat=chat,
    )


def _delta(id: str, decoder: DecoderConfig, chat: ChatFormat, repository: str, parameters: int) -> Preset:
    """v0 and v1.1: learned tokens around a picture (`mm_use_im_start_end`), weights published as a delta."""
    return Preset(
        id=id,
        config=_config(CLIP_L_224, decoder, with_start_end(chat)),
        parameters=parameters,
        source=f"MODEL_ZOO.md, legacy models (delta weights): liuhaotian/{repository}",
        tower_hub=CLIP_224_HUB,
        access=_DELTA.format(repository=repository),
    )


PRESETS = (
    _delta(
        "llava-7b-v0",
        VICUNA_7B_V1.replace(vocab_size=V0_ROWS),
        LLAVA_V0,
        "LLaVA-7b-delta-v0",
        parameters=7_045_826_560,
    ),
    _delta(
        "llava-13b-v0",
        VICUNA_13B_V1.replace(vocab_size=V0_ROWS),
        LLAVA_V0,
        "LLaVA-13b-delta-v0",
        parameters=13_324_333_056,
    ),
    _delta(
        "llava-7b-v1.1",
        VICUNA_7B_V1.replace(vocab_size=V1_1_ROWS),
        V1,
        "LLaVA-Lightning-7B-delta-v1-1",
        parameters=7_045_818_368,
    ),
    _delta(
        "llava-13b-v1.1",
        VICUNA_13B_V1.replace(vocab_size=V1_1_ROWS),
        V1,
        "LLaVA-13b-delta-v1-1",
        parameters=13_324_322_816,
    ),
    Preset(
        id="llava-13b-v1.3-336",
        config=_config(CLIP_L_336, VICUNA_13B_V1, V1),
        hub=("liuhaotian/llava-v1-0719-336px-lora-merge-vicuna-13b-v1.3",),
        parameters=13_324_619_776,
        source="MODEL_ZOO.md, LLaVA-v1: Vicuna-13B-v1.3, CLIP-L-336px, LoRA merged",
        tower_hub=CLIP_336_HUB,
    ),
    Preset(
        id="llava-llama-2-7b",
        config=_config(CLIP_L_224, LLAMA2_7B, LLAVA_LLAMA_2),
        parameters=7_045_793_792,
        source="MODEL_ZOO.md, LLaVA-v1: LLaMA-2-7B-Chat, CLIP-L",
        tower_hub=CLIP_224_HUB,
        access=(
            "Published as LoRA weights (liuhaotian/llava-llama-2-7b-chat-lightning-lora-preview). Merge them into "
            "Llama-2-7b-chat with the authors' scripts/merge_lora_weights.py and give the folder's path"
        ),
    ),
    Preset(
        id="llava-llama-2-13b",
        config=_config(CLIP_L_224, LLAMA2_13B, LLAVA_LLAMA_2),
        hub=("liuhaotian/llava-llama-2-13b-chat-lightning-preview",),
        parameters=13_324_292_096,
        source="MODEL_ZOO.md, LLaVA-v1: LLaMA-2-13B-Chat, CLIP-L",
        tower_hub=CLIP_224_HUB,
    ),
)

TINY = Preset(
    id="llava-tiny",
    config=_config(
        VisionConfig(image_size=28, patch_size=7, dim=32, num_layers=3, num_heads=4, mlp_dim=64),
        DecoderConfig(
            vocab_size=384,
            dim=48,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=96,
            norm_eps=1e-6,
            max_positions=2048,
        ),
        with_start_end(LLAVA_V0),
    ),
    parameters=115_808,
    source="made up for tests: 16 slots a picture, learned tokens around them",
)


def _matches(hub: HubConfig) -> bool:
    if is_transformers_layout(hub):
        return hub.get("model_type") == "llava" and hub.get("projector_hidden_act") == "linear"
    return (
        is_original_layout(hub)
        and not str(hub.get("image_aspect_ratio")).startswith("anyres")
        and hub.get("mm_projector_type", "linear") in ("linear", "mlp1x_gelu")
    )


def _chat_for(hub: HubConfig) -> ChatFormat:
    """v0 is told by its vocabulary. Llama-2 previews cannot be told from Vicuna: only their presets know them."""
    chat = LLAVA_V0 if hub.get("vocab_size") == V0_ROWS else V1
    return with_start_end(chat) if hub.get("mm_use_im_start_end") else chat


LLAVA = Family(
    name="llava",
    title="LLaVA",
    paper="Visual Instruction Tuning, arXiv:2304.08485",
    presets=PRESETS,
    tiny=TINY,
    recipes=("llava/pretrain", "llava/finetune", "llava/scienceqa"),
    matches=_matches,
    accepts=lambda config: config.connector.kind == "linear" and is_llava(config),
    chat_for=_chat_for,
    read=read_config,
    write=write_config,
    layouts=llava_layouts,
    part_layouts=llava_part_layouts,
    tower=tower_repository,
)
