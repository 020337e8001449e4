"""Packed linear layers compute what the plain ones do."""

import copy

import pytest
import torch
from torch import nn

from opsin.nn.packed import PackedLinear, can_pack, pack

LARGE = nn.Linear(300, 400)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300,), (1, 300), (1, 1, 300), (3, 5, 300)])
def test_a_packed_layer_gives_the_same_numbers(dtype, tolerance, bias, shape):
    torch.manual_seed(0)
    plain = nn.Linear(300, 400, bias=bias).to(dtype)
    if not can_pack(plain):
        pytest.skip(f"this processor has no packed {dtype} kernels")
    module = nn.Sequential(copy.deepcopy(plain))
    assert pack(module) == 1
    assert isinstance(module[0], PackedLinear)
    x = torch.randn(shape).to(dtype)
    # Sums of 300 products in another order; in bfloat16 the last of 8 bits of the result may differ.
    with torch.inference_mode():
        torch.testing.assert_close(module(x), plain(x), atol=tolerance, rtol=tolerance)


def test_small_layers_other_dtypes_and_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(300, 400).double(), Special(300, 400), nn.LayerNorm(400))
    assert pack(module) == 0
    assert [type(each) for each in module] == [nn.Linear, nn.Linear, Special, nn.LayerNorm]
