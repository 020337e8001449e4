"""Rotary positions: a score depends on the distance alone."""

import pytest
import torch

from opsin.errors import OpsinError
from opsin.families._parts import QWEN2_VL_2B
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


def test_axes_in_blocks_and_interleaved():
    assert RopeConfig(sections=(2, 3, 3)).axes(8) == [0, 0, 1, 1, 1, 2, 2, 2]
    assert RopeConfig(sections=(4, 2, 2), order="interleaved").axes(8) == [0, 1, 2, 0, 1, 2, 0, 0]
    assert RopeConfig().axes(4) == [0, 0, 0, 0]


def test_interleaved_angles_are_those_of_qwen3_vl():
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen3VLTextConfig"):
        pytest.skip("this transformers has no Qwen3-VL")
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    scaling = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True, "rope_theta": 10_000.0}
    theirs = Qwen3VLTextRotaryEmbedding(
        transformers.Qwen3VLTextConfig(
            hidden_size=160, num_attention_heads=5, num_key_value_heads=5, head_dim=32, rope_parameters=scaling
        )
    )
    positions = torch.randint(0, 50, (1, 9, 3), generator=torch.Generator().manual_seed(3))
    cos, sin = theirs(torch.zeros(1, 9, 160), positions.permute(2, 0, 1))
    config = RopeConfig(sections=(6, 5, 5), order="interleaved")
    ours = rotation(positions, head_dim=32, config=config, dtype=torch.float32)
    torch.testing.assert_close(ours.cos[:, :, 0], cos)
    torch.testing.assert_close(ours.sin[:, :, 0, 16:], sin[..., 16:])


def test_sections_that_cannot_take_turns_are_refused():
    with pytest.raises(OpsinError, match=r"cannot take turns among 64 frequencies: row and column may read 21 each"):
        QWEN2_VL_2B.replace(rope={"theta": 1e6, "sections": (16, 24, 24), "order": "interleaved"})
