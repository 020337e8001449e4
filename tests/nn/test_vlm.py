"""The model: cached equals uncached, batched equals single, packed equals padded, and nothing crosses documents."""

import numpy as np
import pytest
import torch

from opsin.collate import pack, pad
from opsin.encode import Encoded
from opsin.errors import ConfigError
from opsin.media.prepare import PreparedImage
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.vlm import VLM
from opsin.spec.chat import AssistantTurn, ChatFormat, UserTurn
from opsin.spec.connector import LinearConnector, MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import AnyRes, CenterCrop
from opsin.spec.vision import VisionConfig

# Different batch shapes make the matrix kernels add in another order: float32 noise on logits of size about 1.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def tiny(resolution=None, connector=None) -> VLMConfig:
    resolution = resolution or AnyRes(tile_size=16, resolutions=((16, 32), (32, 16), (32, 32)))
    return VLMConfig(
        vision=VisionConfig(image_size=16, patch_size=4, dim=16, num_layers=3, num_heads=2, mlp_dim=32),
        connector=connector or MLPConnector(),
        decoder=DecoderConfig(vocab_size=50, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48),
        resolution=resolution,
        chat=ChatFormat(name="test", user=UserTurn(), assistant=AssistantTurn()),
    )


def model(config) -> VLM:
    vlm = VLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in vlm.parameters():
            scale = 0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return vlm.eval()


def encoded(config, seed, *, num_text, sizes=()) -> Encoded:
    """Random tokens with pictures after the first two."""
    random = np.random.default_rng(seed)
    plans = [config.plan(size) for size in sizes]
    images = tuple(
        PreparedImage(
            patches=random.standard_normal((plan.num_patches, 3 * config.vision.patch_size**2)).astype(np.float32),
            grids=np.array([tile.grid for tile in plan.tiles], np.int64),
            plan=plan,
            name=f"picture {index}",
        )
        for index, plan in enumerate(plans)
    )
    num_slots = sum(plan.num_slots for plan in plans)
    total = num_text + num_slots
    supervised = np.zeros(total, np.bool_)
    supervised[-3:] = True
    return Encoded(
        ids=random.integers(3, config.decoder.vocab_size, total),
        supervised=supervised,
        positions=np.arange(total)[:, None],
        slots=np.arange(2, 2 + num_slots),
        slot_rows=np.concatenate([plan.layout.order for plan in plans]).astype(np.int64)
        if plans
        else np.zeros(0, np.int64),
        images=images,
        token_spans=np.zeros(total, np.int64),
        spans=(),
        name=f"sample {seed}",
    )


@pytest.fixture(scope="module")
def config():
    return tiny()


@pytest.fixture(scope="module")
def vlm(config):
    return model(config)


@pytest.fixture(scope="module")
def samples(config):
    return [
        encoded(config, 1, num_text=7, sizes=[(20, 11)]),
        encoded(config, 2, num_text=12),
        encoded(config, 3, num_text=8, sizes=[(9, 30), (40, 40)]),
    ]


def hidden_of(vlm, sample):
    return vlm.hidden(pad([sample]))[0]


@torch.no_grad()
def test_a_batched_row_equals_the_single_one(vlm, samples):
    hidden = vlm.hidden(pad(samples))
    for row, sample in enumerate(samples):
        torch.testing.assert_close(hidden[row, : sample.num_tokens], hidden_of(vlm, sample), **TOLERANCE)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(vlm, samples):
    hidden = vlm.hidden(pack(samples))[0]
    separate = torch.cat([hidden_of(vlm, sample) for sample in samples])
    torch.testing.assert_close(hidden, separate, **TOLERANCE)


def test_packed_documents_do_not_see_each_other(vlm, samples):
    batch = pack(samples)
    embedding = vlm.embed(batch).detach().requires_grad_()
    _, start, stop = batch.documents[1]
    vlm.decoder(embedding, positions=batch.positions, mask=batch.mask)[0, start:stop].square().sum().backward()
    others = torch.cat([embedding.grad[0, :start], embedding.grad[0, stop:]])
    assert (others == 0).all(), "exactly zero, not nearly"
    assert (embedding.grad[0, start:stop] != 0).any()


@torch.no_grad()
def test_cached_steps_equal_the_full_forward_for_ragged_rows(config, vlm, samples):
    """Rows of different lengths, fed one token at a time after a prefill, as generation does."""
    steps = 4
    full = [hidden_of(vlm, sample) for sample in samples]
    cut = [
        Encoded(
            ids=s.ids[:-steps], supervised=s.supervised[:-steps], positions=s.positions[:-steps], slots=s.slots,
            slot_rows=s.slot_rows, images=s.images, token_spans=s.token_spans[:-steps], spans=(),
        )
        for s in samples
    ]  # fmt: skip
    cache = KVCache(config.decoder, batch_size=3, capacity=8, dtype=torch.float32)
    batch = pad(cut)
    hidden = vlm.hidden(batch, cache)
    assert cache.lengths == [s.num_tokens for s in cut]
    for row, sample in enumerate(cut):
        torch.testing.assert_close(hidden[row, : sample.num_tokens], full[row][:-steps], **TOLERANCE)
    for step in range(steps):
        index = [s.num_tokens - steps + step for s in samples]
        batch = Batch(
            ids=torch.tensor([[int(s.ids[i])] for s, i in zip(samples, index, strict=True)]),
            positions=torch.tensor(index)[:, None, None],
            documents=tuple((row, 0, 1) for row in range(3)),
        )
        hidden = vlm.hidden(batch, cache)
        for row, i in enumerate(index):
            torch.testing.assert_close(hidden[row, 0], full[row][i], **TOLERANCE)


@torch.no_grad()
def test_several_tokens_continue_a_cache_like_one_at_a_time(config, vlm, samples):
    sample = samples[1]
    full = hidden_of(vlm, sample)
    cache = KVCache(config.decoder, batch_size=1, capacity=4, dtype=torch.float32)
    for start, stop in ((0, 5), (5, 11), (11, 12)):
        batch = Batch(
            ids=torch.from_numpy(sample.ids[None, start:stop]),
            positions=torch.arange(start, stop)[None, :, None],
            documents=((0, 0, stop - start),),
        )
        torch.testing.assert_close(vlm.hidden(batch, cache)[0], full[start:stop], **TOLERANCE)


def test_selected_cache_rows_are_forks_that_go_their_own_way(config):
    cache = KVCache(config.decoder, batch_size=2, capacity=3, dtype=torch.float32)
    k = torch.arange(2 * 2 * 2 * 8.0).view(2, 2, 2, 8)
    for layer in range(config.decoder.num_layers):
        cache.append(layer, k, k)
    cache.advance([2, 1])
    cache.select([1, 1, 0])
    assert cache.lengths == [1, 1, 2]
    new = -k[:1, :1].expand(3, 1, 2, 8)
    keys, _ = cache.append(0, new, new)
    assert torch.equal(keys[0, 0], k[1, 0])
    assert torch.equal(keys[0, 1], new[0, 0]), "a row of one token is continued at 1"
    assert torch.equal(keys[2, :2], k[0])
    assert torch.equal(keys[2, 2], new[0, 0]), "a row of two tokens at 2"


@torch.no_grad()
def test_rows_computed_before_give_the_same_hidden_states(vlm, samples):
    batch = pad(samples)
    rows = vlm.rows(batch.patches, batch.grids)
    assert torch.equal(vlm.hidden(batch, rows=rows), vlm.hidden(batch))


@torch.no_grad()
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad", "spatial_maxpool2x2"])
def test_planned_slots_are_the_rows_that_the_model_fills(merge):
    resolution = AnyRes(tile_size=16, resolutions=((32, 32), (48, 32)), merge=merge, max_base_tiles=2)
    config = tiny(resolution)
    vlm = model(config)
    sample = encoded(config, 5, num_text=4, sizes=[(50, 31), (31, 50)])
    batch = pad([sample])
    embedded = vlm.embed(batch)[0]
    bare = vlm.decoder.embed(batch.ids)[0]
    changed = (embedded != bare).any(-1).nonzero().squeeze(1)
    assert changed.tolist() == sample.slots.tolist()


@torch.no_grad()
def test_a_kept_class_token_and_several_layers_widen_the_rows():
    vision = VisionConfig(
        image_size=16,
        patch_size=4,
        dim=16,
        num_layers=3,
        num_heads=2,
        mlp_dim=32,
        out_layers=(0, -1),
        class_token="keep",
    )
    config = tiny(CenterCrop(tile_size=16), LinearConnector()).replace(vision=vision)
    vlm = model(config)
    sample = encoded(config, 6, num_text=4, sizes=[(16, 16)])
    assert sample.num_tokens == 4 + 17
    assert vlm.connector.layers[0].in_features == 32
    assert vlm.hidden(pad([sample])).shape == (1, 21, 32)


def test_targets_are_the_supervised_tokens_and_never_the_first_of_a_document(samples):
    batch = pack(samples)
    supervised = batch.supervised.clone()
    supervised[0, batch.documents[1][1]] = True
    places, ids = Batch(
        ids=batch.ids, positions=batch.positions, documents=batch.documents, supervised=supervised
    ).targets()
    assert len(places) == 9
    assert torch.equal(ids, batch.ids[0, places + 1])


@torch.no_grad()
def test_a_tile_of_another_size_is_refused_with_both_grids(vlm):
    with pytest.raises(ConfigError, match=r"4x4 patches; got grids \[\(2, 8\)\]"):
        vlm.rows(torch.zeros(16, 48), torch.tensor([[1, 2, 8]]))


def test_half_precision_stays_close_to_float32(config, vlm, samples):
    """bfloat16 keeps 8 bits of mantissa: two layers of it stay within a few per cent of the states' size (about 1)."""
    with torch.no_grad():
        full = vlm.hidden(pad([samples[0]]))
        half = model(config).to(torch.bfloat16).hidden(pad([samples[0]]))
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.05
