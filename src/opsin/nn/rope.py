"""Rotary positions (RoFormer, arXiv:2104.09864): a query and a key meet by the difference of their positions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opsin.spec.decoder import RopeConfig, RopeScaling


class Rotation(NamedTuple):
    """What every layer does to queries and keys: (B, T, 1, E), ready to broadcast over heads.

    The first half of `sin` is negated, so that turning a pair needs no other sign.
    """

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None
    """(B, T, 1, 1) factor on queries alone (log-n attention)."""


def rotation(
    positions: Tensor, *, head_dim: int, config: RopeConfig, dtype: torch.dtype, lengths: Tensor | None = None
) -> Rotation:
    """Angles position * theta^(-2i/E) for i = 0..E/2-1, each used by dimensions i and i + E/2.

    positions: (B, T, A) integers. With `sections` a frequency reads axis 0 (time), 1 (row) or 2 (column), as
    `RopeConfig.axes` says. Small i turns fast and tells near tokens apart, large i turns slowly and tells far ones.
    lengths: (B, T) or (B, 1), the length of the sequence that a token belongs to, for a rotation that depends on it;
    None leaves such a rotation as it was trained. Angles are float32: half precision loses whole turns.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    scale = 1.0
    if config.scaling is None:
        frequencies = 1.0 / config.theta**exponents
    else:
        frequencies, scale = _scaled(config.theta, exponents, config.scaling, head_dim, lengths)
    if config.sections is None:
        turning = positions[..., :1].float()
    else:
        turning = positions[..., torch.tensor(config.axes(head_dim // 2), device=positions.device)].float()
    query_scale = None
    if config.log_n is not None and lengths is not None:
        nth = positions[..., 0].float() + 1  # the formula counts positions from one
        query_scale = (nth.log() / math.log(config.log_n)).clamp_min(1.0)[:, :, None, None].to(dtype)
    return from_angles(turning * frequencies, dtype=dtype, scale=scale, query_scale=query_scale)


def from_angles(
    angles: Tensor, *, dtype: torch.dtype, scale: float = 1.0, query_scale: Tensor | None = None
) -> Rotation:
    """angles: (B, T, E/2), one for each pair of dimensions."""
    cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
    cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    return Rotation(cos[:, :, None], sin[:, :, None], query_scale)


def _scaled(
    theta: float, exponents: Tensor, scaling: RopeScaling, head_dim: int, lengths: Tensor | None
) -> tuple[Tensor, float]:
    """Frequencies (E/2) or (B, T or 1, E/2) by the rule of `scaling`, and the factor on sine and cosine."""
    length = None if lengths is None else lengths[..., None].float()
    if scaling.kind == "long":
        factor = math.sqrt(1 + math.log(scaling.extended / scaling.trained) / math.log(scaling.trained))
        short, long = exponents.new_tensor(scaling.short), exponents.new_tensor(scaling.long)
        divisors = short if length is None else torch.where(length > scaling.trained, long, short)
        return 1.0 / (divisors * theta**exponents), factor
    if length is None:
        return 1.0 / theta**exponents, 1.0
    if scaling.kind == "dynamic":
        stretch = (scaling.factor * length / scaling.trained - (scaling.factor - 1)).clamp_min(1.0)
    else:
        stretch = (2 ** ((length / scaling.trained).log2() + 1).ceil() - 1).clamp_min(1.0)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base**exponents, 1.0


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + E/2]) of the last axis by its angle. x: (B, T, H, E) -> same shape."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * by.cos, swapped, by.sin)
