"""Published `config.json` files of InternVL, read: the authors' (`internvl_chat`) and transformers' own (`internvl`).

Both leave out what equals the defaults of their classes, which stand below. Keys that would change the numbers are read
or refused, never skipped. The authors' code prepares pictures by config.json alone; preprocessor_config.json is read
for the pixel statistics.
"""

from typing import Any

from opsin.errors import ConfigError, nearest
from opsin.families._chats import INTERNLM2_CHAT, INTERNVL_25, INTERNVL_HF, PHI3_CHAT
from opsin.families._family import HubConfig
from opsin.families._hub import CHAT_KEY, CONFIG, PREPROCESSOR
from opsin.families._internvl_text import SUSPICIOUS, read_decoder, text_kind
from opsin.families._keys import refuse_unread
from opsin.families._parts import IMAGENET_MEAN, IMAGENET_STD
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import PixelShuffleConnector
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import DynamicTiles, Pad, ResolutionConfig, Squash
from opsin.spec.vision import VisionConfig

ORIGINAL, NATIVE = "internvl_chat", "internvl"
"""`model_type` of the two layouts."""

TEMPLATES = {"internlm2-chat": INTERNLM2_CHAT, "phi3-chat": PHI3_CHAT, "internvl2_5": INTERNVL_25}
"""Our formats for the authors' templates, as they were when InternVL-1.5 was trained. Later code has other system texts
under the same names (`internlm2_chat_later`, `phi3_chat_later`)."""

CHAT_DEFAULTS: dict[str, Any] = {
    "downsample_ratio": 0.5,
    "force_image_size": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "ps_version": "v1",
    "select_layer": -1,
    "pad2square": False,
    "template": None,
}
"""InternVLChatConfig of the authors."""

VIT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12_800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
}
"""InternVisionConfig of the authors: InternViT-6B before its last three blocks were left out."""

NATIVE_VIT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": (448, 448),
    "patch_size": (14, 14),
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "attention_bias": False,
    "use_qk_norm": False,
}
"""transformers InternVLVisionConfig."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "downsample_ratio": (0.5,),
    "use_backbone_lora": (None, 0),
    "use_llm_lora": (None, 0),
    "quantization_config": (None,),
    "projector_hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("default",),
}
VIT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_channels": (3,),
    "quantization_config": (None,),
    "use_absolute_position_embeddings": (True,),
    "use_mask_token": (False,),
    "use_mean_pooling": (True,),
}
"""Keys that are served at these values only; any other value changes the numbers. (Without mean pooling, transformers
puts a norm behind the tower.)"""

READ = frozenset(
    {*CHAT_DEFAULTS, "vision_config", "image_token_id", "vision_feature_layer", "system_message"}
    # Kernels, lengths that follow from other keys, sampling.
    | {"image_seq_length", "image_fold", "attn_implementation", "use_bfloat16", "use_cache", "use_flash_attn"}
)
VIT_READ = frozenset(
    {*VIT_DEFAULTS, *NATIVE_VIT_DEFAULTS, "use_bfloat16", "use_flash_attn", "attention_dropout", "use_cache"}
)


def chat_for(hub: HubConfig) -> ChatFormat:
    """The format that config.json's template names; without one, that of its language model."""
    if hub.get("model_type") == NATIVE:
        return INTERNVL_HF
    name = hub.get("template")
    if name is None:
        chat = PHI3_CHAT if text_kind(hub.get("llm_config") or {}) == "phi3" else INTERNLM2_CHAT
    elif name in TEMPLATES:
        chat = TEMPLATES[name]
    else:
        raise ConfigError(
            f"{CONFIG}: template {name!r} is not known{nearest(str(name), TEMPLATES)}. Known: {', '.join(TEMPLATES)}"
        )
    return chat.replace(system=hub["system_message"]) if hub.get("system_message") is not None else chat


def read_config(hub: HubConfig, preprocessor: HubConfig | None, chat: ChatFormat) -> VLMConfig:
    """Either file to a config. Raises ConfigError."""
    if CHAT_KEY in hub:
        chat = ChatFormat.parse(hub[CHAT_KEY], where=f"{CONFIG} {CHAT_KEY}")
    refuse_unread(hub, neutral=NEUTRAL, read=READ, suspicious=SUSPICIOUS, where=CONFIG)
    read = _read_native if hub.get("model_type") == NATIVE else _read_original
    return read(hub, preprocessor or {}, chat)


def _read_original(hub: HubConfig, preprocessor: HubConfig, chat: ChatFormat) -> VLMConfig:
    hub = {**CHAT_DEFAULTS, **hub}
    text = hub.get("llm_config") or {}
    decoder = read_decoder(text, tied=bool(text.get("tie_word_embeddings", False)), where=f"{CONFIG} llm_config")
    vision = read_tower(hub.get("vision_config") or {}, out_layer=hub["select_layer"])
    vision = _with_statistics(vision, preprocessor)
    orders = {"v1": "columns", "v2": "rows"}
    if hub["ps_version"] not in orders:
        raise ConfigError(f"{CONFIG}: ps_version {hub['ps_version']!r} is neither 'v1' nor 'v2'")
    return VLMConfig.parse(
        {
            "vision": vision,
            "connector": PixelShuffleConnector.parse({"order": orders[hub["ps_version"]]}, where=CONFIG),
            "decoder": decoder,
            "resolution": _original_resolution(hub, vision),
            "chat": chat,
            # `<IMG_CONTEXT>`, the third of the nine tokens that InternVL adds to a vocabulary.
            "image_token_id": decoder.vocab_size - 7,
        },
        where=CONFIG,
    )


def _original_resolution(hub: HubConfig, vision: VisionConfig) -> ResolutionConfig:
    tile = hub["force_image_size"] or vision.image_size
    if hub["dynamic_image_size"]:  # tiles are squares, so that `pad2square` would pad nothing
        return DynamicTiles.parse(
            {
                "tile_size": tile,
                "min_tiles": hub["min_dynamic_patch"],
                "max_tiles": hub["max_dynamic_patch"],
                "thumbnail": "last" if hub["use_thumbnail"] else "none",
            },
            where=f"{CONFIG} force_image_size, min_dynamic_patch, max_dynamic_patch",
        )
    if hub["pad2square"]:
        return Pad.parse({"tile_size": tile, "fill": tuple(int(255 * mean) for mean in vision.mean)}, where=CONFIG)
    return Squash.parse({"tile_size": tile}, where=CONFIG)


def read_tower(hub: HubConfig, *, out_layer: int) -> VisionConfig:
    """An InternViT as its authors describe it, in a file of its own or within a chat model's."""
    where = f"{CONFIG} vision_config"
    refuse_unread(hub, neutral=VIT_NEUTRAL, read=VIT_READ, suspicious=SUSPICIOUS, where=where)
    return _tower({**VIT_DEFAULTS, **hub}, bias="qkv_bias", qk_norm="qk_normalization", out_layer=out_layer)


def _read_native(hub: HubConfig, preprocessor: HubConfig, chat: ChatFormat) -> VLMConfig:
    # The class takes Qwen2 where nothing is said.
    text = {"model_type": "qwen2", **(hub.get("text_config") or {})}
    tower = hub.get("vision_config") or {}
    where = f"{CONFIG} vision_config"
    refuse_unread(tower, neutral=VIT_NEUTRAL, read=VIT_READ, suspicious=SUSPICIOUS, where=where)
    get = {**NATIVE_VIT_DEFAULTS, **tower}
    for key in ("image_size", "patch_size"):
        sides = get[key] if isinstance(get[key], list | tuple) else [get[key]]
        if len(set(sides)) != 1:
            raise ConfigError(f"{where}: {key} {sides} is not square")
        get[key] = sides[0]
    vision = _tower(get, bias="attention_bias", qk_norm="use_qk_norm", out_layer=hub.get("vision_feature_layer", -1))
    if vision.qk_norm and vision.norm_eps != 1e-6:
        raise ConfigError(
            f"{where}: layer_norm_eps {vision.norm_eps} is not served with use_qk_norm: transformers norms queries and "
            "keys with 1e-06 whatever the file says, and here all norms of the tower have one value"
        )
    vision = _with_statistics(vision, preprocessor)
    return VLMConfig.parse(
        {
            "vision": vision,
            "connector": PixelShuffleConnector(),
            # The class ties head and embedding unless it is told otherwise.
            "decoder": read_decoder(
                text, tied=bool(hub.get("tie_word_embeddings", True)), where=f"{CONFIG} text_config"
            ),
            "resolution": _native_resolution(preprocessor, vision),
            "chat": chat,
            "image_token_id": hub.get("image_token_id", 151_667),
        },
        where=CONFIG,
    )


def _native_resolution(preprocessor: HubConfig, vision: VisionConfig) -> ResolutionConfig:
    """The image processor's limits. Its `crop_to_patches` is off, and InternVL's processor switches it on."""
    size = preprocessor.get("size")
    sides = set(size.values()) if isinstance(size, dict) else {size or vision.image_size}
    if sides != {vision.image_size}:
        raise ConfigError(f"{PREPROCESSOR}: size {size!r} differs from the tower's image_size {vision.image_size}")
    return DynamicTiles.parse(
        {
            "tile_size": vision.image_size,
            "min_tiles": preprocessor.get("min_patches", 1),
            "max_tiles": preprocessor.get("max_patches", 12),
        },
        where=PREPROCESSOR,
    )


def _tower(hub: HubConfig, *, bias: str, qk_norm: str, out_layer: int) -> VisionConfig:
    where = f"{CONFIG} vision_config"
    norms = {"layer_norm": "layer", "rms_norm": "rms"}
    if hub["norm_type"] not in norms:
        raise ConfigError(f"{where}: norm_type {hub['norm_type']!r} is not known{nearest(hub['norm_type'], norms)}")
    return VisionConfig.parse(
        {
            "image_size": hub["image_size"],
            "patch_size": hub["patch_size"],
            "dim": hub["hidden_size"],
            "num_layers": hub["num_hidden_layers"],
            "num_heads": hub["num_attention_heads"],
            "mlp_dim": hub["intermediate_size"],
            "activation": hub["hidden_act"],
            "norm": norms[hub["norm_type"]],
            "norm_eps": hub["layer_norm_eps"],
            "out_layers": (out_layer,),
            "positions": "learned_bicubic",
            "first_norm": False,
            "last_norm": False,
            "patch_bias": True,
            "qkv_bias": "all" if hub[bias] else "none",
            "qk_norm": bool(hub[qk_norm]),
            "layer_scale": True,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
        },
        where=where,
    )


def _with_statistics(vision: VisionConfig, preprocessor: HubConfig) -> VisionConfig:
    changes = {
        ours: tuple(preprocessor[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if preprocessor.get(theirs) is not None
    }
    return vision.replace(**changes)
