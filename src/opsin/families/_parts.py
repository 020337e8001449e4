"""Parts that families are put together from: published towers and language models."""

from opsin.spec.decoder import DecoderConfig, DynamicScaling, LongScaling, PowerScaling, RopeConfig
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

QWEN_VL_TOWER = VisionConfig(
    image_size=224, patch_size=14, dim=1664, num_layers=48, num_heads=16, mlp_dim=8192, activation="gelu",
    norm_eps=1e-6, out_layers=(-1,), class_token="none", positions="learned_bicubic", last_norm=False,
)  # fmt: skip
"""OpenCLIP's ViT-bigG/14 without its head (Qwen/Qwen-VL, config.json); its table of positions is that of 224 px at any
size of picture."""

QWEN_7B = DecoderConfig(
    vocab_size=151_936, dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_dim=11_008, norm_eps=1e-6,
    attention_bias="qkv", rope=RopeConfig(scaling=PowerScaling(trained=2048), log_n=2048), max_positions=8192,
)  # fmt: skip
"""Qwen 7B (Qwen/Qwen-VL, config.json); intermediate_size there counts gate and up together."""

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

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Pixel statistics of ImageNet, which InternVL keeps."""

INTERNVIT_300M = VisionConfig(
    image_size=448, patch_size=14, dim=1024, num_layers=24, num_heads=16, mlp_dim=4096, activation="gelu",
    norm_eps=1e-6, out_layers=(-1,), positions="learned_bicubic", first_norm=False, last_norm=False, patch_bias=True,
    layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD,
)  # fmt: skip
"""OpenGVLab/InternViT-300M-448px, config.json: the small sister, distilled."""

INTERNVIT_6B = INTERNVIT_300M.replace(
    dim=3200, num_layers=45, num_heads=25, mlp_dim=12800, norm="rms", qkv_bias="none", qk_norm=True
)
"""OpenGVLab/InternViT-6B-448px-V1-5, config.json: the last three of the 48 blocks it was trained with are left out."""

INTERNLM2_20B = DecoderConfig(
    vocab_size=92_553, dim=6144, num_layers=48, num_heads=48, num_kv_heads=8, mlp_dim=16_384, norm_eps=1e-5,
    rope=RopeConfig(theta=1e6, scaling=DynamicScaling(factor=3.0, trained=32_768)), max_positions=32_768,
)  # fmt: skip
"""internlm/internlm2-chat-20b, config.json, with InternVL's nine tokens (92544 to 92552)."""

INTERNLM2_1_8B = INTERNLM2_20B.replace(
    dim=2048, num_layers=24, num_heads=16, mlp_dim=8192,
    rope=RopeConfig(theta=1e6, scaling=DynamicScaling(factor=2.0, trained=32_768)),
)  # fmt: skip
"""internlm/internlm2-chat-1_8b, config.json, with the same tokens."""

PHI3_MINI_128K = DecoderConfig(
    vocab_size=32_020, dim=3072, num_layers=32, num_heads=32, num_kv_heads=32, mlp_dim=8192, norm_eps=1e-5,
    rope=RopeConfig(
        theta=1e4,
        scaling=LongScaling(
            trained=4096,
            extended=131_072,
            short=(
                1.05, 1.05, 1.05, 1.1, 1.1, 1.1500000000000001, 1.2000000000000002, 1.2500000000000002,
                1.3000000000000003, 1.3500000000000003, 1.5000000000000004, *[2.000000000000001] * 21,
                *[2.0500000000000007] * 3, *[2.1000000000000005] * 3, *[2.1500000000000004] * 2, 2.3499999999999996,
                2.549999999999999, *[2.5999999999999988] * 2, 2.7499999999999982, *[2.849999999999998] * 2,
                2.9499999999999975,
            ),
            long=(
                1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0799999237060547, 1.2299998998641968,
                1.2299998998641968, 1.2999999523162842, 1.4499999284744263, 1.5999999046325684, 1.6499998569488525,
                1.8999998569488525, 2.859999895095825, 3.68999981880188, 5.419999599456787, 5.489999771118164,
                5.489999771118164, 9.09000015258789, 11.579999923706055, 15.65999984741211, 15.769999504089355,
                15.789999961853027, 18.360000610351562, 21.989999771118164, 23.079999923706055, 30.009998321533203,
                32.35000228881836, 32.590003967285156, 35.56000518798828, 39.95000457763672, 53.840003967285156,
                56.20000457763672, 57.95000457763672, 59.29000473022461, 59.77000427246094, 59.920005798339844,
                61.190006256103516, 61.96000671386719, 62.50000762939453, 63.3700065612793, 63.48000717163086,
                63.48000717163086, 63.66000747680664, 63.850006103515625, 64.08000946044922, 64.760009765625,
                64.80001068115234, 64.81001281738281, 64.81001281738281,
            ),
        ),
    ),
    max_positions=131_072,
)  # fmt: skip
"""microsoft/Phi-3-mini-128k-instruct, config.json of April 2024 (`su`), its table cut to the tokenizer's 32011 ids and
InternVL's nine. The factors of later revisions differ."""

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
