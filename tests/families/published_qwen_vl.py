"""What the repositories of Qwen-VL hold: config.json, and every tensor with its shape."""

from typing import Any

Shapes = dict[str, tuple[int, ...]]

CONFIG: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"],
    "attn_dropout_prob": 0.0,
    "bf16": True,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 8192,
    "model_type": "qwen",
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 2048,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
    "visual": {
        "heads": 16,
        "image_size": 448,
        "image_start_id": 151857,
        "layers": 48,
        "mlp_ratio": 4.9231,
        "output_dim": 4096,
        "patch_size": 14,
        "width": 1664,
    },
    "vocab_size": 151936,
}


def _visual() -> Shapes:
    at = "transformer.visual."
    shapes: Shapes = {
        f"{at}conv1.weight": (1664, 3, 14, 14),
        f"{at}positional_embedding": (256, 1664),
        f"{at}proj": (4096, 4096),
        f"{at}attn_pool.pos_embed": (256, 4096),
        f"{at}attn_pool.query": (256, 4096),
        f"{at}attn_pool.kv_proj.weight": (4096, 1664),
        f"{at}attn_pool.attn.in_proj_weight": (12288, 4096),
        f"{at}attn_pool.attn.in_proj_bias": (12288,),
        f"{at}attn_pool.attn.out_proj.weight": (4096, 4096),
        f"{at}attn_pool.attn.out_proj.bias": (4096,),
    }
    norms = {"ln_pre": 1664, "ln_post": 4096, "attn_pool.ln_q": 4096, "attn_pool.ln_kv": 4096}
    for layer in range(48):
        block = f"transformer.resblocks.{layer}."
        norms |= {f"{block}ln_1": 1664, f"{block}ln_2": 1664}
        for name, out, inner in (
            ("attn.in_proj", 4992, 1664),
            ("attn.out_proj", 1664, 1664),
            ("mlp.c_fc", 8192, 1664),
            ("mlp.c_proj", 1664, 8192),
        ):
            shapes |= {f"{at}{block}{name}.weight": (out, inner), f"{at}{block}{name}.bias": (out,)}
    for name, dim in norms.items():
        shapes |= {f"{at}{name}.weight": (dim,), f"{at}{name}.bias": (dim,)}
    assert len(shapes) == 594
    return shapes


def _language() -> Shapes:
    shapes: Shapes = {
        "transformer.wte.weight": (151936, 4096),
        "transformer.ln_f.weight": (4096,),
        "lm_head.weight": (151936, 4096),
    }
    for layer in range(32):
        at = f"transformer.h.{layer}."
        shapes |= {
            f"{at}ln_1.weight": (4096,),
            f"{at}attn.c_attn.weight": (12288, 4096),
            f"{at}attn.c_attn.bias": (12288,),
            f"{at}attn.c_proj.weight": (4096, 4096),
            f"{at}ln_2.weight": (4096,),
            f"{at}mlp.w1.weight": (11008, 4096),
            f"{at}mlp.w2.weight": (11008, 4096),
            f"{at}mlp.c_proj.weight": (4096, 11008),
        }
    return shapes


CONFIGS = {"qwen-vl-chat": CONFIG}  # a base model's file is the same: only its name tells them apart
TENSORS = {name: ("original", _visual() | _language()) for name in ("qwen-vl", "qwen-vl-chat")}
