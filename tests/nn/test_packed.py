"""Packed linear layers compute what the plain ones do."""

import copy

import pytest
import torch
from torch import nn

from opsin import families, weights
from opsin.collate import pad
from opsin.encode import Encoder
from opsin.nn.mask import FULL
from opsin.nn.packed import PackedLinear, can_pack, pack, pack_layers
from opsin.nn.qformer import QFormerAttention
from opsin.spec.decoder import DecoderConfig
from opsin.spec.vision import VisionConfig
from opsin.text.messages import ask
from toys import byte_tokenizer, picture


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300,), (1, 300), (1, 1, 300), (3, 5, 300)])
def test_a_packed_layer_gives_the_same_numbers(dtype, tolerance, bias, shape):
    torch.manual_seed(0)
    plain = nn.Linear(300, 400, bias=bias).to(dtype)
    if not can_pack(plain):
        pytest.skip(f"this processor has no packed {dtype} kernels")
    module = nn.Sequential(copy.deepcopy(plain))
    assert pack_layers(module) == 1
    assert isinstance(module[0], PackedLinear)
    x = torch.randn(shape).to(dtype)
    # Sums of 300 products in another order; in bfloat16 the last of 8 bits of the result may differ.
    with torch.inference_mode():
        torch.testing.assert_close(module(x), plain(x), atol=tolerance, rtol=tolerance)


def test_small_layers_other_dtypes_and_subclasses_are_left_alone():
    class Special(nn.Linear):
        pass

    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(300, 400).double(), Special(300, 400), nn.LayerNorm(400))
    assert pack_layers(module) == 0
    assert [type(each) for each in module] == [nn.Linear, nn.Linear, Special, nn.LayerNorm]


def test_a_packed_model_gives_the_same_hidden_states(tmp_path):
    config = families.preset("llava-next-tiny").config
    decoder = DecoderConfig(vocab_size=384, dim=256, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=512)
    vision = VisionConfig(**{**dict(config.vision), "dim": 256, "mlp_dim": 512})
    config = config.replace(decoder=decoder, vision=vision)
    vlm = weights.build(config, seed=1).eval()
    if not can_pack(vlm.decoder.layers[0].mlp.up):
        pytest.skip("this processor has no packed float32 kernels")
    batch = pad([Encoder(config, byte_tokenizer(tmp_path)).encode(ask("What is it?", picture((80, 60))))])
    with torch.inference_mode():
        expected = vlm.hidden(batch)
        # Decoder layers: q, k, v (in one), out, gate, up, down. Tower layers: six. The connector's two, and the head.
        assert pack(vlm, num_rows=8) == 2 * 7 + config.vision.num_layers * 6 + 2 + 1
        # Normed states, float32 sums of some hundred products in another order, through five layers.
        torch.testing.assert_close(vlm.hidden(batch), expected, atol=1e-4, rtol=1e-4)


def test_keys_and_values_of_a_q_former_come_from_one_layer():
    torch.manual_seed(0)
    attention = QFormerAttention(256, 320, num_heads=4, norm_eps=1e-6, dropout=0.0).eval()
    if not can_pack(attention.k):
        pytest.skip("this processor has no packed float32 kernels")
    x, memory = torch.randn(2, 5, 256), torch.randn(2, 9, 320)
    with torch.inference_mode():
        expected = attention(x, attention.keys_values(memory), mask=FULL)
        assert pack_layers(attention) == 4
        assert {name for name, _ in attention.named_children()} == {"q", "kv", "out", "norm", "dropout"}
        # Normed sums of some hundred products in another order.
        torch.testing.assert_close(
            attention(x, attention.keys_values(memory), mask=FULL), expected, atol=1e-5, rtol=1e-5
        )
