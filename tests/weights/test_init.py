"""Random weights: the same bits for the same seed, and sane sizes."""

import pytest
import torch

from opsin import families, weights
from weights.folders import same

CONFIG = families.preset("llava-next-tiny").config


def test_bits_follow_from_config_and_seed() -> None:
    first = weights.build(CONFIG, seed=5).state_dict()
    torch.manual_seed(123)
    assert same(weights.build(CONFIG, seed=5).state_dict(), first)
    assert not same(weights.build(CONFIG, seed=6).state_dict(), first)


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    weights.build(CONFIG, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_one_tensor_does_not_depend_on_the_others() -> None:
    """A deeper model begins with the tensors of the shallow one, and a part can be drawn alone."""
    deeper = CONFIG.replace(decoder=CONFIG.decoder.replace(num_layers=3))
    shallow, deep = weights.build(CONFIG, seed=5).state_dict(), weights.build(deeper, seed=5).state_dict()
    assert all(torch.equal(deep[name], shallow[name]) for name in shallow)
    vlm = weights.build(CONFIG, seed=6)
    weights.initialise(vlm, seed=5, part="connector.")
    for name, tensor in vlm.state_dict().items():
        if tensor.unique().numel() > 1:
            assert torch.equal(tensor, shallow[name]) == name.startswith("connector.")


def test_sizes_are_those_of_the_table() -> None:
    wide = CONFIG.decoder.replace(dim=256, mlp_dim=512)
    state = weights.build(CONFIG.replace(decoder=wide)).state_dict()
    # Samples of 30,000 numbers and more: their deviation is within 2 % of the distribution's.
    for name in ("decoder.embed.weight", "decoder.layers.1.mlp.down.weight", "decoder.head.weight"):
        assert state[name].std() == pytest.approx(0.02, rel=0.02)
    assert state["newline"].std() == pytest.approx(256**-0.5, rel=0.2)
    assert state["vision.class_token"].std() == pytest.approx(32**-0.5, rel=0.4)
    bound = 256**-0.5
    assert bound * 0.99 < state["connector.layers.1.weight"].abs().max() <= bound
    assert state["connector.layers.1.bias"].abs().max() > bound / 2
    assert (state["decoder.norm.weight"] == 1).all()
    assert (state["vision.layers.0.norm1.bias"] == 0).all()
    assert (state["vision.layers.0.attn.q.bias"] == 0).all()


def test_other_dtypes_get_the_same_numbers_rounded() -> None:
    half = weights.build(CONFIG, seed=5, dtype=torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    whole = weights.build(CONFIG, seed=5).state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.items())
