"""Five models that nobody published: towers, connectors, resolutions and language models of different families.

Each must keep the promises that the families keep (families/test_contract.py), and be saved, loaded and talked to
(test_mixes.py).
"""

from opsin import families
from opsin.spec.connector import LinearConnector, MLPConnector, Resampler
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import Squash

_LLAVA_NEXT, _INTERNVL, _QWEN2, _BLIP2 = (
    families.preset(f"{name}-tiny").config for name in ("llava-next", "internvl-1.5", "qwen2-vl", "blip2")
)

MIXES: dict[str, VLMConfig] = {
    "mix-native-qformer-internlm2": VLMConfig(
        vision=_QWEN2.vision.replace(patch_block=1),
        connector=_BLIP2.connector,
        decoder=_INTERNVL.decoder,
        resolution=_QWEN2.resolution,
        chat=_INTERNVL.chat,
    ),
    "mix-anyres-resampler-qwen2": VLMConfig(
        vision=_LLAVA_NEXT.vision,
        connector=Resampler(side=3, num_heads=4),
        decoder=_QWEN2.decoder,
        resolution=_LLAVA_NEXT.resolution.replace(merge="flat"),
        chat=_QWEN2.chat,
    ),
    "mix-tiles-linear-opt": VLMConfig(
        vision=_INTERNVL.vision,
        connector=LinearConnector(),
        decoder=_BLIP2.decoder,
        resolution=_INTERNVL.resolution,
        chat=_BLIP2.chat,
    ),
    "mix-native-mlp-llama": VLMConfig(
        vision=_QWEN2.vision.replace(patch_block=1),
        connector=MLPConnector(num_layers=3),
        decoder=_LLAVA_NEXT.decoder,
        resolution=_QWEN2.resolution,
        chat=_QWEN2.chat,
    ),
    "mix-eva-resampler-llama": VLMConfig(
        vision=_BLIP2.vision.replace(class_token="drop"),
        connector=Resampler(side=2, num_heads=4),
        decoder=_LLAVA_NEXT.decoder,
        resolution=Squash(tile_size=_BLIP2.vision.image_size),
        chat=_LLAVA_NEXT.chat,
    ),
}
