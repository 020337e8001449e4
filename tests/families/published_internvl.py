"""What the InternVL-1.5 repositories say about themselves: config files, and the names and shapes of their tensors."""

from typing import Any

from opsin.families._parts import PHI3_MINI_128K
from opsin.spec.decoder import LongScaling

Shapes = dict[str, tuple[int, ...]]

INTERNVIT_300M: dict[str, Any] = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "image_size": 448,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-6,
    "model_type": "intern_vit_6b",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_channels": 3,
    "num_hidden_layers": 24,
    "output_attentions": False,
    "patch_size": 14,
    "qk_normalization": False,
    "qkv_bias": True,
    "use_bfloat16": True,
    "use_flash_attn": True,
}
INTERNVIT_6B = INTERNVIT_300M | {
    "hidden_size": 3200,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "num_attention_heads": 25,
    "num_hidden_layers": 45,
    "qk_normalization": True,
    "qkv_bias": False,
}
INTERNLM2_20B: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "flash_attention_2",
    "bad_words_ids": None,
    "bias": False,
    "bos_token_id": 1,
    "do_sample": False,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "num_attention_heads": 48,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"factor": 3.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "top_k": 50,
    "use_bfloat16": True,
    "use_cache": True,
    "vocab_size": 92553,
}
INTERNLM2_1_8B = INTERNLM2_20B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
}


def phi3() -> dict[str, Any]:
    """Phi-3-mini-128k. Its two lists of 48 factors are not repeated here: one number of each pins them."""
    scaling = PHI3_MINI_128K.rope and PHI3_MINI_128K.rope.scaling
    assert isinstance(scaling, LongScaling)
    assert (scaling.short[5], scaling.short[-1]) == (1.1500000000000001, 2.9499999999999975)
    assert (scaling.long[0], scaling.long[-1]) == (1.0299999713897705, 64.81001281738281)
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_dropout": 0.0,
        "attn_implementation": "flash_attention_2",
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {"type": "su", "short_factor": list(scaling.short), "long_factor": list(scaling.long)},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "vocab_size": 32020,
    }


def chat_config(llm: dict[str, Any], vision: dict[str, Any], template: str) -> dict[str, Any]:
    """A chat repository's config.json."""
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": llm,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": template,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "internvl-1.5-26b": chat_config(INTERNLM2_20B, INTERNVIT_6B, "internlm2-chat"),
    "internvl-1.5-2b": chat_config(INTERNLM2_1_8B, INTERNVIT_300M, "internlm2-chat"),
    "internvl-1.5-4b": chat_config(phi3(), INTERNVIT_300M, "phi3-chat"),
}
"""Preset -> config.json of its repository."""


def tower(config: dict[str, Any]) -> Shapes:
    """An InternViT."""
    dim, mlp = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {
        "embeddings.class_embedding": (1, 1, dim),
        "embeddings.patch_embedding.weight": (dim, 3, 14, 14),
        "embeddings.patch_embedding.bias": (dim,),
        "embeddings.position_embedding": (1, 1025, dim),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layers.{layer}"
        shapes |= {f"{at}.attn.qkv.weight": (3 * dim, dim), f"{at}.attn.proj.weight": (dim, dim)}
        shapes |= {f"{at}.attn.proj.bias": (dim,), f"{at}.ls1": (dim,), f"{at}.ls2": (dim,)}
        shapes |= {f"{at}.norm1.weight": (dim,), f"{at}.norm2.weight": (dim,)}
        shapes |= {f"{at}.mlp.fc1.weight": (mlp, dim), f"{at}.mlp.fc1.bias": (mlp,)}
        shapes |= {f"{at}.mlp.fc2.weight": (dim, mlp), f"{at}.mlp.fc2.bias": (dim,)}
        if config["qkv_bias"]:
            shapes[f"{at}.attn.qkv.bias"] = (3 * dim,)
        if config["norm_type"] == "layer_norm":
            shapes |= {f"{at}.norm1.bias": (dim,), f"{at}.norm2.bias": (dim,)}
        if config["qk_normalization"]:
            shapes |= {f"{at}.attn.q_norm.weight": (dim,), f"{at}.attn.k_norm.weight": (dim,)}
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def mlp1(vision: dict[str, Any], llm: dict[str, Any]) -> Shapes:
    """The connector."""
    joined, dim = 4 * vision["hidden_size"], llm["hidden_size"]
    return {
        "mlp1.0.weight": (joined,),
        "mlp1.0.bias": (joined,),
        "mlp1.1.weight": (dim, joined),
        "mlp1.1.bias": (dim,),
        "mlp1.3.weight": (dim, dim),
        "mlp1.3.bias": (dim,),
    }


def internlm2(config: dict[str, Any]) -> Shapes:
    """Heads of 128: for each key head its query heads, itself and its value head."""
    dim, mlp, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    wqkv = 128 * (config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    shapes: Shapes = {"model.tok_embeddings.weight": (rows, dim), "model.norm.weight": (dim,)}
    shapes["output.weight"] = (rows, dim)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.attention_norm.weight": (dim,), f"{at}.ffn_norm.weight": (dim,)}
        shapes |= {f"{at}.attention.wqkv.weight": (wqkv, dim), f"{at}.attention.wo.weight": (dim, dim)}
        shapes |= {f"{at}.feed_forward.w1.weight": (mlp, dim), f"{at}.feed_forward.w3.weight": (mlp, dim)}
        shapes[f"{at}.feed_forward.w2.weight"] = (dim, mlp)
    return {f"language_model.{name}": shape for name, shape in shapes.items()}


def phi3_mini() -> Shapes:
    """Phi-3-mini, its table cut to 32020 rows."""
    shapes: Shapes = {"model.embed_tokens.weight": (32020, 3072), "model.norm.weight": (3072,)}
    shapes["lm_head.weight"] = (32020, 3072)
    for layer in range(32):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (3072,), f"{at}.post_attention_layernorm.weight": (3072,)}
        shapes |= {f"{at}.self_attn.qkv_proj.weight": (9216, 3072), f"{at}.self_attn.o_proj.weight": (3072, 3072)}
        shapes |= {f"{at}.mlp.gate_up_proj.weight": (16384, 3072), f"{at}.mlp.down_proj.weight": (3072, 8192)}
    return {f"language_model.{name}": shape for name, shape in shapes.items()}


TENSORS: dict[str, tuple[str, Shapes]] = {
    "internvl-1.5-26b": (
        "original",
        tower(INTERNVIT_6B) | mlp1(INTERNVIT_6B, INTERNLM2_20B) | internlm2(INTERNLM2_20B),
    ),
    "internvl-1.5-2b": (
        "original",
        tower(INTERNVIT_300M) | mlp1(INTERNVIT_300M, INTERNLM2_1_8B) | internlm2(INTERNLM2_1_8B),
    ),
    "internvl-1.5-4b": ("original", tower(INTERNVIT_300M) | mlp1(INTERNVIT_300M, phi3()) | phi3_mini()),
}
"""Preset -> layout of its repository, and every tensor in it."""
