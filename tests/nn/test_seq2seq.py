"""FlanT5's parts against transformers', and the numbers of its relative positions."""

import pytest
import torch

from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.seq2seq import RelativePositions, Seq2Seq
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.weights.init import initialise

CONFIG = Seq2SeqConfig(
    vocab_size=50, dim=24, num_encoder_layers=2, num_layers=3, num_heads=4, head_dim=8, mlp_dim=40, max_positions=400
)


def model(config: Seq2SeqConfig = CONFIG) -> Seq2Seq:
    model = Seq2Seq(config)
    initialise(model, seed=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(8)
    return model.eval()


def batch(ids: torch.Tensor, encoder_length: int) -> Batch:
    documents = tuple((row, 0, ids.shape[1]) for row in range(len(ids)))
    positions = torch.zeros(*ids.shape, 1, dtype=torch.int64)
    return Batch(ids, positions, documents, encoder_lengths=(encoder_length,) * len(ids))


def test_near_distances_are_told_apart_and_far_ones_grouped() -> None:
    """Checked by hand: 32 rows, 16 for each direction of which 8 are single; beyond 128 all is one."""
    both = RelativePositions(CONFIG, both_ways=True)
    distances = torch.tensor([0, -1, 1, -7, 7, -8, 8, -127, 127, -500, 500])
    assert both.buckets(distances).tolist() == [0, 1, 17, 7, 23, 8, 24, 15, 31, 15, 31]
    back = RelativePositions(CONFIG, both_ways=False)
    assert back.buckets(torch.tensor([0, -1, -15, -16, -127, -128, -999, 5])).tolist() == [0, 1, 15, 16, 31, 31, 31, 0]


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@torch.no_grad()
def test_states_are_those_of_transformers(activation: str) -> None:
    """Long enough that distances beyond the last single bucket occur on both sides."""
    transformers = pytest.importorskip("transformers")
    from opsin.families._blip2_layouts import _t5_rules
    from opsin.spec.rules import Layout
    from opsin.weights.exporter import to_layout

    config = CONFIG.replace(activation=activation)
    ours = model(config)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=50,
            d_model=24,
            d_kv=8,
            d_ff=40,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dense_act_fn="gelu" if activation == "gelu" else "gelu_new",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    ).eval()
    state = {f"decoder.{name}": tensor for name, tensor in ours.state_dict().items()}
    named = to_layout(state, Layout(name="t5", rules=_t5_rules(config, "")))
    for stack in ("encoder", "decoder"):
        named[f"{stack}.embed_tokens.weight"] = named["shared.weight"]
    theirs.lm_head.weight = torch.nn.Parameter(torch.empty(50, 24))  # transformers 5 ties it whatever the config says
    theirs.load_state_dict(named)
    generator = torch.Generator().manual_seed(0)
    read = torch.randint(1, 50, (2, 150), generator=generator)
    written = torch.randint(1, 50, (2, 140), generator=generator)
    recorded = theirs(input_ids=read, decoder_input_ids=written)
    ids = torch.cat([read, written], dim=1)
    hidden = ours(ours.embed(ids), batch=batch(ids, 150))
    torch.testing.assert_close(hidden[:, :150], recorded.encoder_last_hidden_state, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.logits(hidden[:, 150:]), recorded.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_of_a_cache_are_kept_chosen_and_forgotten_as_a_whole() -> None:
    ours = model()
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = KVCache(CONFIG, batch_size=2, capacity=1, dtype=torch.float32)
    first = ours(ours.embed(ids), batch=batch(ids, 6), cache=cache)
    assert (cache.lengths, cache.stored) == ([9, 9], [3, 3])
    cache.select([1, 1, 0])
    assert cache.memory is not None
    assert cache.memory.lengths == [6, 6, 6]
    step = torch.tensor([[7], [7], [7]])
    hidden = ours(ours.embed(step), batch=Batch(step, step[..., None], tuple((r, 0, 1) for r in range(3))), cache=cache)
    torch.testing.assert_close(hidden[0], hidden[1])
    whole = torch.cat([ids, step[:2]], dim=1)
    torch.testing.assert_close(
        ours(ours.embed(whole), batch=batch(whole, 6))[:, -1], hidden[[2, 0], 0], atol=2e-5, rtol=1e-4
    )
    cache.truncate([7, 7, 7])
    assert cache.stored == [1, 1, 1]
    cache.truncate([6, 6, 6])
    assert cache.memory is not None, "what the encoder has read may stay as a whole"
    cache.truncate([5, 6, 6])
    assert (cache.memory, cache.lengths) == (None, [0, 0, 0])
    again = KVCache(CONFIG, batch_size=2, capacity=1, dtype=torch.float32)
    torch.testing.assert_close(ours(ours.embed(ids), batch=batch(ids, 6), cache=again), first)
