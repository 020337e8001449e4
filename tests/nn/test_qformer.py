"""The Q-Former: who sees whom, connectors over tiles of any grid, captions token by token."""

import pytest
import torch

from opsin import weights
from opsin.families.blip2 import TINY_RETRIEVER
from opsin.nn.connectors import make_connector
from opsin.nn.mask import FULL
from opsin.nn.qformer import Features, QFormerRows, text_mask
from opsin.nn.retriever import Retriever
from opsin.spec.qformer import QFormerConfig
from opsin.weights.init import initialise

CONFIG = QFormerConfig(num_queries=3, dim=16, num_layers=3, num_heads=2, mlp_dim=32, dropout=0.0)
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def rows(config: QFormerConfig = CONFIG) -> QFormerRows:
    connector = make_connector(config, in_dim=8, out_dim=12)
    assert isinstance(connector, QFormerRows)
    initialise(connector, seed=0)
    return connector.eval()


@pytest.fixture(scope="module")
def model() -> Retriever:
    model = weights.build_retriever(TINY_RETRIEVER, seed=1).eval()
    with torch.no_grad():  # so that states differ by more than rounding
        for parameter in model.qformer.parameters():
            parameter.mul_(3)
    return model


def text(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts of 7, 4 and 2 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 4, 2])
    valid = torch.arange(7) < lengths[:, None]
    return torch.randint(1, 300, (3, 7), generator=generator).masked_fill(~valid, 0), valid


def features(seed: int = 0) -> Features:
    return Features(torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(seed)))


def shown(allowed: torch.Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in allowed]


def test_masks_of_matching_and_captions_are_rows_of_the_one_rule() -> None:
    valid = torch.tensor([[True, True, False]])
    both = text_mask(valid, num_queries=2, form="both").allowed
    assert both is not None
    assert shown(both[0, 0]) == ["xxxx.", "xxxx.", "xxxx.", "xxxx.", "....x"]
    causal = text_mask(valid, num_queries=2, form="causal").allowed
    assert causal is not None
    assert shown(causal[0, 0]) == ["xx...", "xx...", "xxx..", "xxxx.", "....x"]


@torch.no_grad()
def test_padding_changes_no_text_and_no_score(model: Retriever) -> None:
    ids, valid = text()
    pictures = features()
    states, logits = model.read(ids, valid), model.match(pictures, ids, valid)
    for row, length in enumerate(valid.sum(1).tolist()):
        alone, ones = ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.bool)
        torch.testing.assert_close(model.read(alone, ones)[0], states[row, :length], **TOLERANCE)
        one = Features(pictures.values[row : row + 1])
        torch.testing.assert_close(model.match(one, alone, ones)[0], logits[row], **TOLERANCE)


@torch.no_grad()
def test_text_sees_a_picture_only_through_the_queries(model: Retriever) -> None:
    """A text by itself has no picture; a caption's only way to it are the keys and values of the queries."""
    ids, valid = text()
    seen, other = model.see(features(1)), model.see(features(2))
    assert not torch.allclose(model.read_caption(seen, ids, valid)[0], model.read_caption(other, ids, valid)[0])
    assert not torch.allclose(model.match(features(1), ids, valid), model.match(features(2), ids, valid))
    torch.testing.assert_close(seen.states, model.see(features(1)).states)


@torch.no_grad()
def test_cached_queries_equal_one_pass_over_both(model: Retriever) -> None:
    """The caption loss runs text over kept keys; the block mask over [queries ; text] gives the same."""
    ids, valid = text()
    pictures = features()
    kept, _ = model.read_caption(model.see(pictures), ids, valid)
    queries = model.queries.expand(3, -1, -1)
    x = torch.cat([queries, model.words(ids) + model.positions(torch.arange(7))], dim=1)
    mask = text_mask(valid, num_queries=6, form="causal")
    whole, _ = model.qformer(x, num_queries=6, features=pictures, mask=mask)
    torch.testing.assert_close(whole[:, 6:][valid], kept[valid], **TOLERANCE)


@torch.no_grad()
def test_a_caption_token_by_token_equals_the_whole(model: Retriever) -> None:
    ids, _ = text()
    ids = ids.clamp_min(1)
    seen = model.see(features())
    whole, _ = model.read_caption(seen, ids, torch.ones_like(ids, dtype=torch.bool))
    state, past = model.read_caption(seen, ids[:, :1], torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(state[:, 0], whole[:, 0], **TOLERANCE)
    for place in range(1, 7):
        step = ids[:, place : place + 1]
        state, past = model.read_caption(seen, step, step.bool(), past=past)
        torch.testing.assert_close(state[:, 0], whole[:, place], **TOLERANCE)


@torch.no_grad()
def test_tiles_of_different_grids_equal_each_alone() -> None:
    """Native resolution: tiles have different numbers of features, and no class token."""
    connector = rows()
    grids = torch.tensor([[1, 2, 3], [1, 4, 4], [1, 1, 2]])
    packed = torch.randn(24, 8, generator=torch.Generator().manual_seed(3))
    together = connector(packed, grids)
    alone = [connector(part, grid[None]) for part, grid in zip(packed.split([6, 16, 2]), grids, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), **TOLERANCE)


@torch.no_grad()
def test_a_class_token_in_front_of_equal_tiles_is_looked_at() -> None:
    connector = rows()
    packed = torch.randn(2 * 5, 8, generator=torch.Generator().manual_seed(4))
    grids = torch.tensor([[1, 2, 2], [1, 2, 2]])
    assert connector(packed, grids).shape == (6, 12)
    packed[5] += 1
    torch.testing.assert_close(connector(packed, grids)[:3], connector(packed[:5], grids[:1]), **TOLERANCE)


def test_queries_look_at_features_in_every_nth_layer_alone() -> None:
    crosses = [layer.cross is not None for layer in rows(CONFIG.replace(num_layers=5, cross_every=2)).qformer.layers]
    assert crosses == [True, False, True, False, True]


def test_dropout_is_for_training_alone() -> None:
    connector = rows(CONFIG.replace(dropout=0.5))
    packed, grids = torch.randn(4, 8), torch.tensor([[1, 2, 2]])
    assert torch.equal(connector(packed, grids), connector(packed, grids))
    connector.train()
    assert not torch.equal(connector(packed, grids), connector(packed, grids))


def test_the_stack_may_stay_in_float32_while_the_rest_is_half() -> None:
    connector = rows()
    connector.norm_features.bfloat16()
    connector.proj.bfloat16()
    given = torch.randn(4, 8).bfloat16()
    assert connector(given, torch.tensor([[1, 2, 2]])).dtype == torch.bfloat16


def test_features_of_one_grid_need_no_mask() -> None:
    assert features().mask is FULL
