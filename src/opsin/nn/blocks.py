"""Small parts that towers, connectors and decoders share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opsin.spec.vision import Activation, Norm


def make_norm(kind: Norm, dim: int, eps: float) -> nn.Module:
    """LayerNorm with bias or RMSNorm without, over the last axis."""
    return nn.LayerNorm(dim, eps=eps) if kind == "layer" else RMSNorm(dim, eps=eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight. The same bits as torch's.

    On a CPU torch has no kernel for its gradient and makes it of some twenty steps, three times slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> same shape."""
        wants_gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if not wants_gradient or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            x = x.float()  # as autocast does for torch's
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(x)
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return out


class _RMSNorm(torch.autograd.Function):
    """With y = x r, r = 1 / sqrt(mean(x^2) + eps): dx = r (g w - y mean(g w y)), dw = the sum of g y over tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        want_x, want_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if want_weight:
            grad_weight = (x * scale).mul_(grad).flatten(0, -2).sum(0)
        if want_x:
            inner = grad * weight
            turned = torch.linalg.vecdot(inner, x)[..., None] * scale.pow(3) / -x.shape[-1]
            grad_x = inner.mul_(scale).addcmul_(x, turned)
        return grad_x, grad_weight, None


def activate(x: Tensor, kind: Activation) -> Tensor:
    """The activation of a vision MLP, elementwise."""
    return x * torch.sigmoid(1.702 * x) if kind == "quick_gelu" else F.gelu(x)


class MLP(nn.Module):
    """down(activation(up(x))), with biases."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        return self.down(activate(self.up(x), self.activation))


class ReluMLP(nn.Module):
    """down(relu(up(x))), with biases (OPT)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        return self.down(F.relu(self.up(x)))


class GatedMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        return x * self.weight
