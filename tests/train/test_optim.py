"""Optimizer groups, learning rates and optimizer state."""

import math
from itertools import pairwise

import pytest
import torch

from opsin import weights
from opsin.errors import ConfigError, TrainError
from opsin.families.blip2 import TINY_RETRIEVER
from opsin.spec.recipe import AdamW, Muon, Schedule
from opsin.train.optim import Optimizer, make_groups, rate_factor
from opsin.train.trainable import choose, set_trainable
from train.toy import stage, tiny_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("model"))
    return set_trainable(model.vlm, choose(model.vlm, ["vision", "connector", "decoder"], idle={}))


def test_the_rate_rises_over_the_warm_up_and_falls_as_half_a_cosine():
    """The numbers of transformers' get_cosine_schedule_with_warmup for 100 steps and warmup_ratio 0.03."""
    schedule = Schedule()
    factors = [rate_factor(schedule, step, 100) for step in range(100)]
    assert factors[:4] == [0, 1 / 3, 2 / 3, 1]
    assert factors[51] == pytest.approx(0.5 * (1 + math.cos(math.pi * 48 / 97)))
    assert all(a > b for a, b in pairwise(factors[3:]))
    assert factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 96 / 97)))


def test_the_schedule_equals_transformers():
    transformers = pytest.importorskip("transformers")
    for num_steps, ratio in ((1, 0.03), (7, 0.5), (40, 0.03), (100, 0.0), (3, 1.0)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(num_steps * ratio), num_steps)
        for step in range(num_steps):
            own = rate_factor(Schedule(warmup_ratio=ratio), step, num_steps)
            assert own == pytest.approx(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()


def test_a_number_of_steps_and_a_constant_rate():
    schedule = Schedule(kind="constant", warmup_steps=2)
    assert [rate_factor(schedule, step, 5) for step in range(5)] == [0, 0.5, 1, 1, 1]


def test_a_cosine_ends_at_its_least_rate_and_a_warm_up_begins_at_its_own():
    """Qwen-VL's first stage: 2e-4 down to 1e-6; BLIP-2's warm-up begins at 1e-6."""
    schedule = Schedule(warmup_steps=500, min_lr=1e-6)
    rates = [2e-4 * rate_factor(schedule, step, 50_000, lr=2e-4) for step in (0, 250, 500, 25_250, 50_000)]
    assert rates == pytest.approx([0, 1e-4, 2e-4, (2e-4 + 1e-6) / 2, 1e-6])
    schedule = Schedule(warmup_steps=2000, warmup_start_lr=1e-6, min_lr=1e-5)
    rates = [1e-4 * rate_factor(schedule, step, 250_000, lr=1e-4) for step in (0, 1000, 2000, 250_000)]
    assert rates == pytest.approx([1e-6, 50.5e-6, 1e-4, 1e-5])


def test_a_cosine_of_epochs_moves_between_epochs_and_warms_up_in_the_first_only():
    """LAVIS' linear_warmup_cosine_lr: cosine of epoch / epochs; 5 epochs of 4 steps."""

    def factors(warmup: int) -> list[float]:
        schedule = Schedule(kind="cosine_of_epochs", warmup_steps=warmup)
        return [rate_factor(schedule, step, 20, lr=1e-5, steps_per_epoch=4) for step in range(20)]

    epochs = [0.5 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(5)]
    assert factors(2) == pytest.approx([0, 0.5, 1, 1, *(value for value in epochs[1:] for _ in range(4))])
    assert factors(9)[:5] == pytest.approx([0, 1 / 9, 2 / 9, 3 / 9, epochs[1]])


def test_rates_of_a_schedule_above_the_peak_are_refused():
    with pytest.raises(ConfigError, match=r"schedule.min_lr 0.01 is above optim.lr 0.001"):
        stage(schedule={"min_lr": 0.01})


def test_layers_learn_the_slower_the_further_they_are_from_the_output(trained):
    """With n layers: decay ** (n - i) for layer i, one more for patches and positions; other parts as they are."""
    config = AdamW(lr=1e-4, part_lr={"vision": 2e-5}, layer_decay={"vision": 0.5})
    optimizer = Optimizer(trained, config)
    used = {}
    for settings in optimizer._optimizers["adamw"].param_groups:
        used |= {id(parameter): settings["lr"] for parameter in settings["params"]}
    rates = {name: used[id(parameter)] for name, parameter in trained.items()}
    count = 1 + max(int(name.split(".")[2]) for name in trained if name.startswith("vision.layers."))
    for name, rate in rates.items():
        if not name.startswith("vision."):
            assert rate == 1e-4
        elif name.startswith("vision.layers."):
            assert rate == pytest.approx(2e-5 * 0.5 ** (count - int(name.split(".")[2])))
        elif name.split(".")[1] in ("patch", "class_token", "positions", "norm_pre"):
            assert rate == pytest.approx(2e-5 * 0.5 ** (count + 1))
        else:
            assert rate == 2e-5
    assert optimizer.rates(1.0) == {"vision": 2e-5, "connector": 1e-4, "decoder": 1e-4}
    with pytest.raises(ConfigError, match=r"layer_decay names 'decoder.norm', but no layer of it trains"):
        make_groups(trained, AdamW(lr=1e-4, layer_decay={"decoder.norm": 0.5}))


def test_vectors_are_not_decayed_and_parts_have_their_own_rates(trained):
    groups = make_groups(trained, AdamW(lr=2e-5, part_lr={"vision": 2e-6}, weight_decay=0.1))
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(trained)
    for group in groups:
        assert all((trained[name].ndim >= 2) == group.decay for name in group.names)
        assert all(name.startswith("vision.") == (group.lr == 2e-6) for name in group.names)
    optimizer = Optimizer(trained, AdamW(lr=2e-5, part_lr={"vision": 2e-6}, weight_decay=0.1))
    assert optimizer.rates(0.5) == {"vision": 1e-6, "connector": 1e-5, "decoder": 1e-5}


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw(trained):
    config = Muon(lr=0.02, rest=AdamW(lr=1e-3, part_lr={"decoder.head": 1e-4}))
    groups = make_groups(trained, config)
    by_name = {name: group for group in groups for name in group.names}
    for name, parameter in trained.items():
        outer = name in ("decoder.embed.weight", "decoder.head.weight", "vision.patch.weight", "vision.positions")
        assert (by_name[name].algorithm == "muon") == (parameter.ndim == 2 and not outer), name
    assert by_name["decoder.head.weight"].lr == 1e-4
    assert {group.label for group in groups} == {
        "vision", "vision/muon", "connector", "connector/muon", "decoder", "decoder/muon", "decoder.head",
    }  # fmt: skip


def test_muon_leaves_words_places_and_queries_to_adamw():
    """BLIP-2's stage 1 has tables besides the decoder's and the tower's."""
    retriever = weights.build_retriever(TINY_RETRIEVER)
    trained = dict(retriever.named_parameters())
    groups = make_groups(trained, Muon(lr=0.02, rest=AdamW(lr=1e-3)))
    kept = {name for group in groups if group.algorithm == "adamw" for name in group.names}
    tables = {"queries", "words.weight", "positions.weight", "vision.positions", "vision.patch.weight"}
    assert {name for name in kept if trained[name].ndim == 2} == tables


def test_a_rate_for_a_part_that_does_not_train_is_an_error(trained):
    with pytest.raises(ConfigError, match="part_lr names 'newline', but no tensor that adamw trains"):
        make_groups(trained, AdamW(lr=1e-3, part_lr={"newline": 1e-4}))
    with pytest.raises(ConfigError, match=r"part_lr names 'decoder.head', but no tensor that muon trains"):
        make_groups(trained, Muon(lr=1e-3, part_lr={"decoder.head": 1e-4}, rest=AdamW(lr=1e-3)))


@pytest.mark.parametrize("config", [AdamW(lr=1e-2, weight_decay=0.1), Muon(lr=1e-2, rest=AdamW(lr=1e-3))])
def test_saved_state_goes_on_to_the_same_bits(config):
    def start() -> dict[str, torch.nn.Parameter]:
        torch.manual_seed(0)
        return {"decoder.a": torch.nn.Parameter(torch.randn(6, 4)), "decoder.b": torch.nn.Parameter(torch.randn(4))}

    def steps(optimizer: Optimizer, numbers: range) -> None:
        for number in numbers:
            for index, parameter in enumerate(optimizer.trained.values()):
                generator = torch.Generator().manual_seed(10 * number + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step(1 / (1 + number))

    straight = Optimizer(start(), config)
    steps(straight, range(6))
    first = Optimizer(start(), config)
    steps(first, range(3))
    state = {key: value.clone() for key, value in first.state().items()}
    again = Optimizer({name: torch.nn.Parameter(p.detach().clone()) for name, p in first.trained.items()}, config)
    again.load_state(state)
    steps(again, range(3, 6))
    assert all(torch.equal(again.trained[name], value) for name, value in straight.trained.items())
    assert all(torch.equal(again.state()[key], value) for key, value in straight.state().items())


def test_state_of_other_tensors_is_refused(trained):
    optimizer = Optimizer(trained, stage().optim)
    with pytest.raises(TrainError, match="saved optimizer state is of other tensors"):
        optimizer.load_state({"exp_avg/decoder.norm.weight": torch.zeros(48)})
