"""What the BLIP-2 repositories and LAVIS say about the models: config files, and names and shapes of their tensors."""

from typing import Any

Shapes = dict[str, tuple[int, ...]]

HF: dict[str, Any] = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "image_text_hidden_size": 256,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "model_type": "blip-2",
    "num_query_tokens": 32,
    "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer"},
    "torch_dtype": "float32",
    "vision_config": {
        "dropout": 0.0,
        "initializer_factor": 1.0,
        "model_type": "blip_2_vision_model",
        "num_channels": 3,
        "projection_dim": 512,
    },
}
OPT: dict[str, Any] = {
    "_name_or_path": "facebook/opt-2.7b",
    "activation_dropout": 0.0,
    "architectures": ["OPTForCausalLM"],
    "eos_token_id": 50118,
    "ffn_dim": 10240,
    "hidden_size": 2560,
    "model_type": "opt",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "prefix": "</s>",
    "vocab_size": 50304,
    "word_embed_proj_dim": 2560,
}
OPT_6_7B = OPT | {"ffn_dim": 16384, "hidden_size": 4096, "word_embed_proj_dim": 4096}
FLAN_T5: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "bos_token_id": 1,
    "d_ff": 5120,
    "d_kv": 64,
    "d_model": 2048,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu",
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "model_type": "t5",
    "n_positions": 512,
    "num_decoder_layers": 24,
    "num_heads": 32,
    "num_layers": 24,
    "output_past": True,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
FLAN_T5_XXL = FLAN_T5 | {"d_ff": 10240, "d_model": 4096, "num_heads": 64}
LAVIS_VIT_L: dict[str, Any] = {
    "arch": "pretrain_flant5xl",
    "load_finetuned": False,
    "vit_model": "clip_L",
    "image_size": 224,
    "drop_path_rate": 0,
    "use_grad_checkpoint": False,
    "vit_precision": "fp16",
    "freeze_vit": True,
    "num_query_token": 32,
    "t5_model": "google/flan-t5-xl",
    "prompt": "",
}
"""The `model:` section of configs/models/blip2/blip2_pretrain_flant5xl_vitL.yaml."""

CONFIGS: dict[str, dict[str, Any]] = {
    "blip2-opt-2.7b": HF | {"image_token_index": 50265, "text_config": OPT, "use_decoder_only_language_model": True},
    "blip2-opt-6.7b": HF | {"image_token_index": 50265, "text_config": OPT_6_7B},
    "blip2-flan-t5-xl": HF | {"image_token_index": 32100, "text_config": FLAN_T5},
    "blip2-flan-t5-xxl": HF | {"image_token_index": 32100, "text_config": FLAN_T5_XXL},
    "blip2-flan-t5-xl-vit-l": LAVIS_VIT_L,
}


def module(name: str, rows: int, columns: int | None = None) -> Shapes:
    """A linear layer, or a norm."""
    return {f"{name}.weight": (rows,) if columns is None else (rows, columns), f"{name}.bias": (rows,)}


def hf_tower(side: int) -> Shapes:
    """EVA ViT-g with side x side patches, and the norm behind it."""
    shapes: Shapes = {
        "embeddings.class_embedding": (1, 1, 1408),
        "embeddings.position_embedding": (1, side * side + 1, 1408),
        "embeddings.patch_embedding.weight": (1408, 3, 14, 14),
        "embeddings.patch_embedding.bias": (1408,),
        **module("post_layernorm", 1408),
    }
    for layer in range(39):
        at = f"encoder.layers.{layer}"
        shapes |= module(f"{at}.layer_norm1", 1408) | module(f"{at}.layer_norm2", 1408)
        shapes |= module(f"{at}.self_attn.qkv", 3 * 1408, 1408) | module(f"{at}.self_attn.projection", 1408, 1408)
        shapes |= module(f"{at}.mlp.fc1", 6144, 1408) | module(f"{at}.mlp.fc2", 1408, 6144)
    return {f"vision_model.{name}": shape for name, shape in shapes.items()}


def lavis_clip() -> Shapes:
    shapes: Shapes = {
        "class_embedding": (1024,),
        "positional_embedding": (257, 1024),
        "conv1.weight": (1024, 3, 14, 14),
        **module("ln_pre", 1024),
    }
    for layer in range(23):
        at = f"transformer.resblocks.{layer}"
        shapes |= {f"{at}.attn.in_proj_weight": (3072, 1024), f"{at}.attn.in_proj_bias": (3072,)}
        shapes |= module(f"{at}.attn.out_proj", 1024, 1024) | module(f"{at}.ln_1", 1024) | module(f"{at}.ln_2", 1024)
        shapes |= module(f"{at}.mlp.c_fc", 4096, 1024) | module(f"{at}.mlp.c_proj", 1024, 4096)
    return {f"visual_encoder.{name}": shape for name, shape in shapes.items()} | module("ln_vision", 1024)


def qformer(prefix: str, inner: str, width: int, norm: str) -> Shapes:
    """The stack without its text side. inner: what the module of queries, keys and values is called."""
    shapes: Shapes = {"query_tokens": (1, 32, 768), **module(norm, 768)}
    for layer in range(12):
        at = f"{prefix}encoder.layer.{layer}"
        kinds = [("attention", 768)] + ([("crossattention", width)] if layer % 2 == 0 else [])
        for kind, memory in kinds:
            shapes |= module(f"{at}.{kind}.{inner}.query", 768, 768)
            shapes |= module(f"{at}.{kind}.{inner}.key", 768, memory) | module(
                f"{at}.{kind}.{inner}.value", 768, memory
            )
            shapes |= module(f"{at}.{kind}.output.dense", 768, 768) | module(f"{at}.{kind}.output.LayerNorm", 768)
        shapes |= module(f"{at}.intermediate_query.dense", 3072, 768) | module(f"{at}.output_query.dense", 768, 3072)
        shapes |= module(f"{at}.output_query.LayerNorm", 768)
    return shapes


def opt(config: dict[str, Any]) -> Shapes:
    dim, mlp = config["hidden_size"], config["ffn_dim"]
    shapes: Shapes = {
        "embed_tokens.weight": (config["vocab_size"], dim),
        "embed_positions.weight": (2050, dim),
        **module("final_layer_norm", dim),
    }
    for layer in range(32):
        at = f"layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= module(f"{at}.self_attn.{name}", dim, dim)
        shapes |= module(f"{at}.self_attn_layer_norm", dim) | module(f"{at}.final_layer_norm", dim)
        shapes |= module(f"{at}.fc1", mlp, dim) | module(f"{at}.fc2", dim, mlp)
    return {f"language_model.model.decoder.{name}": shape for name, shape in shapes.items()}


def t5(prefix: str, config: dict[str, Any]) -> Shapes:
    dim, mlp, inner = config["d_model"], config["d_ff"], config["num_heads"] * config["d_kv"]
    shapes: Shapes = {"shared.weight": (32128, dim), "lm_head.weight": (32128, dim)}
    for stack in ("encoder", "decoder"):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes |= {first: (32, config["num_heads"]), f"{stack}.final_layer_norm.weight": (dim,)}
        steps = ["SelfAttention"] + (["EncDecAttention"] if stack == "decoder" else [])
        for layer in range(24):
            at = f"{stack}.block.{layer}.layer"
            for number, step in enumerate(steps):
                shapes |= {f"{at}.{number}.{step}.{name}.weight": (inner, dim) for name in "qkv"}
                shapes |= {f"{at}.{number}.{step}.o.weight": (dim, inner), f"{at}.{number}.layer_norm.weight": (dim,)}
            last = f"{at}.{len(steps)}"
            shapes |= {f"{last}.DenseReluDense.{name}.weight": (mlp, dim) for name in ("wi_0", "wi_1")}
            shapes |= {f"{last}.DenseReluDense.wo.weight": (dim, mlp), f"{last}.layer_norm.weight": (dim,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def converted(side: int, language: Shapes, dim: int) -> tuple[str, Shapes]:
    stack = qformer("qformer.", "attention", 1408, "qformer.layernorm")
    return "hf", hf_tower(side) | stack | module("language_projection", dim, 768) | language


TENSORS: dict[str, tuple[str, Shapes]] = {
    "blip2-opt-2.7b": converted(16, opt(OPT), 2560),
    "blip2-opt-6.7b": converted(16, opt(OPT_6_7B), 4096),
    "blip2-opt-2.7b-coco": converted(26, opt(OPT), 2560),
    "blip2-opt-6.7b-coco": converted(26, opt(OPT_6_7B), 4096),
    "blip2-flan-t5-xl": converted(16, t5("language_model.", FLAN_T5), 2048),
    "blip2-flan-t5-xl-coco": converted(26, t5("language_model.", FLAN_T5), 2048),
    "blip2-flan-t5-xxl": converted(16, t5("language_model.", FLAN_T5_XXL), 4096),
    "blip2-flan-t5-xl-vit-l": (
        "original",
        lavis_clip()
        | qformer("Qformer.bert.", "self", 1024, "Qformer.bert.embeddings.LayerNorm")
        | module("t5_proj", 2048, 768)
        | t5("t5_model.", FLAN_T5),
    ),
}
"""Preset -> layout, and the tensors of its checkpoint: of LAVIS' those of the tower and language model it goes with."""
