"""Qwen-VL: a versatile vision-language model (arXiv:2308.12966), August 2023, and Qwen-VL-Chat.

Figure 3 of the paper, each box with the code that it is here:

                     language response, boxes included         generate/decode.py:generate
                             ^
  +-----------------------------------------------------+
  |       Qwen-7B                                        |     nn/decoder.py:Decoder   nn/rope.py:rotation
  +-----------------------------------------------------+
    ^ ^ ^ 256, between <img> and </img>        ^ ^ ^           nn/vlm.py:VLM.embed   (rows in their slots)
  +-----------------------------------+   +-----------+
  |  one cross-attention, 256 learned |   | tokenizer |        nn/connectors.py:ResampledRows
  |  queries, 2-D sine positions      |   |           |        text/_tiktoken.py:TiktokenTokenizer
  +-----------------------------------+   +-----------+
    ^ ^ ^ 1024                                question         text/render.py:render   families/_chats.py:QWEN_VL_CHAT
  +-----------------------------------+
  |  OpenCLIP ViT-bigG/14, 48 layers  |                        nn/vision.py:VisionTower   nn/positions.py:resize_table
  +-----------------------------------+
    ^ stretched to 448x448                                     spec/resolution.py:Squash   media/prepare.py:prepare
  picture of any size

Every picture takes 256 slots and the two marks around them. Sizes: config.json of Qwen/Qwen-VL.
"""

from opsin.families._chats import QWEN_VL_BASE, QWEN_VL_CHAT
from opsin.families._family import Family, Preset
from opsin.families._layouts import CLIP_PREFIX, vision_rules
from opsin.families._parts import QWEN_7B, QWEN_VL_TOWER
from opsin.families._qwen_vl_hub import read_config, write_config
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import Resampler
from opsin.spec.decoder import PowerScaling, RopeConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import Squash
from opsin.spec.rules import Drop, Layout, Rename, Reshape, Rule, Split
from opsin.spec.vision import VisionConfig

PARAMETERS = 9_656_935_168


SAMPLED: dict[str, float | int | bool] = {"do_sample": True, "top_p": 0.5, "top_k": 0, "max_window_size": 6144}
"""How the chat model answers; the last is the longest history of a chat in tokens (`text.window`)."""


def _preset(id: str, name: str, chat: ChatFormat) -> Preset:
    return Preset(
        id=id,
        config=VLMConfig(
            vision=QWEN_VL_TOWER,
            connector=Resampler(num_heads=32),
            decoder=QWEN_7B,
            resolution=Squash(tile_size=448),
            chat=chat,
            image_token_id=151_859,
        ),
        hub=(f"Qwen/{name}",),
        parameters=PARAMETERS,
        source=f"Qwen/{name} config.json, visual.py",
        generation=SAMPLED if chat is QWEN_VL_CHAT else {},
    )


PRESETS = (_preset("qwen-vl", "Qwen-VL", QWEN_VL_BASE), _preset("qwen-vl-chat", "Qwen-VL-Chat", QWEN_VL_CHAT))

TINY = Preset(
    id="qwen-vl-tiny",
    config=VLMConfig(
        vision=QWEN_VL_TOWER.replace(image_size=112, patch_size=7, dim=32, num_layers=2, num_heads=4, mlp_dim=70),
        connector=Resampler(side=4, num_heads=1),
        decoder=QWEN_7B.replace(
            vocab_size=384,
            dim=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=96,
            rope=RopeConfig(scaling=PowerScaling(trained=48), log_n=48),
        ),
        resolution=Squash(tile_size=42),
        chat=QWEN_VL_CHAT,
        image_token_id=379,
    ),
    parameters=426_732,
    source="made up for tests: 16 slots a picture, rotation and log-n that change beyond 48 tokens",
)


def _layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """The published repositories."""
    return (Layout(name="original", rules=(*_visual_rules(config, "transformer.visual."), *_decoder_rules(config))),)


def _part_layouts(config: VLMConfig) -> tuple[Layout, ...]:
    """The tower with its resampler, or the language model, in files of their own."""
    return (
        Layout(name="visual", rules=_visual_rules(config, "transformer.visual.")),
        Layout(name="language-model", rules=_decoder_rules(config)),
        Layout(name="clip", rules=_open_clip_rules(config.vision)),
    )


def _open_clip_rules(vision: VisionConfig) -> tuple[Rule, ...]:
    """OpenCLIP's tower as transformers names it, from which training started. Its class token stays behind."""
    left = ("vision.class_token", "vision.norm_post")
    rules = vision_rules(vision, CLIP_PREFIX)
    return tuple(rule for rule in rules if not (isinstance(rule, Rename) and rule.target.startswith(left)))


def _visual_rules(config: VLMConfig, prefix: str) -> tuple[Rule, ...]:
    """The tower and the resampler, which the checkpoint counts as a part of it."""
    vision, dim, out = config.vision, config.vision.dim, config.decoder.dim
    p, head, pool = vision.patch_size, dim // vision.num_heads, f"{prefix}attn_pool."
    block, ours = f"{prefix}transformer.resblocks.{{}}.", "vision.layers.{}."
    modules = {
        f"{prefix}ln_pre": "vision.norm_pre",
        f"{block}ln_1": f"{ours}norm1",
        f"{block}ln_2": f"{ours}norm2",
        f"{block}attn.out_proj": f"{ours}attn.out",
        f"{block}mlp.c_fc": f"{ours}mlp.up",
        f"{block}mlp.c_proj": f"{ours}mlp.down",
        f"{pool}ln_q": "connector.norm_q",
        f"{pool}ln_kv": "connector.norm_kv",
        f"{pool}attn.out_proj": "connector.out",
        f"{prefix}ln_post": "connector.norm_post",
    }
    rules: list[Rule] = [
        Reshape(
            source=f"{prefix}conv1.weight",
            target="vision.patch.weight",
            source_shape=(dim, 3, p, p),
            target_shape=(dim, 3 * p * p),
        ),
        Rename(source=f"{prefix}positional_embedding", target="vision.positions"),
        Rename(source=f"{pool}query", target="connector.queries"),
        Rename(source=f"{pool}pos_embed", target="connector.positions"),
        Rename(source=f"{prefix}proj", target="connector.proj"),
    ]
    if vision.out_dim != out:  # widths that are equal need no projection
        rules.append(Rename(source=f"{pool}kv_proj.weight", target="connector.kv.weight"))
    for tensor in ("weight", "bias"):
        rules += [Rename(source=f"{a}.{tensor}", target=f"{b}.{tensor}") for a, b in modules.items()]
        rules += [
            # In the tower every head has its query, key and value rows together; in the resampler all queries come
            # first.
            Split(
                source=f"{block}attn.in_proj.{tensor}",
                targets=tuple(f"{ours}attn.{name}.{tensor}" for name in "qkv"),
                rows=(head, head, head),
                groups=vision.num_heads,
            ),
            Split(
                source=f"{pool}attn.in_proj_{tensor}",
                targets=tuple(f"connector.{name}.{tensor}" for name in "qkv"),
                rows=(out, out, out),
            ),
        ]
    return tuple(rules)


def _decoder_rules(config: VLMConfig) -> tuple[Rule, ...]:
    """Qwen. `w2` is the gate, `w1` what it gates."""
    inner = config.decoder.num_heads * config.decoder.head_width
    layer, ours = "transformer.h.{}.", "decoder.layers.{}."
    modules = {
        "transformer.wte": "decoder.embed",
        f"{layer}ln_1": f"{ours}norm1",
        f"{layer}attn.c_proj": f"{ours}attn.out",
        f"{layer}ln_2": f"{ours}norm2",
        f"{layer}mlp.w1": f"{ours}mlp.up",
        f"{layer}mlp.w2": f"{ours}mlp.gate",
        f"{layer}mlp.c_proj": f"{ours}mlp.down",
        "transformer.ln_f": "decoder.norm",
    }
    tied = config.decoder.head == "tied"
    return (
        *(Rename(source=f"{a}.weight", target=f"{b}.weight") for a, b in modules.items()),
        *(
            Split(
                source=f"{layer}attn.c_attn.{tensor}",
                targets=tuple(f"{ours}attn.{name}.{tensor}" for name in "qkv"),
                rows=(inner, inner, inner),
            )
            for tensor in ("weight", "bias")
        ),
        Drop(source="lm_head.weight", reason="equal to the embedding")
        if tied
        else Rename(source="lm_head.weight", target="decoder.head.weight"),
        Drop(source="transformer.rotary_emb.inv_freq", reason="follows from rotary_emb_base"),
    )


QWEN_VL = Family(
    name="qwen_vl",
    title="Qwen-VL",
    paper="Qwen-VL: A Versatile Vision-Language Model for Understanding, Localization, Text Reading, and Beyond, "
    "arXiv:2308.12966",
    presets=PRESETS,
    tiny=TINY,
    recipes=("qwen-vl/pretrain", "qwen-vl/multitask", "qwen-vl/chat", "qwen-vl/finetune"),
    matches=lambda hub: hub.get("model_type") == "qwen" and "visual" in hub,
    accepts=lambda config: (
        config.connector.kind == "resampler"
        and config.resolution.kind == "squash"
        and config.vision.class_token == "none"
    ),
    chat_for=lambda hub: QWEN_VL_CHAT,
    read=read_config,
    write=write_config,
    layouts=_layouts,
    part_layouts=_part_layouts,
    tower=lambda hub: None,
)
