"""Published `config.json` files of Qwen-VL, read and written. There is no preprocessor_config.json: a picture becomes a
square of `visual.image_size` pixels with CLIP's statistics. Keys that would change the numbers are read or refused.
"""

import re
from typing import Any

from opsin.errors import ConfigError
from opsin.families._family import HubConfig, HubFiles
from opsin.families._hub import CHAT_KEY, CONFIG
from opsin.families._keys import refuse_unread
from opsin.families._parts import QWEN_VL_TOWER
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import Resampler
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import Squash
from opsin.spec.vision import VisionConfig

HEAD_DIM = 128
"""Width of one head of the resampler (visual.py: output_dim // 128 heads)."""
TABLE_SIDE = 16
"""Positions along one side of the tower's table, whatever the size of a picture (visual.py)."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22_016,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10_000,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
}
"""The published values (Qwen/Qwen-VL, config.json)."""

VISUAL_DEFAULTS: dict[str, Any] = {
    "heads": 16,
    "image_size": 448,
    "image_start_id": 151_857,
    "layers": 48,
    "mlp_ratio": 4.9231,
    "output_dim": 4096,
    "patch_size": 14,
    "width": 1664,
    "n_queries": 256,
}
"""The published values; no published file has `n_queries`, which visual.py sets."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rotary_pct": (1.0, 1),
    "no_bias": (True,),
    "scale_attn_weights": (True,),
    "quantization_config": (None,),
    "use_cache_quantization": (None, False),
}
READ = frozenset(
    {*DEFAULTS, "visual", "use_flash_attn", "use_cache", "use_cache_kernel", "attn_dropout_prob", "emb_dropout_prob"}
)
SUSPICIOUS = re.compile(r"(use_|rotary_|rope_|visual_|attn_|quantization|kv_|scale_|no_bias|num_|n_|norm|layer_norm)")


def read_config(hub: HubConfig, preprocessor: HubConfig | None, chat: ChatFormat) -> VLMConfig:
    """config.json to a config. Raises ConfigError."""
    if CHAT_KEY in hub:
        chat = ChatFormat.parse(hub[CHAT_KEY], where=f"{CONFIG} {CHAT_KEY}")
    refuse_unread(hub, neutral=NEUTRAL, read=READ, suspicious=SUSPICIOUS, where=CONFIG)
    where = f"{CONFIG} visual"
    for key in hub["visual"]:
        if key not in VISUAL_DEFAULTS:
            raise ConfigError(f"{where}: key {key!r} is not known. Known: {', '.join(VISUAL_DEFAULTS)}")
    get, visual = {**DEFAULTS, **hub}, {**VISUAL_DEFAULTS, **hub["visual"]}
    if visual["output_dim"] != get["hidden_size"]:
        raise ConfigError(
            f"{where}: output_dim {visual['output_dim']} differs from the language model's hidden_size "
            f"{get['hidden_size']}: rows take the place of token embeddings"
        )
    side = round(visual["n_queries"] ** 0.5)
    if side**2 != visual["n_queries"] or visual["output_dim"] % HEAD_DIM:
        raise ConfigError(
            f"{where}: n_queries {visual['n_queries']} must be a square, and output_dim {visual['output_dim']} a "
            f"multiple of the {HEAD_DIM} of a head"
        )
    heads = get["num_attention_heads"]
    trained = get["seq_length"]
    decoder = DecoderConfig.parse(
        {
            "vocab_size": get["vocab_size"],
            "dim": get["hidden_size"],
            "num_layers": get["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": None if get["kv_channels"] * heads == get["hidden_size"] else get["kv_channels"],
            "mlp_dim": get["intermediate_size"] // 2,
            "norm_eps": get["layer_norm_epsilon"],
            "attention_bias": "qkv",
            "head": "tied" if get["tie_word_embeddings"] else "own",
            "rope": {
                "theta": get["rotary_emb_base"],
                "scaling": {"kind": "powers", "trained": trained} if get["use_dynamic_ntk"] else None,
                "log_n": trained if get["use_logn_attn"] else None,
            },
            "max_positions": get["max_position_embeddings"],
        },
        where=CONFIG,
    )
    return VLMConfig.parse(
        {
            "vision": _tower(visual, where),
            "connector": Resampler.parse({"side": side, "num_heads": visual["output_dim"] // HEAD_DIM}, where=where),
            "decoder": decoder,
            "resolution": Squash.parse({"tile_size": visual["image_size"]}, where=where),
            "chat": chat,
            "image_token_id": visual["image_start_id"] + 2,  # `<imgpad>` stands two after `<img>`
        },
        where=CONFIG,
    )


def _tower(visual: HubConfig, where: str) -> VisionConfig:
    kept = {name: getattr(QWEN_VL_TOWER, name) for name in VisionConfig.model_fields}
    fields = {
        "image_size": TABLE_SIDE * visual["patch_size"],
        "patch_size": visual["patch_size"],
        "dim": visual["width"],
        "num_layers": visual["layers"],
        "num_heads": visual["heads"],
        "mlp_dim": int(visual["width"] * visual["mlp_ratio"]),
    }
    return VisionConfig.parse({**kept, **fields}, where=where)


def write_config(config: VLMConfig, layout: str) -> HubFiles:
    """config.json as published. Raises ConfigError where it cannot say it."""
    if layout != "original":
        raise ConfigError(f"Qwen-VL was published in one layout alone, not in {layout!r}: use 'original'")
    vision, connector, resolution, decoder = config.vision, config.connector, config.resolution, config.decoder
    assert isinstance(connector, Resampler), "what the family accepts"
    assert isinstance(resolution, Squash), "what the family accepts"
    free = {name: getattr(vision, name) for name in ("patch_size", "dim", "num_layers", "num_heads", "mlp_dim")}
    problem = None
    if vision.replace(out_layers=(-1,)) != QWEN_VL_TOWER.replace(**free, image_size=TABLE_SIDE * vision.patch_size):
        problem = "a vision tower that differs from ViT-bigG in more than its sizes"
    elif vision.out_indices != (vision.num_layers,):
        problem = f"features of layers {vision.out_layers}"
    elif connector.num_heads * HEAD_DIM != config.decoder.dim or connector.norm_eps != 1e-6:
        problem = f"a resampler of {connector.num_heads} heads for rows of {config.decoder.dim}"
    elif config.image_token_id is None or config.image_token_id < 2:
        problem = "a model that has no token for picture slots"
    if problem is not None or not isinstance(decoder, DecoderConfig) or decoder.rope is None:
        raise ConfigError(f"Qwen-VL's config.json has no words for {problem or 'such a language model'}")
    rope = decoder.rope
    trained = {value for value in (rope.scaling and getattr(rope.scaling, "trained", None), rope.log_n) if value}
    plain = (decoder.norm, decoder.mlp, decoder.attention_bias, decoder.num_kv_heads, rope.sections)
    if (
        plain != ("rms", "swiglu", "qkv", decoder.num_heads, None)
        or len(trained) > 1
        or (rope.scaling is not None and rope.scaling.kind != "powers")
    ):
        raise ConfigError("Qwen-VL's config.json has no words for a language model that differs from Qwen in its parts")
    visual = {
        "heads": vision.num_heads,
        "image_size": resolution.tile_size,
        "image_start_id": (config.image_token_id or 0) - 2,
        "layers": vision.num_layers,
        "mlp_ratio": _ratio(vision),
        "output_dim": decoder.dim,
        "patch_size": vision.patch_size,
        "width": vision.dim,
    }
    if connector.side != TABLE_SIDE:
        visual["n_queries"] = connector.side**2
    hub: dict[str, Any] = {
        "architectures": ["QWenLMHeadModel"],
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "hidden_size": decoder.dim,
        "intermediate_size": 2 * decoder.mlp_dim,
        "kv_channels": decoder.head_width,
        "layer_norm_epsilon": decoder.norm_eps,
        "max_position_embeddings": decoder.max_positions,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "rotary_emb_base": rope.theta,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": trained.pop() if trained else DEFAULTS["seq_length"],
        "tie_word_embeddings": decoder.head == "tied",
        "use_dynamic_ntk": rope.scaling is not None,
        "use_logn_attn": rope.log_n is not None,
        "visual": visual,
        "vocab_size": decoder.vocab_size,
        CHAT_KEY: config.chat.model_dump(mode="json"),
    }
    return {CONFIG: hub}


def _ratio(vision: VisionConfig) -> float:
    """A ratio from which truncation gives the MLP's width back, in as few decimals as will do (4.9231 for 8192)."""
    for places in range(1, 16):
        ratio = round(vision.mlp_dim / vision.dim, places)
        if int(vision.dim * ratio) == vision.mlp_dim:
            return ratio
    return (vision.mlp_dim + 0.5) / vision.dim
