"""Linear layers in few bits: how far they are off, what they cost, and that gradients are those of what is restored."""

import pytest
import torch
from torch import nn

from opsin.errors import ConfigError
from opsin.nn.lora import attach, find_targets, merge
from opsin.nn.quantize import NF4, QuantizedLinear, quantize
from opsin.spec.lora import Lora
from train.toy import tiny_model

# Relative error of normal weights (2-norm), and bits per weight, codes and scales together.
MEASURED = {"int8": (0.0072, 8.13), "int4": (0.0898, 4.51), "nf4": (0.0925, 4.26)}


def linear(rows: int = 48, columns: int = 256, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows, bias=bias)


def normal(rows: int = 48, columns: int = 256) -> nn.Linear:
    layer = linear(rows, columns)
    nn.init.normal_(layer.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    return layer


@pytest.mark.parametrize("bits", MEASURED)
def test_what_is_restored_is_near_and_what_is_stored_is_small(bits):
    layer = normal()
    small = QuantizedLinear(layer, bits)
    error, bits_each = MEASURED[bits]
    restored = small.weight_as(torch.float32)
    off = ((restored - layer.weight).norm() / layer.weight.norm()).item()
    assert off == pytest.approx(error, rel=0.01)
    stored = sum(tensor.nbytes for tensor in small.buffers())
    assert 8 * stored / layer.weight.numel() < bits_each
    # Again, it is its own nearest.
    layer.weight.data = restored
    again = QuantizedLinear(layer, bits).weight_as(torch.float32)
    torch.testing.assert_close(again, restored, atol=2e-4, rtol=0)


ON_STEPS = {
    "int8": torch.arange(-127, 128, 4) * 0.5,
    "int4": (torch.arange(64) % 16 - 8) * 0.5,
    "nf4": torch.tensor(NF4).repeat(4) * 0.5,
}


@pytest.mark.parametrize("bits", MEASURED)
def test_weights_on_the_steps_come_back_exactly(bits):
    layer = linear(4, 64)
    layer.weight.data = ON_STEPS[bits].repeat(4, 1)
    if bits == "int8":
        layer.weight.data[:, -1] = 63.5  # the largest sets the scale
    assert torch.equal(QuantizedLinear(layer, bits).weight_as(torch.float32), layer.weight)


@pytest.mark.parametrize("bits", MEASURED)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_weights_are_no_trouble(bits, value):
    layer = linear()
    layer.weight.data.fill_(value)
    torch.testing.assert_close(QuantizedLinear(layer, bits).weight_as(torch.float32), layer.weight.data)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bits", MEASURED)
def test_output_and_gradient_are_those_of_the_restored_layer(bits, autocast):
    small = QuantizedLinear(normal(), bits)
    plain = linear()
    dtype = torch.bfloat16 if autocast else torch.float32
    plain.weight.data, plain.bias = small.weight_as(dtype).float(), small.bias
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(2))
    outcomes = []
    for layer in (small, plain):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(given)
        y.float().square().sum().backward()
        assert y.dtype == dtype
        outcomes.append((y.detach().float(), given.grad, layer.bias.grad))
        layer.bias.grad = None  # one tensor of both
    torch.testing.assert_close(
        outcomes[0], outcomes[1], rtol=2e-2 if autocast else 1e-5, atol=2e-2 if autocast else 1e-5
    )


def test_no_restored_weight_waits_for_the_backward_pass():
    layers = nn.Sequential(*(QuantizedLinear(normal(256, 256), "int4") for _ in range(4)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        layers(torch.randn(2, 256, requires_grad=True))
    assert sum(kept) == 0


def test_tower_and_language_model_are_quantised_and_what_trains_is_not(tmp_path):
    vlm = tiny_model(tmp_path).vlm.bfloat16()
    count = quantize(vlm, "int8", keep=("decoder.layers.0.attn.q.weight",))
    names = [name for name, layer in vlm.named_modules() if isinstance(layer, QuantizedLinear)]
    assert count == len(names) == 3 * 6 + 2 * 7 - 1
    assert all(name.startswith(("vision.layers.", "decoder.layers.")) for name in names)
    assert "decoder.layers.0.attn.q" not in names
    assert {parameter.dtype for parameter in vlm.parameters()} == {torch.float32}
    targets = find_targets(vlm, ["decoder"])
    attach(vlm, Lora(rank=2, alpha=4), targets)
    assert vlm.decoder.layers[0].mlp.up.lora_A.weight.dtype == torch.float32
    with pytest.raises(ConfigError, match="is quantised, and an adapter cannot be added to its few bits"):
        merge(vlm)
