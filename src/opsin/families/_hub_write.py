"""The JSON files that stand beside exported weights, in the authors' layout and in transformers'."""

from typing import Any

from opsin.errors import ConfigError
from opsin.families._family import HubConfig, HubFiles
from opsin.families._hub import CHAT_KEY, CONFIG, PREPROCESSOR, PROCESSOR
from opsin.families._layouts import num_connector_layers
from opsin.families._parts import tower_name
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import AnyRes, CenterCrop


def write_config(config: VLMConfig, layout: str) -> HubFiles:
    """Files for weights in `layout`. Raises ConfigError where that layout cannot describe the model."""
    files = _original(config) if layout == "original" else _transformers(config)
    files[CONFIG][CHAT_KEY] = config.chat.model_dump(mode="json")
    return files


def _original(config: VLMConfig) -> HubFiles:
    vision, resolution = config.vision, config.resolution
    if len(vision.out_layers) > 1:
        raise ConfigError(f"the authors' layout names one tower layer; this model reads {list(vision.out_layers)}")
    num_layers = num_connector_layers(config)
    hub: dict[str, Any] = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **_decoder(config),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "mm_hidden_size": vision.out_dim,
        "mm_projector_type": "linear" if num_layers == 1 else f"mlp{num_layers}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": any(piece.kind == "control" for piece in config.chat.markup.before),
        "mm_vision_select_feature": "patch" if vision.class_token == "drop" else "cls_patch",
        "mm_vision_select_layer": vision.out_layers[0],
        # Without it the authors' code takes the tower from its own repository, trained or not.
        "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True,
    }
    if (name := tower_name(vision)) is not None:
        hub["mm_vision_tower"] = name
    else:
        hub |= {"mm_vision_tower": "vision_tower_config", "vision_tower_config": _tower(config)}
    if isinstance(resolution, AnyRes):
        limit = resolution.max_base_tiles
        hub["image_aspect_ratio"] = "anyres" if limit is None else f"anyres_max_{limit}"
        hub["image_grid_pinpoints"] = [list(pair) for pair in resolution.resolutions]
        hub["mm_patch_merge_type"] = resolution.merge + ("" if resolution.base == "first" else "_nobase")
    else:
        hub["image_aspect_ratio"] = "square" if isinstance(resolution, CenterCrop) else "pad"
        hub["mm_patch_merge_type"] = "flat"
    return {CONFIG: hub, PREPROCESSOR: _preprocessor(config, "CLIPImageProcessor")}


def _transformers(config: VLMConfig) -> HubFiles:
    vision, resolution = config.vision, config.resolution
    num_layers, anyres = num_connector_layers(config), resolution if isinstance(resolution, AnyRes) else None
    if num_layers > 2 or (num_layers == 1 and anyres):
        raise ConfigError(
            f"transformers' LLaVA has a connector of two layers; this one has {num_layers}. Export with layout "
            "'original'"
        )
    if config.image_token_id is None:
        raise ConfigError(
            "transformers marks picture slots by a token id, and this model has none: its vocabulary of "
            f"{config.decoder.vocab_size} rows is all text. Export with layout 'original', or train from an -hf preset"
        )
    if anyres and (anyres.merge, anyres.base, anyres.max_base_tiles) != ("spatial_unpad", "first", None):
        raise ConfigError(
            f"transformers' LLaVA-NeXT merges tiles as 'spatial_unpad' with the base first; this model has merge "
            f"{anyres.merge!r}, base {anyres.base!r}, max_base_tiles {anyres.max_base_tiles}. "
            "Export with layout 'original'"
        )
    layers = vision.out_layers
    kind = "llava_next" if anyres else "llava"
    hub: dict[str, Any] = {
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": config.image_token_id,
        "image_seq_length": vision.num_tokens((1, vision.side, vision.side)),
        "model_type": kind,
        "multimodal_projector_bias": True,
        # One layer is written as two, of which the second is the identity, with nothing between them.
        "projector_hidden_act": "gelu" if num_layers == 2 else "linear",
        "text_config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_decoder(config)},
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "clip_vision_model", **_tower(config)},
        "vision_feature_layer": layers[0] if len(layers) == 1 else list(layers),
        "vision_feature_select_strategy": "default" if vision.class_token == "drop" else "full",
        "vocab_size": config.decoder.vocab_size,
    }
    if anyres:
        hub["image_grid_pinpoints"] = [list(pair) for pair in anyres.resolutions]
        hub["use_image_newline_parameter"] = True
        preprocessor = _preprocessor(config, "LlavaNextImageProcessor") | {
            "aspect_ratio_setting": "anyres",
            "image_grid_pinpoints": hub["image_grid_pinpoints"],
        }
        processor = "LlavaNextProcessor"
    else:
        preprocessor = _preprocessor(config, "LlavaImageProcessor") | {"do_pad": resolution.kind == "pad"}
        processor = "LlavaProcessor"
    return {
        CONFIG: hub,
        PREPROCESSOR: preprocessor | {"processor_class": processor},
        PROCESSOR: {
            "image_token": "<image>",
            # The class token: counted by the tower, dropped again by the select strategy.
            "num_additional_image_tokens": 1,
            "patch_size": vision.patch_size,
            "processor_class": processor,
            "vision_feature_select_strategy": hub["vision_feature_select_strategy"],
        },
    }


def _decoder(config: VLMConfig) -> HubConfig:
    decoder = config.decoder
    assert decoder.rope is not None, "Llama turns its queries and keys"
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.dim,
        "intermediate_size": decoder.mlp_dim,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope.theta,
        "rope_scaling": None,
        "attention_bias": False,
        "max_position_embeddings": decoder.max_positions,
        "tie_word_embeddings": False,
    }


def _tower(config: VLMConfig) -> HubConfig:
    vision = config.vision
    return {
        "hidden_size": vision.dim,
        "intermediate_size": vision.mlp_dim,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.norm_eps,
        "num_channels": 3,
    }


def _preprocessor(config: VLMConfig, kind: str) -> dict[str, Any]:
    side = config.vision.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(config.vision.mean),
        "image_processor_type": kind,
        "image_std": list(config.vision.std),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
