"""Optimizer groups, learning rates and optimizer state."""

import math
from itertools import pairwise

import pytest
import torch

from opsin.errors import ConfigError, TrainError
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
