"""Frozen linear layers in few bits, for training adapters beside them (QLoRA, arXiv:2305.14314).

    int8    a byte per weight, one scale per row                                          8 bits a weight
    int4    16 even steps from the smallest to the largest of 64 weights of a row         4.5
    nf4     16 quantiles of a normal distribution, scaled to the largest of 64 weights    4.25

Only what is stored shrinks. Every pass restores a layer's weights in the dtype that it computes in, multiplies, and
lets them go; the backward pass restores them again, so that no restored layer waits in memory for its turn.
"""

from collections.abc import Collection
from functools import cache
from math import gcd
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.nn.lora import WithLoRA, find_targets, replace_layer

Bits = Literal["int8", "int4", "nf4"]

BITS_STORED: dict[Bits, float] = {"int8": 8, "int4": 4.5, "nf4": 4.25}
"""Of each weight, with the scales of its group; a scale per row is not worth counting."""
GROUP = 64
"""Weights that share a scale in 4 bits."""
MIN_GROUP = 16
"""Layers whose rows do not divide into groups of so many stay as they are."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of NormalFloat4 (arXiv:2305.14314, appendix E)."""


class QuantizedLinear(WithLoRA):
    """A frozen linear layer whose weight is codes and scales. It may have an adapter."""

    codes: Tensor
    """int8 (out, in), or uint8 (out, in / 2): the first of two weights in the lower half."""
    scales: Tensor
    """float32 (out, 1), or bfloat16 (out, groups, 1)."""
    lowest: Tensor | None
    """Of int4: the smallest weight of each group."""

    def __init__(self, linear: nn.Linear, bits: Bits) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = linear.in_features, linear.out_features, bits
        self.bias = linear.bias
        weight = linear.weight.detach().float()
        lowest = None
        if bits == "int8":
            scales = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
            codes = (weight / scales).round().clamp(-127, 127).to(torch.int8)
        else:
            groups = weight.unflatten(1, (-1, gcd(GROUP, linear.in_features)))
            codes, scales, lowest = _four_bits(groups, bits)
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("lowest", lowest)
        self.train(linear.training)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), restored."""
        if self.bits == "int8":
            return self.codes.to(dtype) * self.scales.to(dtype)
        pairs = _pairs(self.bits, dtype, self.codes.device)
        grouped = F.embedding(self.codes.int(), pairs).view(*self.scales.shape[:2], -1)
        weight = grouped * self.scales.to(dtype)
        if self.lowest is not None:
            weight = weight + self.lowest.to(dtype)
        return weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Restored.apply(x.to(dtype), self)
        if self.bias is not None:  # outside, as it may train
            y = y + self.bias.to(dtype)
        return y + self.low_rank(x).to(y.dtype) if "lora_A" in self._modules else y


class _Restored(torch.autograd.Function):
    """The product with a restored weight, of which the backward pass keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight_as(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.weight_as(grad.dtype), None


def quantizable(module: nn.Module, bits: Bits, *, keep: Collection[str] = ()) -> list[str]:
    """Names of the linear layers of tower and language model that can be stored so, the patch embedding and head aside.

    keep: tensors that stay, because they train.
    """
    layers = {name: module.get_submodule(name) for name in find_targets(module, ("*",))}
    return [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear) and name.startswith(("vision.", "decoder.")) and f"{name}.weight" not in keep
        if bits == "int8" or gcd(GROUP, layer.in_features) >= MIN_GROUP
    ]


@torch.no_grad()
def quantize(module: nn.Module, bits: Bits, *, keep: Collection[str] = ()) -> int:
    """Replace the layers that are `quantizable`, in place, one by one; returns how many. Before adapters are added.

    All other parameters keep their numbers, and are float32 afterwards.
    """
    names = quantizable(module, bits, keep=keep)
    for name in names:
        linear = module.get_submodule(name)
        assert type(linear) is nn.Linear
        replace_layer(module, name, QuantizedLinear(linear, bits))
    for parameter in module.parameters():
        parameter.data = parameter.data.float()
    return len(names)


@cache
def _pairs(bits: Bits, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 2): both values that a byte stands for, so that one lookup gives them."""
    with torch.inference_mode(False):
        values = torch.tensor(NF4 if bits == "nf4" else range(16), dtype=dtype, device=device)
        return torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)


def _four_bits(groups: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor | None]:
    """groups: (out, groups, weights of each). Returns codes (out, in), scales and what is added to all of a group.

    Codes are chosen for the scales as they are stored, so that their rounding costs nothing more.
    """
    if bits == "nf4":
        scales = groups.abs().amax(2, keepdim=True).to(torch.bfloat16)
        values = torch.tensor(NF4, device=groups.device)
        between = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(groups / scales.float().clamp_min(1e-30), between)
        return codes.to(torch.uint8).flatten(1), scales, None
    low, high = groups.aminmax(dim=2, keepdim=True)
    lowest = low.to(torch.bfloat16)
    scales = ((high - lowest.float()) / 15).to(torch.bfloat16)
    codes = ((groups - lowest.float()) / scales.float().clamp_min(1e-30)).round().clamp(0, 15)
    return codes.to(torch.uint8).flatten(1), scales, lowest
