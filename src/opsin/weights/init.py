"""Random weights, all in one place. Bits follow from the config and the seed alone.

part                         distribution                      source
matrices of tower, decoder   normal, std 0.02                  transformers' initializer_range (CLIP, Llama)
embedding, head, positions   normal, std 0.02                  likewise
class token, newline         normal, std 1 / sqrt(dim)         CLIP's class_embedding; llava_arch.py image_newline
connector, weight and bias   uniform, +- 1 / sqrt(inputs)      nn.Linear's own, which the authors train from
  but its Q-Former           normal, std 0.02                  BERT, from which the authors start it
  but a resampler's places   2-D sines, columns first          Qwen-VL visual.py, get_2d_sincos_pos_embed
temperature                  0.07                              LAVIS blip2_qformer.py
other biases                 0
norms                        weight 1, bias 0
layer scales                 0.1                               InternViT-6B's initializer_factor
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from opsin.nn.blocks import LayerScale
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig

STD, SCALE, TEMPERATURE = 0.02, 0.1, 0.07


def build(
    config: VLMConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> VLM:
    """A model with random weights. Numbers are drawn in float32 on the CPU, so that every device gets the same."""
    vlm = on_meta(config).to(dtype).to_empty(device=device)
    initialise(vlm, seed=seed)
    return vlm


def on_meta(config: VLMConfig) -> VLM:
    """The model without storage: names and shapes only, at any size in a moment."""
    with torch.device("meta"):
        return VLM(config)


@torch.no_grad()
def initialise(vlm: nn.Module, *, seed: int, part: str = "") -> None:
    """Draw the parameters whose names begin with `part` anew.

    Each tensor has its own stream, made of the seed and its name: its bits do not depend on which others are drawn.
    """
    for place, module in vlm.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{place}.{own}" if place else own
            if name.startswith(part):
                digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                parameter.copy_(_draw(name, module, parameter.shape, generator))


def _draw(name: str, module: nn.Module, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    if isinstance(module, LayerScale):
        return torch.full(shape, SCALE)
    if name == "connector.positions":
        return _sines(shape)
    if name == "temperature":
        return torch.full(shape, TEMPERATURE)
    if isinstance(module, nn.Linear) and name.startswith("connector.") and not name.startswith("connector.qformer."):
        bound = 1 / math.sqrt(module.in_features)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if name.endswith("bias"):
        return torch.zeros(shape)
    # A row of its own, as wide as the model: the class token, the newline.
    std = 1 / math.sqrt(shape[0]) if len(shape) == 1 else STD
    return torch.empty(shape).normal_(std=std, generator=generator)


def _sines(shape: torch.Size) -> Tensor:
    """(side * side, D) of row-major places: D / 2 numbers of the column, then of the row, each D / 4 sines and cosines
    with frequencies 10000 ** (-4k / D)."""
    side, dim = math.isqrt(shape[0]), shape[1]
    angles = torch.arange(side)[:, None] * 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    columns, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1)
