"""What the published repositories say about themselves: config files, and the names and shapes of their tensors.

Config files hold the keys that matter, as published: the converted ones are partial, and mean transformers' defaults
for what they leave out. Names are written from the published listings, not made by the rules that are tested with them.
"""

from typing import Any

from families import published_blip2, published_internvl, published_qwen_vl

Shapes = dict[str, tuple[int, ...]]

VICUNA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
VICUNA_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
MISTRAL: dict[str, Any] = VICUNA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8}
YI: dict[str, Any] = {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_hidden_layers": 60,
    "num_attention_heads": 56,
    "num_key_value_heads": 8,
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

ORIGINAL_15: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "freeze_mm_mlp_adapter": False,
    "tune_mm_mlp_adapter": False,
    "mm_resampler_type": None,
    "use_mm_proj": True,
    "unfreeze_mm_vision_tower": False,
}
ORIGINAL_16: dict[str, Any] = ORIGINAL_15 | {
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": PINPOINTS,
    "image_split_resolution": 224,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_tower_lr": 2e-6,
    "unfreeze_mm_vision_tower": True,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
}
ORIGINAL_V0: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": -1,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "rms_norm_eps": 1e-6,
    "mm_hidden_size": 1024,
    "mm_use_im_start_end": True,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14",
    "use_mm_proj": True,
}
CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
HF: dict[str, Any] = {
    "ignore_index": -100,
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "vision_config": CLIP_L_336,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
HF_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float16",
    "vocab_size": 32064,
}
HF_15 = HF | {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "pad_token_id": 32001}
HF_16 = HF | {
    "architectures": ["LlavaNextForConditionalGeneration"],
    "model_type": "llava_next",
    "image_grid_pinpoints": PINPOINTS,
    "use_image_newline_parameter": True,
}

QWEN2_VL: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "qwen2_vl",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
QWEN2_VL_TOWER: dict[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}
QWEN2_VL_SIZES: dict[str, dict[str, Any]] = {
    "2b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_window_layers": 28,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
    "72b": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "max_window_layers": 80,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
    },
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llava-7b-v0": ORIGINAL_V0 | VICUNA_7B | {"vocab_size": 32004},
    "llava-13b-v0": ORIGINAL_V0 | VICUNA_13B | {"vocab_size": 32004},
    "llava-7b-v1.1": ORIGINAL_V0 | VICUNA_7B | {"vocab_size": 32003},
    "llava-13b-v1.1": ORIGINAL_V0 | VICUNA_13B | {"vocab_size": 32003},
    "llava-1.5-7b": ORIGINAL_15 | VICUNA_7B,
    "llava-1.5-13b": ORIGINAL_15 | VICUNA_13B | {"model_type": "llava_llama"},
    "llava-next-vicuna-7b": ORIGINAL_16 | VICUNA_7B,
    "llava-next-vicuna-13b": ORIGINAL_16 | VICUNA_13B,
    "llava-next-mistral-7b": ORIGINAL_16
    | MISTRAL
    | {"model_type": "llava_mistral", "rope_theta": 1e6, "sliding_window": None, "max_position_embeddings": 32768},
    "llava-next-34b": ORIGINAL_16 | YI | {"vocab_size": 64000, "rope_theta": 5e6, "eos_token_id": 7},
    # The 7B leaves out every number that LlamaConfig has as its default.
    "llava-1.5-7b-hf": HF_15 | {"text_config": HF_LLAMA},
    "llava-1.5-13b-hf": HF_15 | {"text_config": HF_LLAMA | VICUNA_13B},
    "llava-next-vicuna-7b-hf": HF_16 | {"text_config": HF_LLAMA},
    "llava-next-vicuna-13b-hf": HF_16 | {"text_config": HF_LLAMA | VICUNA_13B},
    "llava-next-mistral-7b-hf": HF_16
    | {
        "text_config": {
            "model_type": "mistral",
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "vocab_size": 32064,
        }
    },
    "llava-next-34b-hf": HF_16
    | {"image_token_index": 64000, "text_config": HF_LLAMA | YI | {"rope_theta": 5e6, "vocab_size": 64064}},
} | {
    # A base model's file is the same: only its name tells them apart.
    f"qwen2-vl-{size}-instruct": QWEN2_VL
    | sizes
    | {"vision_config": QWEN2_VL_TOWER | {"hidden_size": sizes["hidden_size"]}}
    for size, sizes in QWEN2_VL_SIZES.items()
}
CONFIGS |= published_internvl.CONFIGS | published_blip2.CONFIGS | published_qwen_vl.CONFIGS
"""Preset -> config.json of its repository."""


def tower(prefix: str, side: int) -> Shapes:
    """CLIP ViT-L/14 with side x side patches."""
    shapes: Shapes = {
        "embeddings.class_embedding": (1024,),
        "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding.weight": (side * side + 1, 1024),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (1024,), f"{norm}.bias": (1024,)}
    for layer in range(24):
        at = f"encoder.layers.{layer}"
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.weight": (1024,), f"{at}.{norm}.bias": (1024,)}
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}.self_attn.{name}.weight": (1024, 1024), f"{at}.self_attn.{name}.bias": (1024,)}
        shapes |= {f"{at}.mlp.fc1.weight": (4096, 1024), f"{at}.mlp.fc1.bias": (4096,)}
        shapes |= {f"{at}.mlp.fc2.weight": (1024, 4096), f"{at}.mlp.fc2.bias": (1024,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def language_model(prefix: str, head: str, config: dict[str, Any], rows: int) -> Shapes:
    """A Llama of the numbers in `config`."""
    dim, mlp = config["hidden_size"], config["intermediate_size"]
    kv = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"embed_tokens.weight": (rows, dim), "norm.weight": (dim,)}
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (dim,), f"{at}.post_attention_layernorm.weight": (dim,)}
        for name, out in (("q_proj", dim), ("k_proj", kv), ("v_proj", kv), ("o_proj", dim)):
            shapes[f"{at}.self_attn.{name}.weight"] = (out, dim)
        shapes |= {f"{at}.mlp.gate_proj.weight": (mlp, dim), f"{at}.mlp.up_proj.weight": (mlp, dim)}
        shapes[f"{at}.mlp.down_proj.weight"] = (dim, mlp)
    return {prefix + name: shape for name, shape in shapes.items()} | {head: (rows, dim)}


def original(config: dict[str, Any], rows: int, *, side: int, layers: int, newline: bool) -> Shapes:
    """A checkpoint of the authors, tower included (LLaVA-NeXT's are; before, the tower is a repository of its own)."""
    dim = config["hidden_size"]
    shapes = tower("model.vision_tower.vision_tower.vision_model.", side)
    if layers == 1:
        shapes |= {"model.mm_projector.weight": (dim, 1024), "model.mm_projector.bias": (dim,)}
    else:
        shapes |= {"model.mm_projector.0.weight": (dim, 1024), "model.mm_projector.0.bias": (dim,)}
        shapes |= {"model.mm_projector.2.weight": (dim, dim), "model.mm_projector.2.bias": (dim,)}
    if newline:
        shapes["model.image_newline"] = (dim,)
    return shapes | language_model("model.", "lm_head.weight", config, rows)


def converted(config: dict[str, Any], rows: int, *, newline: bool) -> Shapes:
    """A llava-hf checkpoint."""
    dim = config["hidden_size"]
    shapes = tower("vision_tower.vision_model.", 24)
    for number, inputs in ((1, 1024), (2, dim)):
        at = f"multi_modal_projector.linear_{number}"
        shapes |= {f"{at}.weight": (dim, inputs), f"{at}.bias": (dim,)}
    if newline:
        shapes["image_newline"] = (dim,)
    return shapes | language_model("language_model.model.", "language_model.lm_head.weight", config, rows)


def qwen2_vl(config: dict[str, Any]) -> Shapes:
    """A repository of Qwen2-VL, whose tower counts its merger in; no head is stored where it is tied."""
    dim = config["hidden_size"]
    kv = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: Shapes = {"visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14)}
    for layer in range(32):
        at = f"visual.blocks.{layer}"
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (1280,), f"{at}.{norm}.bias": (1280,)}
        for name, out, inner in (
            ("attn.qkv", 3840, 1280),
            ("attn.proj", 1280, 1280),
            ("mlp.fc1", 5120, 1280),
            ("mlp.fc2", 1280, 5120),
        ):
            shapes |= {f"{at}.{name}.weight": (out, inner), f"{at}.{name}.bias": (out,)}
    shapes |= {"visual.merger.ln_q.weight": (1280,), "visual.merger.ln_q.bias": (1280,)}
    shapes |= {"visual.merger.mlp.0.weight": (5120, 5120), "visual.merger.mlp.0.bias": (5120,)}
    shapes |= {"visual.merger.mlp.2.weight": (dim, 5120), "visual.merger.mlp.2.bias": (dim,)}
    shapes |= language_model("model.", "lm_head.weight", config, config["vocab_size"])
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        shapes |= {f"{at}.q_proj.bias": (dim,), f"{at}.k_proj.bias": (kv,), f"{at}.v_proj.bias": (kv,)}
    if config["tie_word_embeddings"]:
        del shapes["lm_head.weight"]
    return shapes


TENSORS: dict[str, tuple[str, Shapes]] = {
    "llava-7b-v0": ("original", original(VICUNA_7B, 32004, side=16, layers=1, newline=False)),
    "llava-13b-v0": ("original", original(VICUNA_13B, 32004, side=16, layers=1, newline=False)),
    "llava-7b-v1.1": ("original", original(VICUNA_7B, 32003, side=16, layers=1, newline=False)),
    "llava-13b-v1.1": ("original", original(VICUNA_13B, 32003, side=16, layers=1, newline=False)),
    "llava-13b-v1.3-336": ("original", original(VICUNA_13B, 32000, side=24, layers=1, newline=False)),
    "llava-llama-2-7b": ("original", original(VICUNA_7B, 32000, side=16, layers=1, newline=False)),
    "llava-llama-2-13b": ("original", original(VICUNA_13B, 32000, side=16, layers=1, newline=False)),
    "llava-1.5-7b": ("original", original(VICUNA_7B, 32000, side=24, layers=2, newline=False)),
    "llava-1.5-13b": ("original", original(VICUNA_13B, 32000, side=24, layers=2, newline=False)),
    "llava-1.5-13b-hd": ("original", original(VICUNA_13B, 32000, side=16, layers=2, newline=True)),
    "llava-next-vicuna-7b": ("original", original(VICUNA_7B, 32000, side=24, layers=2, newline=True)),
    "llava-next-vicuna-13b": ("original", original(VICUNA_13B, 32000, side=24, layers=2, newline=True)),
    "llava-next-mistral-7b": ("original", original(MISTRAL, 32000, side=24, layers=2, newline=True)),
    "llava-next-34b": ("original", original(YI, 64000, side=24, layers=2, newline=True)),
    "llava-1.5-7b-hf": ("hf", converted(VICUNA_7B, 32064, newline=False)),
    "llava-1.5-13b-hf": ("hf", converted(VICUNA_13B, 32064, newline=False)),
    "llava-next-vicuna-7b-hf": ("hf", converted(VICUNA_7B, 32064, newline=True)),
    "llava-next-vicuna-13b-hf": ("hf", converted(VICUNA_13B, 32064, newline=True)),
    "llava-next-mistral-7b-hf": ("hf", converted(MISTRAL, 32064, newline=True)),
    "llava-next-34b-hf": ("hf", converted(YI, 64064, newline=True)),
} | {
    f"qwen2-vl-{size}{suffix}": ("hf", qwen2_vl(sizes))
    for size, sizes in QWEN2_VL_SIZES.items()
    for suffix in ("", "-instruct")
}
TENSORS |= published_internvl.TENSORS | published_blip2.TENSORS | published_qwen_vl.TENSORS
"""Preset -> layout of its repository, and every tensor in it."""
