"""One mask rule, its cheap forms, and grouped keys."""

import pytest
import torch

from opsin.nn.attention import attend
from opsin.nn.mask import CAUSAL, FULL, Mask, dense, packed


def reference(q, k, v, allowed):
    """Softmax attention written out in float64, keys repeated for grouped heads."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def tensors(batch, queries, keys, heads=4, kv_heads=2, width=8):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, queries, heads, width, generator=generator),
        torch.randn(batch, keys, kv_heads, width, generator=generator),
        torch.randn(batch, keys, kv_heads, width, generator=generator),
    )


# Float32 kernels against float64: eight products of unit-variance numbers per score leave errors near 1e-6.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def test_full_and_causal_forms_equal_the_rule_written_out():
    q, k, v = tensors(2, 6, 6)
    everything = torch.ones(6, 6, dtype=torch.bool)
    torch.testing.assert_close(attend(q, k, v, mask=FULL).double(), reference(q, k, v, everything), **TOLERANCE)
    torch.testing.assert_close(
        attend(q, k, v, mask=CAUSAL).double(), reference(q, k, v, everything.tril()), **TOLERANCE
    )


@pytest.mark.parametrize("within", ["causal", "full"])
@pytest.mark.parametrize(
    "segments",
    [
        [[0, 0, 0, 1, 1, 2, 2, 2, 2]],
        [[0, 0, 0, 1, 1, 1, 2, 2, 2]],  # of one length: they run as one batch
        [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]],
        [[0, 0, 1, 1, -1, -1], [2, 2, 2, 2, 3, -1], [-1, 4, 4, -1, -1, -1]],  # -1: in no stretch
    ],
)
def test_stretches_equal_the_dense_rule(segments, within):
    segment = torch.tensor(segments)
    rows, length = segment.shape
    q, k, v = tensors(rows, length, length)
    order = torch.arange(length).expand(rows, -1) if within == "causal" else torch.zeros_like(segment)
    rule = dense(segment, order, segment, order)
    places = {number: (segment == number).nonzero().tolist() for number in set(segment.flatten().tolist()) - {-1}}
    # In any order.
    stretches = tuple((at[0][0], at[0][1], at[-1][1] + 1) for _, at in sorted(places.items(), reverse=True))
    by_stretch = attend(q, k, v, mask=Mask("stretches", stretches=stretches, within=within))
    inside = segment >= 0
    expected = reference(q, k, v, rule.allowed)
    torch.testing.assert_close(by_stretch[inside].double(), expected[inside], **TOLERANCE)
    assert (by_stretch[~inside] == 0).all()


def test_gradient_does_not_cross_documents():
    q, k, v = tensors(1, 5, 5)
    k.requires_grad_()
    attend(q, k, v, mask=packed(((0, 0, 2), (0, 2, 5))))[:, 2:].sum().backward()
    assert (k.grad[:, :2] == 0).all()
    assert (k.grad[:, 2:] != 0).any()


def test_one_query_with_the_causal_form_sees_its_only_key():
    q, k, v = tensors(1, 1, 1)
    out = attend(q, k, v, mask=Mask("causal"))
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=2))
