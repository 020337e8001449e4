"""Linear layers packed for inference on a CPU: the same numbers, in the order in which oneDNN's kernels read them."""

import torch
from torch import Tensor, nn

from opsin.nn.attention import Attention
from opsin.nn.qformer import QFormerAttention
from opsin.nn.vlm import VLM

_MIN_WEIGHTS = 2**16
"""Smaller layers are left alone: the packed call takes about 10 us longer to dispatch, which they do not win back."""


class PackedLinear(nn.Module):
    """A linear layer for inference. Its weight is no parameter: it can be neither trained, saved nor moved."""

    def __init__(self, linear: nn.Linear, num_rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_rows)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")


def can_pack(linear: nn.Linear) -> bool:
    """Whether this machine has a faster kernel for a packed form of the layer."""
    weight = linear.weight
    if weight.device.type != "cpu" or weight.numel() < _MIN_WEIGHTS or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(vlm: VLM, *, num_rows: int = 1) -> int:
    """Replace every linear layer of the model that profits by its packed form, in place; returns how many.

    num_rows: how many rows (answers decoded side by side) to be fastest for; other numbers work as well.

    A few rows of half precision then run up to twice as fast, of float32 1.2 times, and many rows no slower. Weights
    are freed one by one as their packed form is made, so that no second copy of the model is held. The model is for
    inference only from then on.
    """
    # Not the tower's patch embedding, which convolves with its weight.
    return sum(pack_layers(part, num_rows=num_rows) for part in (vlm.vision.layers, vlm.connector, vlm.decoder))


def pack_layers(module: nn.Module, *, num_rows: int = 1) -> int:
    """Like `pack`, for the linear layers inside any module that only calls them."""
    count = 0
    if isinstance(module, Attention):
        count = _join(module, ("q", "k", "v"), "qkv")
    elif isinstance(module, QFormerAttention):
        count = _join(module, ("k", "v"), "kv")
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            if can_pack(child):
                setattr(module, name, PackedLinear(child, num_rows))
                count += 1
        else:
            count += pack_layers(child, num_rows=num_rows)
    return count


def _join(attention: nn.Module, names: tuple[str, ...], into: str) -> int:
    """One layer for several of one input, to be packed next: it reads its input once. Returns layers saved."""
    layers = [getattr(attention, name) for name in names]
    if any(type(layer) is not nn.Linear for layer in layers):
        return 0
    weights, biases = zip(*((layer.weight.detach(), layer.bias) for layer in layers), strict=True)
    joined = nn.Linear(weights[0].shape[1], sum(map(len, weights)), bias=biases[0] is not None, device="meta")
    joined.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if not can_pack(joined):
        return 0
    if biases[0] is not None:
        joined.bias = nn.Parameter(torch.cat(biases).detach(), requires_grad=False)
    for name in names:
        delattr(attention, name)
    setattr(attention, into, joined)
    return len(layers) - 1
