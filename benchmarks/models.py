"""Random models of LLaVA's shape, written once where both libraries read them."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from workload import PICTURE_SIZE

from opsin import families, weights
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import AnyRes, CenterCrop, Pad
from opsin.spec.vision import VisionConfig

SIZES: dict[str, tuple[VisionConfig, DecoderConfig]] = {
    # For the test of the benchmark: says nothing about speed.
    "tiny": (
        VisionConfig(image_size=56, patch_size=14, dim=32, num_layers=3, num_heads=4, mlp_dim=64),
        DecoderConfig(vocab_size=384, dim=64, num_layers=2, num_heads=4, num_kv_heads=4, mlp_dim=128),
    ),
    "small": (
        VisionConfig(image_size=336, patch_size=14, dim=384, num_layers=6, num_heads=6, mlp_dim=1536),
        DecoderConfig(vocab_size=32064, dim=512, num_layers=8, num_heads=8, num_kv_heads=8, mlp_dim=1408),
    ),
    "medium": (
        VisionConfig(image_size=336, patch_size=14, dim=768, num_layers=12, num_heads=12, mlp_dim=3072),
        DecoderConfig(vocab_size=32064, dim=1024, num_layers=16, num_heads=16, num_kv_heads=16, mlp_dim=2752),
    ),
}
"""Tower and language model, narrower and shallower than LLaVA-1.5-7B's; pictures take 576 slots as there."""

TEXT_TOKENS = 48
"""Of the prompt: 32 before the picture, the rest behind it."""


@dataclass(frozen=True)
class WrittenModel:
    """A model in a folder, and the prompt it is asked."""

    title: str
    folder: Path
    dtype: str
    num_parameters: int
    ids: tuple[int, ...]
    """The picture's slots hold the image token."""


def write(folder: Path, *, family: str, size: str, dtype: str) -> WrittenModel:
    """Draw the weights of a model in LLaVA's -hf layout, stored as `dtype`."""
    vision, decoder = SIZES[size]
    config = _published(family).config.replace(
        vision=vision,
        decoder=decoder,
        resolution=_resolution(family, vision.image_size),
        image_token_id=decoder.vocab_size - 64,
    )
    vlm = weights.build(config, seed=0, dtype=getattr(torch, dtype))
    weights.export(folder, weights.Model(vlm=vlm, config=config, name=size), layout="hf")
    generator = torch.Generator().manual_seed(0)
    text = [1, *torch.randint(3, decoder.vocab_size - 64, (TEXT_TOKENS - 1,), generator=generator).tolist()]
    slots = [decoder.vocab_size - 64] * config.plan(PICTURE_SIZE).num_slots
    return WrittenModel(
        title=f"{families.family(family).title} {size}",
        folder=folder,
        dtype=dtype,
        num_parameters=sum(math.prod(parameter.shape) for parameter in vlm.parameters()),
        ids=(*text[:32], *slots, *text[32:]),
    )


def write_preprocessors(folder: Path) -> dict[str, Path]:
    """The configs of published models, one folder for each way to prepare a picture."""
    published = {
        "LLaVA-1.5, padded": _published("llava15").config.replace(resolution=Pad(tile_size=336)),
        "LLaVA-1.5, cropped": _published("llava15").config,
        "LLaVA-NeXT, five tiles": _published("llava_next").config,
    }
    folders = {}
    for number, (title, config) in enumerate(published.items()):
        folders[title] = folder / f"preprocessor{number}"
        _write_config(folders[title], config)
    return folders


def _published(family: str) -> families.Preset:
    return families.preset("llava-1.5-7b-hf" if family == "llava15" else "llava-next-vicuna-7b-hf")


def _resolution(family: str, side: int) -> CenterCrop | AnyRes:
    """The published rule, scaled to a tower that reads tiles of `side` px."""
    published = _published(family).config.resolution
    if not isinstance(published, AnyRes):
        return CenterCrop(tile_size=side)
    scaled = tuple((w * side // published.tile_size, h * side // published.tile_size) for w, h in published.resolutions)
    return published.replace(tile_size=side, resolutions=scaled)


def _write_config(folder: Path, config: VLMConfig) -> None:
    folder.mkdir(parents=True)
    for name, content in families.family_of(config).write(config, "hf").items():
        (folder / name).write_text(json.dumps(content))
