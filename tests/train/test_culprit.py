"""A number that is not finite stops the run before the update, and what first made it is named."""

import numpy as np
import pytest
import torch

from opsin import weights
from opsin.errors import TrainError
from opsin.train.loop import StageLoop
from opsin.train.objectives import Loss, next_token
from opsin.train.prepare import prepare_stage
from train.toy import DrawnSource, stage, tiny_model

STEPS, SAMPLES = 3, 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def loop_of(tiny, objective=next_token, **changes) -> StageLoop:
    vlm = weights.build(tiny.config, seed=1)
    one = stage(batch={"samples": SAMPLES, "micro_samples": 1}, steps=STEPS, **changes)
    source = DrawnSource(STEPS * SAMPLES, with_text=False)
    prepared = prepare_stage(one, module=vlm, model=tiny.config, tokenizer=tiny.tokenizer, seed=0, source=source)
    return StageLoop(vlm, prepared.feed, trainable=prepared.trainable, objective=objective)


def name_of(loop: StageLoop, step: int, place: int) -> str:
    return loop.feed.load(*loop.feed.step_samples(step)[place]).name


def message_of(loop: StageLoop, step: int) -> str:
    """The error of a step, from 0, before which nothing may go wrong, and at which nothing may change."""
    rows = loop.rows()
    for _ in range(step):
        next(rows)
    hooks = hooks_of(loop)
    before = {name: value.clone() for name, value in loop.module.state_dict().items()}
    averages = {name: value.clone() for name, value in loop.optimizer.state().items()}
    with pytest.raises(TrainError) as raised:
        next(rows)
    # Compared as integers: the weight that a test spoils is no number.
    after = loop.module.state_dict()
    assert all(torch.equal(value.view(torch.int32), after[name].view(torch.int32)) for name, value in before.items())
    assert all(torch.equal(value, loop.optimizer.state()[name]) for name, value in averages.items())
    assert hooks_of(loop) == hooks
    assert f"step {step + 1}: " in str(raised.value)
    assert "Nothing was updated." in str(raised.value)
    return str(raised.value)


def hooks_of(loop: StageLoop) -> int:
    return sum(len(module._forward_hooks) for module in loop.module.modules())


def spoil(loop: StageLoop, module: str, guilty: str, change) -> None:
    """In the passes of one sample, a module's output is replaced."""
    current = ""
    objective = loop.objective

    def remember(vlm, batch):
        nonlocal current
        (current,) = batch.names
        return objective(vlm, batch)

    loop.objective = remember
    place = loop.module.get_submodule(module)
    place.register_forward_hook(lambda _, inputs, output: change(output) if current == guilty else None)


# The first step; one in the middle; the last micro-batch of the last.
PLACES = [(0, 0), (1, 2), (STEPS - 1, SAMPLES - 1)]


@pytest.mark.parametrize(("step", "place"), PLACES)
def test_the_first_module_is_named_with_step_and_sample(tiny, step, place):
    loop = loop_of(tiny)
    guilty = name_of(loop, step, place)
    spoil(loop, "decoder.layers.1.mlp.up", guilty, lambda output: output * float("nan"))
    message = message_of(loop, step)
    assert f"Samples of the passes concerned: {guilty!r}." in message
    assert "Computed once more: the first output that is not finite is that of 'decoder.layers.1.mlp.up'." in message


@pytest.mark.parametrize(("step", "place"), PLACES)
def test_a_gradient_that_overflows_is_traced_to_the_output_it_is_of(tiny, step, place):
    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    loop = loop_of(tiny)
    guilty = name_of(loop, step, place)
    spoil(loop, "decoder.layers.0.attn", guilty, Explode.apply)
    message = message_of(loop, step)
    assert f"Samples of the passes concerned: {guilty!r}." in message
    assert "outputs are finite; the first bad one of their gradients is that of 'decoder.layers.0.attn.out'." in message
    assert "Tensors whose gradient is not finite: 'connector" in message


def test_pixels_that_are_not_finite_are_told_apart_from_the_tower(tiny):
    loop = loop_of(tiny)
    guilty = name_of(loop, 0, 1)
    encode = loop.feed.encode

    def spoiled(conversation, **options):
        sample = encode(conversation, **options)
        if sample.name == guilty:
            sample.images[0].patches[3, 0] = np.nan
        return sample

    loop.feed.encode = spoiled
    message = message_of(loop, 0)
    assert f"Samples of the passes concerned: {guilty!r}." in message
    assert "the pixels that go in are not finite" in message


def test_a_weight_that_is_not_finite_is_named(tiny):
    for name, told in (
        ("decoder.layers.0.norm2.weight", "that of 'decoder.layers.0.norm2', and its tensor 'weight'"),
        ("decoder.head.weight", "the loss is not, and its tensor 'decoder.head.weight'"),
    ):
        loop = loop_of(tiny)
        with torch.no_grad():
            loop.module.get_parameter(name)[0] = float("inf")
        assert f"{told} is not finite itself" in message_of(loop, 0)


def test_a_step_that_is_well_is_computed_once(tiny):
    calls = []

    def objective(vlm, batch):
        assert hooks_of(loop) == 0
        calls.append(batch.names)
        return next_token(vlm, batch)

    loop = loop_of(tiny, objective)
    list(loop.rows())
    assert len(calls) == STEPS * SAMPLES


def test_a_failure_that_random_numbers_bring_about_happens_again(tiny):
    def objective(vlm, batch):
        loss = next_token(vlm, batch)
        return Loss(loss.total / (torch.rand(()) > 0.3), loss.count)

    loop = loop_of(tiny, objective)
    with pytest.raises(TrainError, match="outputs of modules are finite, the loss is not") as raised:
        list(loop.rows())
    assert "Samples of the passes concerned: 'picture " in str(raised.value)
