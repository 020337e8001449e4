"""LoRA: linear layers that stay as they are, and a trained change of low rank beside each.

A layer keeps its place and the names of its tensors; `lora_A` and `lora_B`, named as PEFT names them, come in addition:

    decoder.layers.0.attn.q.weight           (out, in)     frozen
                            lora_A.weight    (rank, in)    uniform, +- 1 / sqrt(in)
                            lora_B.weight    (out, rank)   0, so that training starts from the model as it was
"""

import hashlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.errors import ConfigError, nearest
from opsin.spec.lora import Lora
from opsin.spec.recipe import matches

A, B = "lora_A", "lora_B"
UNREACHED = ("vision.patch", "decoder.head")
"""Linear layers whose weight is read without calling them: a convolution on a CPU, the loss."""


class WithLoRA(nn.Module):
    """What layers that can have an adapter share."""

    in_features: int
    out_features: int
    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_scale: float
    lora_dropout: float

    def low_rank(self, x: Tensor) -> Tensor:
        """What the adapter adds. x: (..., in) -> (..., out)."""
        if not torch.is_autocast_enabled(x.device.type):  # which chooses the dtype itself
            x = x.to(self.lora_A.weight.dtype)
        x = F.dropout(x, self.lora_dropout, self.training)
        return self.lora_B(self.lora_A(x)) * self.lora_scale


class LoRALinear(nn.Linear, WithLoRA):
    """A linear layer with a change of low rank. It takes over the tensors of the layer that it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        y = super().forward(x)
        return y + self.low_rank(x).to(y.dtype)


def adapted(module: nn.Module) -> dict[str, WithLoRA]:
    """The layers that have an adapter, by name."""
    return {
        name: layer for name, layer in module.named_modules() if isinstance(layer, WithLoRA) and A in layer._modules
    }


def find_targets(module: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Names of the linear layers that parts or globs mean, in the module's order.

    Raises ConfigError for a pattern that means none.
    """
    known = [name for name in _linear_names(module) if name not in UNREACHED]
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in known if matches(name, pattern)]
        if not found:
            why = " (its weight is read without the layer being called)" if pattern in UNREACHED else ""
            raise ConfigError(
                f"lora target {pattern!r} names no linear layer that can have one{why}{nearest(pattern, known)}"
            )
        chosen.update(found)
    return tuple(name for name in known if name in chosen)


def attach(module: nn.Module, lora: Lora, targets: Iterable[str], *, seed: int = 0) -> None:
    """Give layers their adapters, in place. Bits follow from the seed and the layer's name alone.

    A layer that has one of this rank already keeps its numbers, and goes on from them.
    """
    known = adapted(module)
    for name in targets:
        if (layer := known.get(name)) is not None:
            rank = layer.lora_A.out_features
            if rank != lora.rank:
                raise ConfigError(f"{name} has an adapter of rank {rank}; merge it before one of {lora.rank} is added")
            layer.lora_scale, layer.lora_dropout = lora.scale, lora.dropout
            continue
        layer = attach_one(module, name, rank=lora.rank, scale=lora.scale, dropout=lora.dropout)
        if layer.lora_A.weight.is_meta:
            continue
        digest = hashlib.sha256(f"{seed}:{name}.{A}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        down, up = layer.lora_A.weight, layer.lora_B.weight
        bound = 1 / math.sqrt(down.shape[1])
        with torch.no_grad():
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
            up.zero_()


def attach_one(module: nn.Module, name: str, *, rank: int, scale: float, dropout: float = 0.0) -> WithLoRA:
    """Give one linear layer an adapter whose numbers are still to be set. Returns the layer that has it."""
    linear = module.get_submodule(name)
    layer: WithLoRA
    if isinstance(linear, WithLoRA):  # quantised
        layer, dtype = linear, torch.float32
    else:
        assert isinstance(linear, nn.Linear)
        layer, dtype = LoRALinear(linear), linear.weight.dtype
        replace_layer(module, name, layer)
    device = next(iter(linear.state_dict().values())).device
    for own, rows, columns in ((A, rank, layer.in_features), (B, layer.out_features, rank)):
        factor = nn.Linear(columns, rows, bias=False, device="meta", dtype=dtype)
        setattr(layer, own, factor.to_empty(device=device))
    layer.lora_scale, layer.lora_dropout = scale, dropout
    return layer


@torch.no_grad()
def merge(module: nn.Module) -> tuple[str, ...]:
    """Add every adapter to its layer's weight, in place, and take it away. Returns the names of the layers.

    The sum is made in float32 and rounded once. Raises ConfigError for a layer whose weight is quantised.
    """
    layers = adapted(module)
    for name, layer in layers.items():
        if not isinstance(layer, LoRALinear):
            raise ConfigError(
                f"{name} is quantised, and an adapter cannot be added to its few bits; load the base anew"
            )
        weight = layer.weight
        change = layer.lora_B.weight.float() @ layer.lora_A.weight.float()
        merged = torch.add(weight.float(), change, alpha=layer.lora_scale).to(weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)
    detach(module)
    return tuple(layers)


def detach(module: nn.Module) -> None:
    """Take every adapter away: the model is what it was without."""
    for name, layer in adapted(module).items():
        if not isinstance(layer, LoRALinear):  # quantised
            del layer.lora_A, layer.lora_B
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        replace_layer(module, name, plain.train(layer.training))


def _linear_names(module: nn.Module) -> Iterator[str]:
    inside = (f".{A}", f".{B}")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | WithLoRA) and not name.endswith(inside):
            yield name


def replace_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one of that name."""
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)
