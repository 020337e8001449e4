"""Parts that families are put together from: published towers and language models."""

from opsin.spec.decoder import DecoderConfig, RopeConfig
from opsin.spec.vision import VisionConfig

CLIP_L_224 = VisionConfig(image_size=224, patch_size=14, dim=1024, num_layers=24, num_heads=16, mlp_dim=4096)
"""openai/clip-vit-large-patch14, config.json; LLaVA reads hidden state -2 without the class token."""

CLIP_L_336 = CLIP_L_224.replace(image_size=336)
"""openai/clip-vit-large-patch14-336, config.json."""

_TOWERS = {"clip-vit-large-patch14": CLIP_L_224, "clip-vit-large-patch14-336": CLIP_L_336}

VICUNA_7B_V1 = DecoderConfig(
    vocab_size=32000, dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_dim=11008, norm_eps=1e-6,
    max_positions=2048,
)  # fmt: skip
"""LLaMA 7B (arXiv:2302.13971, table 2), as Vicuna v0, v1.1 and v1.3 keep it."""

VICUNA_13B_V1 = VICUNA_7B_V1.replace(dim=5120, num_layers=40, num_heads=40, num_kv_heads=40, mlp_dim=13824)
"""LLaMA 13B (arXiv:2302.13971, table 2)."""

LLAMA2_7B = VICUNA_7B_V1.replace(norm_eps=1e-5, max_positions=4096)
"""Llama 2 7B (arXiv:2307.09288, table 1) and with it Vicuna 7B v1.5."""

LLAMA2_13B = VICUNA_13B_V1.replace(norm_eps=1e-5, max_positions=4096)
"""Llama 2 13B (arXiv:2307.09288, table 1) and with it Vicuna 13B v1.5."""

MISTRAL_7B = LLAMA2_7B.replace(num_kv_heads=8, mlp_dim=14336, rope=RopeConfig(theta=1e6), max_positions=32768)
"""mistralai/Mistral-7B-Instruct-v0.2, config.json: no sliding window, unlike v0.1."""

YI_34B = DecoderConfig(
    vocab_size=64000, dim=7168, num_layers=60, num_heads=56, num_kv_heads=8, mlp_dim=20480, norm_eps=1e-5,
    rope=RopeConfig(theta=5e6), max_positions=4096,
)  # fmt: skip
"""NousResearch/Nous-Hermes-2-Yi-34B, config.json."""

QWEN2_VL_TOWER = VisionConfig(
    image_size=14, patch_size=14, dim=1280, num_layers=32, num_heads=16, mlp_dim=5120, norm_eps=1e-6, out_layers=(-1,),
    class_token="none", positions="rotary", first_norm=False, last_norm=False, frames=2, patch_block=2,
)  # fmt: skip
"""The same in all sizes of Qwen2-VL (arXiv:2409.12191, table 1): DFN's ViT, its position table replaced by rotation."""

QWEN2_VL_2B = DecoderConfig(
    vocab_size=151_936, dim=1536, num_layers=28, num_heads=12, num_kv_heads=2, mlp_dim=8960, norm_eps=1e-6,
    attention_bias="qkv", head="tied", rope=RopeConfig(theta=1e6, sections=(16, 24, 24)), max_positions=32_768,
)  # fmt: skip
"""Qwen2 1.5B with positions on three axes: Qwen/Qwen2-VL-2B, config.json."""

QWEN2_VL_7B = QWEN2_VL_2B.replace(
    vocab_size=152_064, dim=3584, num_heads=28, num_kv_heads=4, mlp_dim=18_944, head="own"
)
"""Qwen/Qwen2-VL-7B, config.json."""

QWEN2_VL_72B = QWEN2_VL_7B.replace(dim=8192, num_layers=80, num_heads=64, num_kv_heads=8, mlp_dim=29_568)
"""Qwen/Qwen2-VL-72B, config.json."""

HF_EXTRA_ROWS = 64
"""Rows that the llava-hf conversion adds to the embedding and the head: `<image>`, `<pad>`, and up to the next 64."""


def clip_tower(name: str) -> VisionConfig | None:
    """The published CLIP tower of that repository name, or None."""
    return _TOWERS.get(name)


def tower_name(vision: VisionConfig) -> str | None:
    """The published repository of that tower, whichever of its layers and tokens are read, or None."""
    for name, published in _TOWERS.items():
        if vision == published.replace(out_layers=vision.out_layers, class_token=vision.class_token):
            return f"openai/{name}"
    return None
