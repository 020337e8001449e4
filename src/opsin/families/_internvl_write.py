"""The JSON files that stand beside exported InternVL weights, in the authors' layout and in transformers'."""

from typing import Any

from opsin.errors import ConfigError
from opsin.families._family import HubFiles
from opsin.families._hub import CHAT_KEY, CONFIG, PREPROCESSOR, PROCESSOR
from opsin.families._internvl_hub import NATIVE, ORIGINAL, TEMPLATES
from opsin.families._internvl_layouts import causal, possible_names
from opsin.families._internvl_text import write_decoder
from opsin.families._parts import INTERNVIT_300M
from opsin.spec.connector import PixelShuffleConnector
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native
from opsin.spec.resolution import DynamicTiles, Pad

FREE = (
    *("image_size", "patch_size", "dim", "num_layers", "num_heads", "mlp_dim", "activation", "norm", "norm_eps"),
    *("out_layers", "qkv_bias", "qk_norm", "mean", "std"),
)
"""What may differ between two towers that published files can describe."""


def write_config(config: VLMConfig, layout: str) -> HubFiles:
    """Files for weights in `layout`. Raises ConfigError where that layout cannot describe the model."""
    vision, connector = config.vision, config.connector
    free = {name: getattr(vision, name) for name in FREE}
    if vision != INTERNVIT_300M.replace(**free) or len(vision.out_layers) != 1:
        raise ConfigError("this vision tower differs from InternViT in more than published files have words for")
    assert isinstance(connector, PixelShuffleConnector), "what the family accepts"
    hub = _original(config, connector) if layout == "original" else _native(config, connector)
    hub[CHAT_KEY] = config.chat.model_dump(mode="json")
    files = {CONFIG: hub, PREPROCESSOR: _preprocessor(config, layout)}
    if layout != "original":
        files[PROCESSOR] = {"image_seq_length": hub["image_seq_length"], "processor_class": "InternVLProcessor"}
    return files


def _original(config: VLMConfig, connector: PixelShuffleConnector) -> dict[str, Any]:
    vision, resolution, decoder = config.vision, config.resolution, causal(config)
    if resolution.kind not in ("dynamic_tiles", "pad", "squash"):
        raise ConfigError(f"InternVL's files have no words for resolution {resolution.kind!r}")
    names = possible_names(decoder)[0]
    templates = {chat.name: template for template, chat in TEMPLATES.items()}
    # Formats of later code go by the names of earlier ones. The authors' code needs one, also where none is right.
    usual = "phi3-chat" if names == "phi3" else "internlm2-chat"
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": isinstance(resolution, DynamicTiles),
        "force_image_size": resolution.tile_size,
        "llm_config": write_decoder(decoder, names),
        "max_dynamic_patch": resolution.max_tiles if isinstance(resolution, DynamicTiles) else 1,
        "min_dynamic_patch": resolution.min_tiles if isinstance(resolution, DynamicTiles) else 1,
        "model_type": ORIGINAL,
        "pad2square": isinstance(resolution, Pad),
        "ps_version": "v2" if connector.order == "rows" else "v1",
        "select_layer": vision.out_layers[0],
        "system_message": config.chat.system,
        "template": templates.get(config.chat.name.removesuffix("_later"), usual),
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": isinstance(resolution, DynamicTiles) and resolution.thumbnail == "last",
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": vision.activation,
            "hidden_size": vision.dim,
            "image_size": vision.image_size,
            "intermediate_size": vision.mlp_dim,
            "layer_norm_eps": vision.norm_eps,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm" if vision.norm == "layer" else "rms_norm",
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "qk_normalization": vision.qk_norm,
            "qkv_bias": vision.qkv_bias == "all",
        },
    }


def _native(config: VLMConfig, connector: PixelShuffleConnector) -> dict[str, Any]:
    vision, resolution, decoder = config.vision, config.resolution, causal(config)
    problem = None
    if connector.order != "rows":
        problem = "joins patches along rows (ps_version v2) only"
    elif not isinstance(resolution, DynamicTiles) or resolution.thumbnail == "none":
        problem = "tiles pictures and ends them with a thumbnail"
    elif resolution.tile_size != vision.image_size:
        problem = f"has tiles as large as the tower's table of positions, {vision.image_size} px"
    elif vision.qk_norm and vision.norm_eps != 1e-6:
        problem = "norms queries and keys with 1e-06"
    elif config.image_token_id is None:
        problem = "marks picture slots by a token id, and this model has none"
    if problem is not None:
        raise ConfigError(f"transformers' InternVL {problem}; export with layout 'original'")
    side, patch = vision.image_size, vision.patch_size
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": 0.5,
        "image_seq_length": (vision.side // 2) ** 2,
        "image_token_id": config.image_token_id,
        "model_type": NATIVE,
        "projector_hidden_act": "gelu",
        "text_config": write_decoder(decoder, "llama"),
        "tie_word_embeddings": decoder.head == "tied",
        "vision_config": {
            "attention_bias": vision.qkv_bias == "all",
            "attention_dropout": 0.0,
            "hidden_act": vision.activation,
            "hidden_dropout_prob": 0.0,
            "hidden_size": vision.dim,
            "image_size": [side, side],
            "intermediate_size": vision.mlp_dim,
            "layer_norm_eps": vision.norm_eps,
            "model_type": "internvl_vision",
            "norm_type": "layer_norm" if vision.norm == "layer" else "rms_norm",
            "num_attention_heads": vision.num_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": [patch, patch],
            "projection_dropout": 0.0,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": vision.qk_norm,
        },
        "vision_feature_layer": vision.out_layers[0],
        "vision_feature_select_strategy": "default",
    }


def _preprocessor(config: VLMConfig, layout: str) -> dict[str, Any]:
    resolution = config.resolution
    assert not isinstance(resolution, Native)
    side = resolution.tile_size
    files: dict[str, Any] = {
        "do_normalize": True,
        "do_resize": True,
        "image_mean": list(config.vision.mean),
        "image_std": list(config.vision.std),
        "resample": 3,
    }
    if layout == "original":
        return {"crop_size": side, "do_center_crop": True, "image_processor_type": "CLIPImageProcessor", **files} | {
            "size": side
        }
    assert isinstance(resolution, DynamicTiles)
    return {
        **files,
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_rescale": True,
        "image_processor_type": "GotOcr2ImageProcessor",
        "max_patches": resolution.max_tiles,
        "min_patches": resolution.min_tiles,
        "processor_class": "InternVLProcessor",
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
