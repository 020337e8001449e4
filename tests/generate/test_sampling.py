"""From logits to ids: the arithmetic, against formulas written out and against transformers."""

import itertools

import pytest
import torch

from opsin.errors import GenerationError
from opsin.generate.sampling import Randomness, Sampling, draw, penalise, probabilities, sample


def logits(rows: int = 4, size: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    x = logits()
    # Float32 softmax of 50 numbers: errors of a few units in the seventh digit.
    torch.testing.assert_close(probabilities(x, temperature=temperature), torch.softmax(x / temperature, -1))


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-45])
def test_towards_temperature_0_everything_goes_to_the_likeliest(temperature):
    x = logits()
    shares = probabilities(x, temperature=temperature)
    assert torch.equal(shares, torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).float())
    greedy = sample(x, Sampling())
    for uniform in (0.0, 0.5, 1 - 2**-53):
        drawn = sample(x, Sampling(temperature=temperature), uniform=torch.full((4,), uniform, dtype=torch.float64))
        assert torch.equal(drawn, greedy)


def test_top_k_keeps_k_and_those_as_likely_as_the_last():
    x = torch.tensor([[3.0, 1.0, 2.0, 1.0, 0.0]])
    assert (probabilities(x, temperature=1, top_k=2) > 0).tolist() == [[True, False, True, False, False]]
    assert (probabilities(x, temperature=1, top_k=3) > 0).tolist() == [[True, True, True, True, False]]
    assert (probabilities(x, temperature=1, top_k=99) > 0).all()


def test_top_p_keeps_the_fewest_that_hold_the_share():
    shares = torch.tensor([[0.5, 0.1, 0.3, 0.06, 0.04]])

    def kept(p: float) -> list[int]:
        return (probabilities(shares.log(), temperature=1, top_p=p) > 0).nonzero()[:, 1].tolist()

    assert kept(0.01) == [0]
    assert kept(0.49) == [0]
    assert kept(0.6) == [0, 2]
    assert kept(0.85) == [0, 1, 2]
    assert kept(1.0) == [0, 1, 2, 3, 4]


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_ids():
    x = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise(x, seen, 4.0).tolist() == [[0.5, -8.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    ("penalty", "temperature", "top_k", "top_p"),
    list(itertools.product([1.0, 1.3, 0.8], [0.5, 1.0, 1.7], [None, 1, 7], [None, 0.3, 0.95])),
)
def test_settings_mean_what_they_mean_in_transformers(penalty, temperature, top_k, top_p):
    process = pytest.importorskip("transformers.generation.logits_process")
    x, ids = logits(3, 200), torch.randint(0, 200, (3, 30), generator=torch.Generator().manual_seed(1))
    processors = process.LogitsProcessorList([process.RepetitionPenaltyLogitsProcessor(penalty)])
    processors.append(process.TemperatureLogitsWarper(temperature))
    if top_k is not None:
        processors.append(process.TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(process.TopPLogitsWarper(top_p))
    expected = processors(ids, x.clone()).softmax(-1)
    seen = torch.zeros(3, 200, dtype=torch.bool).scatter_(1, ids, True)
    found = probabilities(penalise(x, seen, penalty), temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)


def test_draws_follow_the_probabilities():
    shares = probabilities(logits(1, 8), temperature=2.0)
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = draw(shares.expand(len(uniform), -1), uniform).bincount(minlength=8)
    # Counts of 200,000 draws lie within 4 standard deviations, at most 4 * sqrt(0.25 / 200000) = 0.0045.
    assert (counts / len(uniform) - shares[0]).abs().max() < 0.0045


def test_what_was_cut_is_never_drawn():
    shares = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for uniform, expected in ((0.0, 1), (0.29, 1), (0.31, 3), (1 - 2**-53, 3)):
        assert draw(shares, torch.tensor([uniform], dtype=torch.float64)).item() == expected


def test_random_numbers_of_a_sequence_do_not_depend_on_its_batch_mates():
    alone, together = Randomness(7, [2]), Randomness(7, [0, 1, 2, 3])
    for rows in ([0, 1, 2, 3], [0, 2], [2, 3]):  # mates come to an end in between
        assert alone.uniform([0]).item() == together.uniform(rows)[rows.index(2)].item()
    assert Randomness(7, [0]).uniform([0]) != Randomness(8, [0]).uniform([0])
    assert Randomness(None, [0]).uniform([0]) != Randomness(None, [0]).uniform([0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"num_sequences": 0}, "num_sequences is 0"),
        ({"num_sequences": 2}, "num_sequences 2 would give the same answer at temperature 0"),
        ({"top_p": 0.9}, "top_p has no effect at temperature 0"),
        ({"top_k": 9}, "top_k has no effect at temperature 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop_strings": ("",)}, "0 characters"),
        ({"stop_strings": ("x" * 257,)}, "257 characters"),
        ({"stop_strings": ("x",) * 17}, "17 stop strings"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(GenerationError, match=message):
        Sampling(**settings)


def test_greedy_settings_that_change_nothing_are_accepted():
    Sampling(seed=3, top_p=1.0)
