"""Rotary positions (RoFormer, arXiv:2104.09864): a query and a key meet by the difference of their positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from opsin.spec.decoder import RopeConfig


class Rotation(NamedTuple):
    """Angles of every token, shared by all layers: (B, T, 1, E), ready to broadcast over heads.

    The first half of `sin` is negated, so that turning a pair needs no other sign.
    """

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, *, head_dim: int, config: RopeConfig, dtype: torch.dtype) -> Rotation:
    """Angles position * theta^(-2i/E) for i = 0..E/2-1, each used by dimensions i and i + E/2.

    positions: (B, T, A) integers; a model with one position axis reads axis 0. Small i turns fast and tells near tokens
    apart, large i turns slowly and tells far ones apart. Angles are float32: half precision loses whole turns.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / config.theta**exponents
    angles = positions[..., 0, None].float() * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return Rotation(cos[:, :, None], sin[:, :, None])


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of the last axis by its angle. x: (B, T, H, E) -> same shape."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * by.cos, swapped, by.sin)
