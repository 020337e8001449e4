"""Published `config.json` and `preprocessor_config.json` files of Qwen2-VL, read and written.

The published file is flat; transformers 4.52 and later nest the language model's keys under `text_config`. Both leave
out what equals the defaults of their classes, which stand below. Keys that would change the numbers are read or
refused, never skipped.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from opsin.errors import ConfigError, nearest
from opsin.families._family import HubConfig, HubFiles
from opsin.families._hub import CHAT_KEY, CONFIG, PREPROCESSOR
from opsin.families._parts import QWEN2_VL_TOWER
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import PatchMerger
from opsin.spec.decoder import DecoderConfig, RopeConfig
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native
from opsin.spec.vision import VisionConfig

TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
"""transformers Qwen2VLTextConfig: the 72B, but for its norm."""

VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "hidden_act": "quick_gelu",
}
"""transformers Qwen2VLVisionConfig. Published files leave `hidden_act` out."""

DEFAULT_MAX_PIXELS = 1280 * 28 * 28
"""transformers Qwen2VLImageProcessor; the published preprocessor_config.json says 16384 blocks."""

OWN_KEY = "opsin"
"""Key under which exported config files carry what the published ones have no words for: how videos are read, what
happens to small sides, and the rule of positions after a picture."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (None, False),
    "attention_bias": (None, True),
    "quantization_config": (None,),
}
VISION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "in_chans": (3,),
    "in_channels": (3,),
    "spatial_merge_size": (2,),
    "model_type": ("qwen2_vl", "qwen2_vl_vision"),
    "quantization_config": (None,),
}
"""Keys that are served at these values only; any other value changes the numbers."""

READ = frozenset(
    {"rope_scaling", "rope_parameters", "rope_theta", "image_token_id", "video_token_id", "vision_config"}
    | {"vision_start_token_id", "vision_end_token_id", "vision_token_id", "sliding_window", "attention_dropout"}
)
SUSPICIOUS = re.compile(r"(rope_|vision_|image_|video_|attention_|sliding_|quantization|mrope|spatial_|temporal_)")
"""What a key that changes the numbers would begin with."""


def read_config(hub: HubConfig, preprocessor: HubConfig | None, chat: ChatFormat) -> VLMConfig:
    """The published flat file, or the nested one of transformers 4.52 and later."""
    if CHAT_KEY in hub:
        chat = ChatFormat.parse(hub[CHAT_KEY], where=f"{CONFIG} {CHAT_KEY}")
    text, vision, own = hub.get("text_config") or hub, hub.get("vision_config") or {}, hub.get(OWN_KEY) or {}
    _refuse(hub, NEUTRAL, READ, CONFIG)
    _refuse(text, NEUTRAL, READ, f"{CONFIG} text_config")
    _refuse(vision, VISION_NEUTRAL, frozenset({"rope_parameters", *VISION_DEFAULTS}), f"{CONFIG} vision_config")
    get = {**TEXT_DEFAULTS, **text}.get
    tied = hub.get("tie_word_embeddings") or text.get("tie_word_embeddings")
    heads, kv_heads = get("num_attention_heads"), get("num_key_value_heads")
    decoder = DecoderConfig.parse(
        {
            "vocab_size": get("vocab_size"),
            "dim": get("hidden_size"),
            "num_layers": get("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": heads if kv_heads is None else kv_heads,
            "mlp_dim": get("intermediate_size"),
            "norm_eps": get("rms_norm_eps"),
            "attention_bias": "qkv",
            "head": "tied" if tied else "own",
            "rope": _rope(text, own.get("picture_span", "time_and_space")),
            "max_positions": get("max_position_embeddings"),
        },
        where=CONFIG,
    )
    if vision.get("hidden_size", decoder.dim) != decoder.dim:
        raise ConfigError(
            f"{CONFIG}: the rows of vision_config are {vision['hidden_size']} wide, the language model {decoder.dim}"
        )
    tower = _tower({**VISION_DEFAULTS, **vision}, preprocessor or {})
    return VLMConfig.parse(
        {
            "vision": tower,
            "connector": PatchMerger(),
            "decoder": decoder,
            "resolution": own.get("resolution") or _resolution(preprocessor, tower),
            "chat": chat,
            "image_token_id": hub.get("image_token_id", 151_655),
            "video_token_id": hub.get("video_token_id", 151_656),
        },
        where=CONFIG,
    )


def _rope(text: HubConfig, picture_span: str) -> RopeConfig:
    theta = text.get("rope_theta", TEXT_DEFAULTS["rope_theta"])
    scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "mrope"))
    if kind not in ("mrope", "default"):
        raise ConfigError(f"{CONFIG}: positions of type {kind!r} are not served, only 'mrope' is")
    return RopeConfig.parse(
        {
            "theta": scaling.get("rope_theta", theta),
            "sections": scaling.get("mrope_section", (16, 24, 24)),
            "picture_span": picture_span,
        },
        where=f"{CONFIG} rope_scaling",
    )


def _tower(hub: HubConfig, preprocessor: HubConfig) -> VisionConfig:
    theta = (hub.get("rope_parameters") or {}).get("rope_theta", 10_000)
    if theta != 10_000:
        raise ConfigError(f"{CONFIG} vision_config: rope_theta {theta} is not served; only 10000 is")
    statistics = {
        ours: tuple(preprocessor[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if preprocessor.get(theirs) is not None
    }
    fields = {
        "image_size": hub["patch_size"],
        "patch_size": hub["patch_size"],
        "dim": hub["embed_dim"],
        "num_layers": hub["depth"],
        "num_heads": hub["num_heads"],
        "mlp_dim": math.floor(hub["embed_dim"] * hub["mlp_ratio"]),
        "activation": hub["hidden_act"],
        "frames": hub["temporal_patch_size"],
    }
    kept = {name: getattr(QWEN2_VL_TOWER, name) for name in VisionConfig.model_fields}
    return VisionConfig.parse({**kept, **fields, **statistics}, where=f"{CONFIG} vision_config")


def _resolution(preprocessor: HubConfig | None, tower: VisionConfig) -> Native:
    """Limits of preprocessor_config.json; without the file, those that are published."""
    factor = 2 * tower.patch_size
    if preprocessor is None:
        return Native(factor=factor)
    wanted = {
        "patch_size": tower.patch_size,
        "temporal_patch_size": tower.frames,
        "merge_size": 2,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "resample": 3,
    }
    for key, value in wanted.items():
        if preprocessor.get(key, value) not in (value, None):
            raise ConfigError(f"{PREPROCESSOR}: {key} {preprocessor[key]!r} is not served; it must be {value!r}")
    if not math.isclose(preprocessor.get("rescale_factor", 1 / 255) * 255, 1, rel_tol=1e-6):
        raise ConfigError(f"{PREPROCESSOR}: rescale_factor {preprocessor['rescale_factor']!r} must be 1/255")
    size = preprocessor.get("size") or {}
    limits = [
        next((value for value in values if value is not None), default)
        for default, values in (
            (56 * 56, (preprocessor.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"))),
            (DEFAULT_MAX_PIXELS, (preprocessor.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"))),
        )
    ]
    return Native.parse({"factor": factor, "min_pixels": limits[0], "max_pixels": limits[1]}, where=PREPROCESSOR)


def _refuse(hub: HubConfig, neutral: Mapping[str, tuple[Any, ...]], read: frozenset[str], where: str) -> None:
    for key, value in hub.items():
        if key in neutral and value not in neutral[key]:
            only = " or ".join(repr(allowed) for allowed in neutral[key] if allowed is not None) or "null"
            raise ConfigError(f"{where}: {key} {value!r} changes what the model computes; only {only} is served")
        known = key in neutral or key in read or value in (None, False, [], {})
        if not known and SUSPICIOUS.match(key) and key not in ("spatial_patch_size",):
            raise ConfigError(
                f"{where}: key {key!r} (value {value!r}) is not known and may change what the model computes"
                f"{nearest(key, read | neutral.keys())}. Remove it if you know that it does not"
            )


def write_config(config: VLMConfig, layout: str) -> HubFiles:
    """`hf`: the flat file as published; `hf-v5`: the nested one of transformers 5."""
    if layout not in ("hf", "hf-v5"):
        raise ConfigError(f"Qwen2-VL was published in transformers' layout alone, not in {layout!r}: use 'hf'")
    text, vision, resolution = _text_keys(config), _vision_keys(config), config.resolution
    assert isinstance(resolution, Native)
    assert config.decoder.rope is not None
    own: dict[str, Any] = {}
    said = {name: getattr(resolution, name) for name in ("factor", "min_pixels", "max_pixels")}
    if resolution != Native(**said):
        own["resolution"] = resolution.model_dump(mode="json")
    if config.decoder.rope.picture_span != "time_and_space":
        own["picture_span"] = config.decoder.rope.picture_span
    hub: dict[str, Any] = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "tie_word_embeddings": config.decoder.head == "tied",
        "vision_config": vision,
        CHAT_KEY: config.chat.model_dump(mode="json"),
        **({OWN_KEY: own} if own else {}),
    }
    hub |= text if layout == "hf" else {"text_config": {"model_type": "qwen2_vl_text", **text}}
    preprocessor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.vision.mean),
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": list(config.vision.std),
        "max_pixels": resolution.max_pixels,
        "merge_size": 2,
        "min_pixels": resolution.min_pixels,
        "patch_size": config.vision.patch_size,
        "processor_class": "Qwen2VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": config.vision.frames,
    }
    return {CONFIG: hub, PREPROCESSOR: preprocessor}


def _text_keys(config: VLMConfig) -> dict[str, Any]:
    decoder = config.decoder
    rope = decoder.rope
    if rope is None or rope.sections is None or rope.scaling or rope.log_n:
        raise ConfigError("the language model of Qwen2-VL turns by positions on three axes, and by nothing else")
    if (decoder.norm, decoder.mlp, decoder.attention_bias) != ("rms", "swiglu", "qkv"):
        raise ConfigError("the language model of Qwen2-VL has RMSNorm, SwiGLU, and biases on queries, keys and values")
    if decoder.head_width * decoder.num_heads != decoder.dim:
        raise ConfigError("the heads of Qwen2-VL's language model are together as wide as the model")
    return {
        "hidden_act": "silu",
        "hidden_size": decoder.dim,
        "intermediate_size": decoder.mlp_dim,
        "max_position_embeddings": decoder.max_positions,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.norm_eps,
        "rope_scaling": {"type": "mrope", "mrope_section": list(rope.sections)},
        "rope_theta": rope.theta,
        "use_sliding_window": False,
        "vocab_size": decoder.vocab_size,
    }


def _vision_keys(config: VLMConfig) -> dict[str, Any]:
    vision, resolution = config.vision, config.resolution
    own = ("image_size", "patch_size", "dim", "num_layers", "num_heads", "mlp_dim", "activation", "frames")
    free = {name: getattr(vision, name) for name in (*own, "mean", "std")}
    last = vision.num_used_layers == vision.num_layers and len(vision.out_layers) == 1
    if not last or vision.replace(out_layers=(-1,)) != QWEN2_VL_TOWER.replace(**free):
        raise ConfigError("this vision tower differs from Qwen2-VL's in more than its sizes")
    if config.connector != PatchMerger() or not isinstance(resolution, Native):
        raise ConfigError(
            "Qwen2-VL joins patches two by two and reads pictures at native resolution; this model differs"
        )
    if resolution.factor != 2 * vision.patch_size or vision.mlp_dim % vision.dim:
        raise ConfigError(
            f"Qwen2-VL's files have no words for factor {resolution.factor} with patches of {vision.patch_size} px, or "
            f"for an MLP of {vision.mlp_dim} in a tower of {vision.dim}"
        )
    return {
        "depth": vision.num_layers,
        "embed_dim": vision.dim,
        "hidden_act": vision.activation,
        "hidden_size": config.decoder.dim,
        "in_chans": 3,
        "in_channels": 3,
        "mlp_ratio": vision.mlp_dim // vision.dim,
        "model_type": "qwen2_vl",
        "num_heads": vision.num_heads,
        "patch_size": vision.patch_size,
        "spatial_merge_size": 2,
        "spatial_patch_size": vision.patch_size,
        "temporal_patch_size": vision.frames,
    }
