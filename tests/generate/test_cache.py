"""The cache as decoding uses it: ragged rows, forks, growth."""

import pytest
import torch

from opsin.nn.cache import KVCache, decode_dtype
from opsin.spec.decoder import DecoderConfig

CONFIG = DecoderConfig(vocab_size=8, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=8)


def filled(lengths, capacity=8):
    """A cache whose keys tell row and place: row * 100 + place."""
    cache = KVCache(CONFIG, batch_size=len(lengths), capacity=capacity, dtype=torch.float32)
    longest = max(lengths)
    k = (
        (torch.arange(len(lengths))[:, None] * 100 + torch.arange(longest))
        .float()[:, :, None, None]
        .expand(-1, -1, 1, 4)
    )
    for layer in range(2):
        cache.append(layer, k, -k)
    cache.advance(lengths)
    return cache


def row(cache, index):
    return cache.keys[0][index, 0, : cache.lengths[index], 0].tolist()


def test_what_lies_beyond_a_ragged_row_is_never_garbage():
    """Attention multiplies masked values by 0, and 0 times NaN is NaN: fresh memory must hold numbers."""
    cache = filled([5, 2], capacity=5)
    cache.reserve(50)
    for tensor in (*cache.keys, *cache.values):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("num_new", [1, 3])
def test_new_tokens_stand_behind_each_rows_own(num_new):
    for lengths in ([4, 4], [4, 2]):
        cache = filled(lengths)
        new = torch.full((2, num_new, 1, 4), 7.0)
        keys, values = cache.append(1, new, -new)
        assert keys.shape == values.shape == (2, max(lengths) + num_new, 1, 4)
        for index, length in enumerate(lengths):
            assert keys[index, :length, 0, 0].tolist() == [index * 100 + place for place in range(length)]
            assert (keys[index, length : length + num_new] == 7).all()
            assert (values[index, length : length + num_new] == -7).all()


def test_select_forks_reorders_and_frees():
    cache = filled([3, 1, 4]).select([2, 0, 2])
    assert cache.lengths == [4, 3, 4]
    assert row(cache, 0) == row(cache, 2) == [200, 201, 202, 203]
    assert row(cache, 1) == [0, 1, 2]
    cache.keys[0][0] = 9
    assert row(cache, 2) == [200, 201, 202, 203], "forks do not share memory"


def test_rows_taken_apart_write_into_the_same_memory():
    cache = filled([3, 1, 4])
    part = cache.rows(slice(1, 3))
    assert (part.lengths, part.prompt_lengths, part.capacity) == ([1, 4], [1, 4], 8)
    new = torch.full((2, 1, 1, 4), 7.0)
    part.append(0, new, -new)
    part.advance([1, 1])
    assert cache.lengths == [3, 1, 4], "lengths are each cache's own"
    cache.advance([0, 1, 1])
    assert [row(cache, index) for index in range(3)] == [[0, 1, 2], [100, 7], [200, 201, 202, 203, 7]]


def test_truncated_tokens_are_overwritten():
    cache = filled([4, 4])
    cache.truncate([2, 3])
    cache.append(0, torch.full((2, 1, 1, 4), 7.0), torch.zeros(2, 1, 1, 4))
    cache.advance([1, 1])
    assert row(cache, 0) == [0, 1, 7]
    assert row(cache, 1) == [100, 101, 102, 7]


def test_a_cache_may_be_more_exact_than_the_model():
    assert decode_dtype(torch.bfloat16, "cpu") == torch.float32
    assert decode_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    assert decode_dtype(torch.float64, "cpu") == torch.float64
