"""Qwen2-VL: enhancing perception at any resolution (arXiv:2409.12191), September 2024.

Figure 2 of the paper, each box with the code that it is here:

                     language response                         generate/decode.py:generate
                             ^
  +-----------------------------------------------------+
  |       Qwen2 language model, 2B, 7B or 72B            |     nn/decoder.py:Decoder
  |  positions of time, row and column (M-RoPE)          |     spec/positions.py:token_positions   nn/rope.py:rotation
  +-----------------------------------------------------+
    ^ ^ ^ h/2 x w/2     ^ ^ ^       ^ ^ t/2 x h/2 x w/2        nn/vlm.py:VLM.embed   (rows in their slots)
  +-----------------------------------------------------+
  |  2x2 patches joined, MLP (not drawn in the paper)    |     nn/connectors.py:MergedRows
  +-----------------------------------------------------+
  +-----------------------------------------------------+
  |  vision encoder: 32 layers, patches of 14 px in two  |     nn/vision.py:VisionTower
  |  frames, turned by row and column, no position table |     nn/positions.py:patch_rotation
  +-----------------------------------------------------+
    ^                     |         ^
  picture,              text      video, two frames a second   media/prepare.py:prepare   media/prepare.py:prepare_video
  both sides to                   the more there are, the      text/render.py:render      media/video.py:open_video
  multiples of 28 px              smaller each is              spec/native.py:Native      spec/native.py:VideoSampling

A 512x512 picture becomes 504x504, 36x36 patches, 324 tokens; 40x400 becomes 28x392, 14 tokens; 224x224 takes 64, and
two more for the marks around it. Sizes: config.json of the repositories (Qwen/Qwen2-VL-2B and its sisters).
"""

from opsin.families._chats import QWEN2_VL as INSTRUCT
from opsin.families._chats import QWEN2_VL_BASE as BASE
from opsin.families._family import Family, Preset
from opsin.families._layouts import decoder_rules
from opsin.families._parts import QWEN2_VL_2B, QWEN2_VL_7B, QWEN2_VL_72B, QWEN2_VL_TOWER
from opsin.families._qwen2_vl_hub import read_config, write_config
from opsin.spec.chat import ChatFormat, Placeholder
from opsin.spec.connector import PatchMerger
from opsin.spec.decoder import DecoderConfig, RopeConfig
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native, VideoSampling
from opsin.spec.rules import Drop, Layout, Rename, Reshape, Rule, Split


def _preset(id: str, name: str, decoder: DecoderConfig, chat: ChatFormat, parameters: int) -> Preset:
    return Preset(
        id=id,
        config=VLMConfig(
            vision=QWEN2_VL_TOWER,
            connector=PatchMerger(),
            decoder=decoder,
            resolution=Native(),
            chat=chat,
            image_token_id=151_655,
            video_token_id=151_656,
        ),
        hub=(f"Qwen/{name}",),
        parameters=parameters,
        source=f"Qwen/{name} config.json, preprocessor_config.json",
        # With the likeliest token alone to draw from, of these numbers only the penalty changes an answer.
        generation={"do_sample": True, "top_p": 0.001, "top_k": 1}
        | ({"temperature": 0.1, "repetition_penalty": 1.05} if chat is BASE else {"temperature": 0.01}),
    )


PRESETS = tuple(
    _preset(f"qwen2-vl-{size.lower()}{suffix}", f"Qwen2-VL-{size}{suffix.title()}", decoder, chat, parameters)
    for size, decoder, parameters in (
        ("2B", QWEN2_VL_2B, 2_208_985_600),
        ("7B", QWEN2_VL_7B, 8_291_375_616),
        ("72B", QWEN2_VL_72B, 73_405_560_320),
    )
    for suffix, chat in (("", BASE), ("-instruct", INSTRUCT))
)

TINY = Preset(
    id="qwen2-vl-tiny",
    config=VLMConfig(
        vision=QWEN2_VL_TOWER.replace(image_size=7, patch_size=7, dim=32, num_layers=2, num_heads=4, mlp_dim=64),
        connector=PatchMerger(),
        decoder=QWEN2_VL_2B.replace(
            vocab_size=384,
            dim=48,
            num_layers=2,
            num_heads=4,
            mlp_dim=96,
            rope=RopeConfig(theta=1e6, sections=(2, 2, 2)),
        ),
        resolution=Native(
            factor=14,
            min_pixels=4 * 14 * 14,
            max_pixels=16 * 14 * 14,
            video=VideoSampling(min_pixels=4 * 14 * 14, max_pixels=9 * 14 * 14, max_total_pixels=40 * 14 * 14),
        ),
        chat=INSTRUCT,
        image_token_id=383,
        video_token_id=382,
    ),
    parameters=109_600,
    source="made up for tests: 4 to 16 slots a picture, two frames a patch, tied head",
)


def _layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """The published repositories, and what transformers has called the same modules since 4.52."""
    return (
        _layout("hf", config, tower="visual.", decoder="model."),
        _layout("hf-v5", config, tower="model.visual.", decoder="model.language_model."),
    )


def _layout(name: str, config: VLMConfig, *, tower: str, decoder: str) -> Layout:
    tied = config.decoder.head == "tied"
    return Layout(
        name=name,
        rules=(*_tower_rules(config, tower), *decoder_rules(decoder, "lm_head.", biases="qkv", tied=tied)),
    )


def _part_layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """A tower with its merger, or a Qwen2 language model, in files of their own."""
    tied = config.decoder.head == "tied"
    return (
        Layout(name="tower", rules=_tower_rules(config, "")),
        Layout(name="language-model", rules=decoder_rules("model.", "lm_head.", biases="qkv", tied=tied)),
    )


def _tower_rules(config: VLMConfig, prefix: str) -> tuple[Rule, ...]:
    """The tower and its merger, which the checkpoint counts as a part of it."""
    p, dim, frames = config.vision.patch_size, config.vision.dim, config.vision.frames
    kernel = Reshape(
        source=f"{prefix}patch_embed.proj.weight",
        target="vision.patch.weight",
        source_shape=(dim, 3, frames, p, p),
        target_shape=(dim, 3 * frames * p * p),
    )
    modules = {
        "blocks.{}.norm1": "vision.layers.{}.norm1",
        "blocks.{}.norm2": "vision.layers.{}.norm2",
        "blocks.{}.attn.proj": "vision.layers.{}.attn.out",
        "blocks.{}.mlp.fc1": "vision.layers.{}.mlp.up",
        "blocks.{}.mlp.fc2": "vision.layers.{}.mlp.down",
        "merger.ln_q": "connector.norm",
        "merger.mlp.0": "connector.layers.0",
        "merger.mlp.2": "connector.layers.1",
    }
    rules: list[Rule] = [kernel, Drop(source=f"{prefix}rotary_pos_emb.inv_freq", reason="follows from the head width")]
    for tensor in ("weight", "bias"):
        rules += [Rename(source=f"{prefix}{a}.{tensor}", target=f"{b}.{tensor}") for a, b in modules.items()]
        targets = tuple(f"vision.layers.{{}}.attn.{name}.{tensor}" for name in "qkv")
        rules.append(Split(source=f"{prefix}blocks.{{}}.attn.qkv.{tensor}", targets=targets, rows=(dim, dim, dim)))
    return tuple(rules)


def _turns_as_published(config: VLMConfig) -> bool:
    """Whether positions are Qwen2-VL's; its config.json has no word for those of its successors."""
    rope = config.decoder.rope if isinstance(config.decoder, DecoderConfig) else None
    return (rope is None or rope.order == "blocks") and config.vision.positions == "rotary"


QWEN2_VL = Family(
    name="qwen2_vl",
    title="Qwen2-VL",
    paper="Qwen2-VL: Enhancing Vision-Language Model's Perception of the World at Any Resolution, arXiv:2409.12191",
    presets=PRESETS,
    tiny=TINY,
    recipes=("qwen2-vl/pretrain", "qwen2-vl/multitask", "qwen2-vl/instruct", "qwen2-vl/finetune"),
    matches=lambda hub: hub.get("model_type") == "qwen2_vl",
    accepts=lambda config: (
        config.connector.kind == "patch_merger" and config.resolution.kind == "native" and _turns_as_published(config)
    ),
    chat_for=lambda hub: INSTRUCT,
    read=read_config,
    write=write_config,
    layouts=_layouts,
    part_layouts=_part_layouts,
    tower=lambda hub: None,
    placeholder=Placeholder(image="<|image_pad|>", video="<|video_pad|>"),
)
