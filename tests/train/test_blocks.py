"""Blocks that are computed again or compiled give what they gave before."""

import pytest
import torch

from opsin.nn.mask import CAUSAL
from opsin.train import run, train_stage
from opsin.train.blocks import blocks_of, prepared_blocks
from train.test_runs import log_of
from train.toy import DrawnSource, differing, stage, tensors_of, tiny_model, two_sources, two_stages


@pytest.mark.parametrize("family", ["llava15", "blip2", "qwen2_vl"])
def test_activations_that_are_computed_again_change_no_bit(tmp_path, family):
    found = []
    for activations in ("keep", "recompute"):
        model = tiny_model(tmp_path, family)
        train_stage(
            model.vlm,
            stage(trainable=["vision", "connector", "decoder"]),
            DrawnSource(8),
            tokenizer=model.tokenizer,
            activations=activations,
        )
        found.append(tensors_of(model))
    assert differing(*found) == []


def test_what_blocks_keep_for_the_gradient_becomes_less(tmp_path):
    """Bytes that autograd saves in one pass, of a decoder with many layers."""
    model = tiny_model(tmp_path)
    x = torch.randn(1, 64, model.config.decoder.dim, requires_grad=True)

    def saved_bytes(*, recompute: bool) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.requires_grad or tensor.grad_fn is not None or tensor.numel() > 64:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.vlm.parameters()}
        with (
            prepared_blocks(model.vlm, recompute=recompute, compiled=False),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            out = model.vlm.decoder(x, positions=torch.arange(64)[None, :, None], mask=CAUSAL)
        assert out.requires_grad
        return sum(size for place, size in sizes.items() if place not in weights)

    assert saved_bytes(recompute=True) < saved_bytes(recompute=False) / 4


def test_blocks_are_as_before_when_training_ends(tmp_path):
    model = tiny_model(tmp_path)
    with prepared_blocks(model.vlm, recompute=True, compiled=False):
        assert all("forward" in vars(block) for block in blocks_of(model.vlm))
    assert not any("forward" in vars(block) for block in blocks_of(model.vlm))


def test_a_run_may_change_how_it_keeps_activations_on_the_way(tmp_path):
    class Stop(Exception):
        pass

    def on_row(row):
        if row["stage"] == "second" and row["step"] == 3:
            raise Stop

    straight = run(two_stages(tmp_path / "a"), model=tiny_model(tmp_path), sources=two_sources())
    with pytest.raises(Stop):
        run(two_stages(tmp_path / "b"), model=tiny_model(tmp_path), sources=two_sources(), on_row=on_row)
    config = two_stages(tmp_path / "b", activations="recompute")
    result = run(config, model=tiny_model(tmp_path), sources=two_sources())
    assert differing(tensors_of(result.model), tensors_of(straight.model)) == []


@pytest.mark.slow
def test_compiled_blocks_give_the_same_curve(tmp_path):
    losses = []
    for compiled in (False, True):
        config = two_stages(tmp_path / str(compiled), compile=compiled)
        data = config.model_dump(mode="json")
        for each in data["stages"]:
            each["batch"] = {"samples": 4, "form": "pad"}
            each["optim"] = {"kind": "adamw", "lr": 1e-3}
        run(type(config).parse(data, where="test"), model=tiny_model(tmp_path), sources=two_sources())
        losses.append([row["loss"] for row in log_of(tmp_path / str(compiled))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
