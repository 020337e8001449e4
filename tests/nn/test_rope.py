"""Rotary positions: a score depends on the distance alone."""

import torch

from opsin.nn.rope import rotate, rotation
from opsin.spec.decoder import RopeConfig


def turned(x, position, theta=10_000.0):
    positions = torch.tensor([[[position]]])
    angles = rotation(positions, head_dim=x.shape[-1], config=RopeConfig(theta=theta), dtype=torch.float32)
    return rotate(x, angles)


def test_a_score_depends_only_on_the_distance():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 1, 16, generator=generator), torch.randn(1, 1, 1, 16, generator=generator)
    scores = [float((turned(q, 7 + shift) * turned(k, 3 + shift)).sum()) for shift in (0, 1, 50, 400)]
    # Angles of a few hundred radians in float32 are known to about 3e-5, sixteen products add up.
    assert max(scores) - min(scores) < 1e-3


def test_position_zero_turns_nothing_and_lengths_are_kept():
    x = torch.randn(1, 1, 2, 16, generator=torch.Generator().manual_seed(2))
    assert torch.equal(turned(x, 0), x)
    torch.testing.assert_close(turned(x, 123).norm(), x.norm())


def test_the_first_pair_turns_by_one_radian_per_position_and_the_last_slowest():
    x = torch.zeros(1, 1, 1, 8)
    x[..., 0] = 1.0  # the first pair is (0, 4)
    y = turned(x, 1)
    torch.testing.assert_close(y[0, 0, 0, [0, 4]], torch.tensor([1.0, 0.0]).new_tensor([0.5403023, 0.8414710]))
    slow = torch.zeros(1, 1, 1, 8)
    slow[..., 3] = 1.0
    assert turned(slow, 1)[0, 0, 0, 7] < 0.002  # theta^(-6/8) = 0.001 radian
