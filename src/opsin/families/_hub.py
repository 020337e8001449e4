"""Published `config.json` files of the LLaVA line, read and written.

Two layouts exist and neither says its name: `model_type` is `llava` in both. The authors' flat file has
`mm_vision_tower`, the transformers one has `text_config`. transformers writes only what differs from its class
defaults, so a missing key means the default of that class (the values in `LLAMA` and its neighbours below).

Keys that would change the numbers are read or refused, never skipped.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from opsin.errors import ConfigError, nearest
from opsin.families._family import HubConfig
from opsin.families._parts import clip_tower
from opsin.spec.chat import ChatFormat
from opsin.spec.connector import ConnectorConfig, LinearConnector, MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native
from opsin.spec.plan import Size
from opsin.spec.resolution import AnyRes, CenterCrop, Pad, ResolutionConfig
from opsin.spec.vision import VisionConfig

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"

CHAT_KEY = "opsin_chat"
"""Key under which exported config files carry the chat format they were trained with."""

LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
"""transformers LlamaConfig, the defaults of every version; num_key_value_heads follows num_attention_heads."""

MISTRAL: dict[str, Any] = LLAMA | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
"""transformers MistralConfig."""

TEXT_DEFAULTS = {"llama": LLAMA, "mistral": MISTRAL}

CLIP_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""transformers CLIPVisionConfig."""

LLAVA_VISION = CLIP_VISION | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""What transformers LlavaConfig and LlavaNextConfig put where vision_config is missing as a whole."""

NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""`image_grid_pinpoints` of LLaVA-NeXT, as published and as the default of transformers LlavaNextConfig."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "tie_word_embeddings": (None, False),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
    "projector_hidden_act": ("gelu", "linear"),
    "multimodal_projector_bias": (None, True),
    "use_image_newline_parameter": (None, True),
    "use_mm_proj": (None, True),
    "mm_resampler_type": (None,),
    "mm_newline_position": (None, "grid"),
    "s2": (None, False),
    "num_channels": (None, 3),
}
"""Keys that are served at these values only; any other value changes the numbers."""

READ = frozenset(
    {"image_aspect_ratio", "image_grid_pinpoints", "image_token_index", "image_token_id", "image_size", "vision_config"}
    | {
        "vision_feature_layer",
        "vision_feature_select_strategy",
        "mm_vision_tower",
        "mm_projector_type",
        "mm_hidden_size",
    }
    | {"mm_vision_select_layer", "mm_vision_select_feature", "mm_patch_merge_type", "vision_tower_config"}
    | {"rope_parameters", "rope_theta", "sliding_window"}
)
"""Keys the functions below read themselves."""

HARMLESS = frozenset(
    {"mm_use_im_start_end", "mm_use_im_patch_token", "mm_vision_tower_lr", "mm_projector_lr", "image_seq_length"}
    | {
        "image_crop_resolution",
        "image_split_resolution",
        "mm_tunable_parts",
        "attention_dropout",
        "mm_spatial_pool_mode",
    }
    | {"mm_spatial_pool_stride", "mm_spatial_pool_out_channels", "vision_tower_pretrained"}
)
"""Keys of the suspicious kind that change a chat format, training or nothing at all."""

SUSPICIOUS = re.compile(r"(mm_|image_|vision_|rope_|projector_|attention_|sliding_|quantization|multimodal_)")
"""What a key that changes the numbers would begin with."""


def is_transformers_layout(hub: HubConfig) -> bool:
    """Whether config.json is of the transformers kind. Both kinds share `model_type`; the contents tell them apart."""
    return "text_config" in hub or ("mm_vision_tower" not in hub and "vision_config" in hub)


def is_original_layout(hub: HubConfig) -> bool:
    """Whether config.json is of the authors' kind."""
    return "mm_vision_tower" in hub and not is_transformers_layout(hub)


def read_config(hub: HubConfig, preprocessor: HubConfig | None, chat: ChatFormat) -> VLMConfig:
    """config.json and the image processor's file, in either layout, to a config. Raises ConfigError."""
    if CHAT_KEY in hub:
        chat = ChatFormat.parse(hub[CHAT_KEY], where=f"{CONFIG} {CHAT_KEY}")
    read = _read_transformers if is_transformers_layout(hub) else _read_original
    return read(hub, preprocessor, chat)


def tower_repository(hub: HubConfig) -> str | None:
    """Repository of the vision tower, where config.json names a known one."""
    name = hub.get("mm_vision_tower")
    return f"openai/{_last_part(name)}" if isinstance(name, str) and clip_tower(_last_part(name)) else None


def original_resolution(hub: HubConfig, vision: VisionConfig) -> ResolutionConfig:
    """How the authors' code prepares pictures under this config.json."""
    mode = hub.get("image_aspect_ratio") or "square"
    tile = vision.image_size
    if mode == "square":
        return CenterCrop(tile_size=tile)
    if mode == "pad":
        return Pad(tile_size=tile, fill=_mean_color(vision))
    limited = re.fullmatch(r"anyres(?:_max_(\d+))?", str(mode))
    if not limited:
        known = ("square", "pad", "anyres", "anyres_max_9")
        raise ConfigError(f"{CONFIG}: image_aspect_ratio {mode!r} is not known{nearest(str(mode), known)}")
    words = str(hub.get("mm_patch_merge_type") or "flat").split("_")
    merge = "_".join(word for word in words if word != "nobase")
    return AnyRes.parse(
        {
            "tile_size": tile,
            "resolutions": read_pinpoints(hub.get("image_grid_pinpoints"), tile),
            "merge": merge,
            "base": "none" if "nobase" in words else "first",
            "max_base_tiles": int(limited[1]) if limited[1] else None,
        },
        where=f"{CONFIG} image_grid_pinpoints, mm_patch_merge_type",
    )


def read_pinpoints(value: Any, tile: int) -> tuple[Size, ...]:
    """`image_grid_pinpoints`: a list of pairs, a string of one (old files), or a range of grids `(1x1),...,(6x6)`."""
    if isinstance(value, str):
        corners = [int(number) for number in re.findall(r"\d+", value)]
        if re.fullmatch(r"\(\d+x\d+\),\.\.\.,\(\d+x\d+\)", value.replace(" ", "")):
            x0, y0, x1, y1 = corners
            value = [(tile * x, tile * y) for x in range(x0, x1 + 1) for y in range(y0, y1 + 1)]
        else:
            try:
                value = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                raise ConfigError(
                    f"{CONFIG}: image_grid_pinpoints {value!r} is neither a list of pairs nor a range of grids"
                ) from None
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{CONFIG}: anyres needs image_grid_pinpoints, a list of pairs of pixels; got {value!r}")
    pairs: list[Size] = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(side, int) for side in pair):
            raise ConfigError(f"{CONFIG}: image_grid_pinpoints holds {pair!r}, which is not a pair of pixels")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _read_original(hub: HubConfig, preprocessor: HubConfig | None, chat: ChatFormat) -> VLMConfig:
    _refuse_unknown(hub, CONFIG)
    vision = _original_vision(hub, preprocessor)
    if hub.get("mm_hidden_size", vision.out_dim) != vision.out_dim:
        raise ConfigError(
            f"{CONFIG}: mm_hidden_size {hub['mm_hidden_size']} differs from the {vision.out_dim} channels that "
            f"{hub['mm_vision_tower']!r} gives at mm_vision_select_layer {hub.get('mm_vision_select_layer', -1)}"
        )
    return _build(
        vision=vision,
        connector=_original_connector(hub),
        decoder=_decoder(hub, "mistral" if hub.get("model_type") == "llava_mistral" else "llama", CONFIG),
        resolution=original_resolution(hub, vision),
        chat=chat,
    )


def _original_vision(hub: HubConfig, preprocessor: HubConfig | None) -> VisionConfig:
    feature = hub.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise ConfigError(f"{CONFIG}: mm_vision_select_feature {feature!r} is neither 'patch' nor 'cls_patch'")
    changes: dict[str, Any] = {
        # llava/model/multimodal_encoder/clip_encoder.py, llava_arch.py: -1 where the key is missing.
        "out_layers": (hub.get("mm_vision_select_layer", -1),),
        "class_token": "drop" if feature == "patch" else "keep",
    }
    if isinstance(inline := hub.get("vision_tower_config"), Mapping):
        vision = _clip_vision(inline, CLIP_VISION, f"{CONFIG} vision_tower_config", changes)
    else:
        name = hub["mm_vision_tower"]
        known = clip_tower(_last_part(str(name)))
        if known is None:
            raise ConfigError(
                f"{CONFIG}: mm_vision_tower {name!r} is not a known tower. Known: openai/clip-vit-large-patch14, "
                "openai/clip-vit-large-patch14-336; any other CLIP can be described in full under vision_tower_config"
            )
        vision = known.replace(**changes)
    return _with_statistics(vision, preprocessor)


def _original_connector(hub: HubConfig) -> ConnectorConfig:
    kind = str(hub.get("mm_projector_type", "linear"))  # v0 files have no such key: multimodal_projector/builder.py
    if kind == "linear":
        return LinearConnector()
    layers = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not layers:
        raise ConfigError(
            f"{CONFIG}: mm_projector_type {kind!r} is not known{nearest(kind, ('linear', 'mlp2x_gelu'))}. "
            "Known: linear, mlpNx_gelu"
        )
    return LinearConnector() if layers[1] == "1" else MLPConnector.parse({"num_layers": int(layers[1])}, where=CONFIG)


def _transformers_connector(hub: HubConfig) -> ConnectorConfig:
    """Two layers; with nothing between them one, whose second does nothing (`_layouts`), which LLaVA-NeXT never had."""
    if hub.get("projector_hidden_act", "gelu") == "gelu":
        return MLPConnector(num_layers=2)
    if hub.get("model_type") == "llava_next":
        raise ConfigError(f"{CONFIG}: projector_hidden_act 'linear' is read for model_type llava only")
    return LinearConnector()


def _read_transformers(hub: HubConfig, preprocessor: HubConfig | None, chat: ChatFormat) -> VLMConfig:
    _refuse_unknown(hub, CONFIG)
    text, vision_hub = hub.get("text_config") or {}, hub.get("vision_config")
    strategy = hub.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ConfigError(f"{CONFIG}: vision_feature_select_strategy {strategy!r} is neither 'default' nor 'full'")
    layers = hub.get("vision_feature_layer", -2)
    changes = {
        "out_layers": tuple(layers) if isinstance(layers, list | tuple) else (layers,),
        "class_token": "drop" if strategy == "default" else "keep",
    }
    defaults = LLAVA_VISION if vision_hub is None else CLIP_VISION
    vision = _with_statistics(
        _clip_vision(vision_hub or {}, defaults, f"{CONFIG} vision_config", changes), preprocessor
    )
    resolution: ResolutionConfig
    if hub.get("model_type") == "llava_next":
        pinpoints = read_pinpoints(hub.get("image_grid_pinpoints", NEXT_PINPOINTS), vision.image_size)
        resolution = AnyRes.parse(
            {"tile_size": vision.image_size, "resolutions": pinpoints, "compat": "hf"},
            where=f"{CONFIG} image_grid_pinpoints",
        )
    elif preprocessor is not None and preprocessor.get("do_pad"):
        resolution = Pad(tile_size=vision.image_size, fill=_mean_color(vision))
    else:
        resolution = CenterCrop(tile_size=vision.image_size)
    _check_preprocessor(preprocessor, resolution)
    return _build(
        vision=vision,
        connector=_transformers_connector(hub),
        decoder=_decoder(text, str(text.get("model_type", "llama")), f"{CONFIG} text_config"),
        resolution=resolution,
        chat=chat,
        image_token_id=hub.get("image_token_id", hub.get("image_token_index", 32000)),
    )


def _build(**parts: Any) -> VLMConfig:
    return VLMConfig.parse(parts, where=CONFIG)


def _decoder(text: HubConfig, kind: str, where: str) -> DecoderConfig:
    if kind not in TEXT_DEFAULTS:
        raise ConfigError(
            f"{where}: a language model of type {kind!r} is not served. Known: {', '.join(TEXT_DEFAULTS)}"
        )
    _refuse_unknown(text, where)
    get = {**TEXT_DEFAULTS[kind], **text}.get
    rope = text.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{where}: rope_parameters {dict(rope)} are not served; only plain rotary positions are")
    window, positions = get("sliding_window"), get("max_position_embeddings")
    if kind == "mistral" and window is not None and window < positions:
        raise ConfigError(
            f"{where}: sliding_window {window} is shorter than max_position_embeddings {positions}, and attention here "
            "sees every earlier token. Set sliding_window to null, as LLaVA-NeXT does, or max_position_embeddings lower"
        )
    heads, dim, head_dim = get("num_attention_heads"), get("hidden_size"), get("head_dim")
    return DecoderConfig.parse(
        {
            "vocab_size": get("vocab_size"),
            "dim": dim,
            "num_layers": get("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": heads if get("num_key_value_heads") is None else get("num_key_value_heads"),
            "mlp_dim": get("intermediate_size"),
            "head_dim": None if head_dim is None or head_dim * heads == dim else head_dim,
            "norm_eps": get("rms_norm_eps"),
            "rope": {"theta": rope.get("rope_theta", get("rope_theta"))},
            "max_positions": positions,
        },
        where=where,
    )


def _clip_vision(hub: HubConfig, defaults: HubConfig, where: str, changes: dict[str, Any]) -> VisionConfig:
    kind = hub.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise ConfigError(f"{where}: a vision tower of type {kind!r} is not served; only 'clip_vision_model' is")
    _refuse_unknown({key: value for key, value in hub.items() if key != "hidden_act"}, where)
    get = {**defaults, **hub}.get
    return VisionConfig.parse(
        {
            "image_size": get("image_size"),
            "patch_size": get("patch_size"),
            "dim": get("hidden_size"),
            "num_layers": get("num_hidden_layers"),
            "num_heads": get("num_attention_heads"),
            "mlp_dim": get("intermediate_size"),
            "activation": get("hidden_act"),
            "norm_eps": get("layer_norm_eps"),
            **changes,
        },
        where=where,
    )


def _with_statistics(vision: VisionConfig, preprocessor: HubConfig | None) -> VisionConfig:
    """The tower with the pixel statistics of the image processor's file; CLIP's where there is none."""
    if preprocessor is None:
        return vision
    data = vision.model_dump() | {
        ours: tuple(preprocessor[theirs])
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
        if preprocessor.get(theirs) is not None
    }
    return VisionConfig.parse(data, where=PREPROCESSOR)


def _check_preprocessor(preprocessor: HubConfig | None, resolution: ResolutionConfig) -> None:
    """Refuse what the resolution rule does not do."""
    if preprocessor is None:
        return
    assert not isinstance(resolution, Native), "LLaVA reads squares"
    tile = resolution.tile_size
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if preprocessor.get(key, True) is not True:
            raise ConfigError(f"{PREPROCESSOR}: {key} {preprocessor[key]!r} is not served; it must be true")
    if preprocessor.get("resample", 3) != 3:
        raise ConfigError(
            f"{PREPROCESSOR}: resample {preprocessor['resample']!r} is not served; it must be 3 (bicubic)"
        )
    if abs(preprocessor.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise ConfigError(f"{PREPROCESSOR}: rescale_factor {preprocessor['rescale_factor']!r} must be 1/255")
    for key in ("size", "crop_size"):
        value = preprocessor.get(key)
        sides = set(value.values()) if isinstance(value, Mapping) else {value}
        if value is not None and sides != {tile}:
            raise ConfigError(f"{PREPROCESSOR}: {key} {value!r} differs from the tower's image_size {tile}")
    pinpoints = preprocessor.get("image_grid_pinpoints")
    if isinstance(resolution, AnyRes) and pinpoints is not None:
        theirs = read_pinpoints(pinpoints, tile)
        if theirs != resolution.resolutions:
            raise ConfigError(
                f"image_grid_pinpoints differ: {CONFIG} has {list(resolution.resolutions)}, "
                f"{PREPROCESSOR} {list(theirs)}"
            )


def _refuse_unknown(hub: HubConfig, where: str) -> None:
    for key, value in hub.items():
        if key in NEUTRAL:
            if value not in NEUTRAL[key]:
                only = " or ".join(repr(allowed) for allowed in NEUTRAL[key] if allowed is not None) or "null"
                raise ConfigError(f"{where}: {key} {value!r} changes what the model computes; only {only} is served")
        elif SUSPICIOUS.match(key) and key not in READ | HARMLESS and value not in (None, False, [], {}):
            raise ConfigError(
                f"{where}: key {key!r} (value {value!r}) is not known and may change what the model computes"
                f"{nearest(key, READ | NEUTRAL.keys())}. Remove it if you know that it does not"
            )


def _mean_color(vision: VisionConfig) -> tuple[int, int, int]:
    """The 8-bit colour of padding: llava/mm_utils.py truncates."""
    red, green, blue = (int(255 * mean) for mean in vision.mean)
    return red, green, blue


def _last_part(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
