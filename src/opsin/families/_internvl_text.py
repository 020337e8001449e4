"""Language models in published config files: InternLM2, Phi-3, Llama and Qwen2, read and written."""

import re
from typing import Any

from opsin.errors import ConfigError
from opsin.families._family import HubConfig
from opsin.families._hub import LLAMA
from opsin.families._internvl_layouts import Names
from opsin.families._keys import refuse_unread
from opsin.spec.decoder import DecoderConfig

DEFAULTS: dict[str, dict[str, Any]] = {
    "internlm2": {
        "vocab_size": 103_168,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "bias": True,
    },
    "phi3": {
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
    },
    "llama": LLAMA,
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 22_016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    },
}
"""InternLM2Config of its authors, and Phi3Config, LlamaConfig and Qwen2Config of transformers."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "quantization_config": (None,),
    "use_sliding_window": (None, False),
}
"""Keys that are served at these values only."""

READ = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "sliding_window", "use_cache", "use_bfloat16"}
    | {"attention_dropout", "attn_implementation", "max_window_layers", "use_flash_attn"}
)

SUSPICIOUS = re.compile(
    r"(attention_|attn_|dynamic_|force_|image_|partial_|projector_|ps_|qk_|quantization|rope_|select_|sliding_|use_|vision_)"
)
"""What a key that changes the numbers would begin with."""

ROPE_COMMON = ("type", "rope_type", "rope_theta")
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": ("factor",),
    "su": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary positions, and what each reads."""


def text_kind(text: HubConfig) -> str:
    """InternVL's own config goes by the architecture, transformers' by the model type."""
    named = (text.get("architectures") or [""])[0]
    return str(named).removesuffix("ForCausalLM").lower() if named else str(text.get("model_type", "llama"))


def read_decoder(text: HubConfig, *, tied: bool, where: str) -> DecoderConfig:
    """A language model, in a file of its own or within a chat model's."""
    kind = text_kind(text)
    if kind not in DEFAULTS:
        raise ConfigError(f"{where}: a language model of type {kind!r} is not served. Known: {', '.join(DEFAULTS)}")
    refuse_unread(text, neutral=NEUTRAL, read=READ, suspicious=SUSPICIOUS, where=where)
    get = {**DEFAULTS[kind], **text}.get
    positions, window = get("max_position_embeddings"), get("sliding_window")
    if kind == "phi3" and window is not None and window < positions:
        raise ConfigError(
            f"{where}: sliding_window {window} is shorter than max_position_embeddings {positions}, and attention here "
            "sees every earlier token. Set one of them to the other"
        )
    biases = {
        "internlm2": "all" if get("bias") else "none",
        "llama": "all" if get("attention_bias") else "none",
        "qwen2": "qkv",
        "phi3": "none",
    }
    heads, kv_heads, dim, head_dim = (
        get(key) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    )
    return DecoderConfig.parse(
        {
            "vocab_size": get("vocab_size"),
            "dim": dim,
            "num_layers": get("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": heads if kv_heads is None else kv_heads,
            "mlp_dim": get("intermediate_size"),
            "head_dim": None if head_dim is None or head_dim * heads == dim else head_dim,
            "norm_eps": get("rms_norm_eps"),
            "attention_bias": biases[kind],
            "head": "tied" if tied else "own",
            "rope": _rope({**DEFAULTS[kind], **text}, where),
            "max_positions": positions,
        },
        where=where,
    )


def _rope(text: HubConfig, where: str) -> dict[str, Any]:
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind, longest = given.get("rope_type", given.get("type", "default")), text["max_position_embeddings"]
    if kind not in ROPE_KEYS:
        raise ConfigError(f"{where}: rotary positions of type {kind!r} are not served. Known: {', '.join(ROPE_KEYS)}")
    known = {*ROPE_KEYS[kind], *ROPE_COMMON}
    unread = [key for key, value in given.items() if key not in known and value not in (None, 1)]
    if unread:
        raise ConfigError(f"{where}: {unread[0]!r} of rotary positions of type {kind!r} is not served")
    scaling: dict[str, Any] | None = None
    if kind == "dynamic":
        scaling = {"kind": "dynamic", "factor": given["factor"], "trained": longest}
    elif kind != "default":
        trained = given.get("original_max_position_embeddings", text.get("original_max_position_embeddings"))
        short, long = given["short_factor"], given["long_factor"]
        scaling = {"kind": "long", "short": short, "long": long, "trained": trained, "extended": longest}
    return {"theta": given.get("rope_theta", text["rope_theta"]), "scaling": scaling}


def write_decoder(decoder: DecoderConfig, names: Names) -> dict[str, Any]:
    """The keys of a language model. Raises ConfigError where they cannot describe it."""
    rope = decoder.rope
    if (decoder.norm, decoder.mlp) != ("rms", "swiglu") or rope is None or rope.sections or rope.log_n:
        raise ConfigError(
            "InternVL's language models have RMSNorm, SwiGLU and rotary positions on one axis; this one differs"
        )
    hub: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": decoder.dim,
        "intermediate_size": decoder.mlp_dim,
        "max_position_embeddings": decoder.max_positions,
        "num_attention_heads": decoder.num_heads,
        "num_hidden_layers": decoder.num_layers,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "tie_word_embeddings": decoder.head == "tied",
        "vocab_size": decoder.vocab_size,
    }
    if decoder.head_width * decoder.num_heads != decoder.dim:
        if names != "llama":
            raise ConfigError(f"heads of {decoder.head_width} do not make up the width {decoder.dim} as {names}'s do")
        hub["head_dim"] = decoder.head_width
    match names:
        case "internlm2":
            hub |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
            hub["bias"] = decoder.attention_bias == "all"
        case "phi3":
            hub |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": None}
        case "llama" if decoder.attention_bias == "qkv":
            hub |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
        case "llama":
            hub |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
            hub["attention_bias"] = decoder.attention_bias == "all"
    if rope.scaling is not None:
        hub |= _scaling(decoder, names)
    return hub


def _scaling(decoder: DecoderConfig, names: Names) -> dict[str, Any]:
    assert decoder.rope is not None
    scaling = decoder.rope.scaling
    if scaling is not None and scaling.kind == "dynamic" and names in ("internlm2", "llama"):
        if scaling.trained == decoder.max_positions:
            return {"rope_scaling": {"type": "dynamic", "factor": scaling.factor}}
        raise ConfigError(
            f"rotary positions change at {scaling.trained} tokens, and the model is described for "
            f"{decoder.max_positions}: published files have one number for both"
        )
    if scaling is not None and scaling.kind == "long" and names == "phi3" and scaling.extended == decoder.max_positions:
        factors = {"short_factor": list(scaling.short), "long_factor": list(scaling.long)}
        return {"rope_scaling": {"type": "su", **factors}, "original_max_position_embeddings": scaling.trained}
    raise ConfigError(f"published files of {names} have no words for rotary positions of kind {scaling}")
