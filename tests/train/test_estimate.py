"""What a dry run tells about a run: tokens, FLOPs, memory, time."""

import json
import re
from dataclasses import asdict

import pytest

from opsin.cli.app import run as opsin
from opsin.data.feed import Feed
from opsin.encode import Encoder
from opsin.spec.recipe import RunConfig
from opsin.train.config import read_run
from opsin.train.estimate import estimate
from opsin.train.loop import StageLoop
from opsin.train.objectives import next_token
from opsin.train.prepare import describe_model
from opsin.train.preview import readable
from opsin.train.trainable import choose, idle_tensors
from opsin.train.workload import CONVERSATION, Typical
from opsin.weights.init import on_meta
from train.toy import DrawnSource, stage, tiny_model


def run_config(**changes) -> RunConfig:
    """A run without data here, of a model of published size."""
    only = {
        "name": "only",
        "trainable": ["connector", "decoder"],
        "data": [{"path": "nowhere.json", "count": 1000}],
        "batch": {"samples": 64, "micro_tokens": 4096},
        "optim": {"kind": "adamw", "lr": 1e-5},
        "epochs": 2,
    }
    only |= changes.pop("stage", {})
    data = {"model": "llava-1.5-7b", "output": "out", "precision": "bfloat16", "stages": [only], **changes}
    return RunConfig.parse(data, where="test")


def test_where_the_data_is_not_here_published_counts_and_a_typical_sample_stand_for_it():
    (done,) = estimate(run_config(), "8xA100-80GB")
    assert (done.epoch_samples, done.samples, done.steps) == (1000, 64, 32)
    assert done.image_tokens == 64 * 576
    assert done.tokens == 64 * (576 + CONVERSATION.text_tokens)
    assert done.taught_tokens == 64 * CONVERSATION.taught_tokens
    assert done.tokens_from.startswith("assumed: the published number of samples, each with a picture of 640x480 px")
    assert "nowhere.json cannot be read" in done.problem


def test_repeats_and_limits_count_and_an_unknown_file_leaves_steps_open():
    files = [{"path": "a.json", "count": 1000, "limit": 400, "repeat": 2.5}, {"path": "b.json", "count": 24}]
    (done,) = estimate(run_config(stage={"data": files}))
    assert (done.epoch_samples, done.steps) == (1024, 32)
    (open_end,) = estimate(run_config(stage={"data": [*files, {"path": "c.json"}]}), "H100")
    assert (open_end.steps, open_end.seconds) == (None, None)
    assert open_end.seconds_per_step > 0
    (told,) = estimate(run_config(stage={"data": [{"path": "c.json"}], "steps": 7}), "H100")
    assert told.seconds == 7 * told.seconds_per_step


def test_a_sample_is_cut_at_the_limit_of_the_stage():
    (done,) = estimate(run_config(stage={"max_tokens": 600}), typical=Typical(5000, 4000, picture=(640, 480)))
    assert done.tokens == 64 * 600
    (text,) = estimate(run_config(), typical=Typical(100, 50, picture=None))
    assert (text.image_tokens, text.tokens, text.forward.get("vision", 0)) == (0, 6400, 0)


def test_time_is_flops_by_peak_and_share():
    (done,) = estimate(run_config(), "8xA100-80GB@0.5")
    assert done.seconds_per_step == pytest.approx(done.flops / (8 * 312e12 * 0.5))
    assert done.flops == sum(done.forward.values()) + sum(done.backward.values())
    (again,) = estimate(run_config(), "8xA100-80GB@0.5", checkpointing=True)
    assert again.flops == done.flops + done.again
    # A machine larger than the batch stands idle in part.
    (many,) = estimate(run_config(stage={"batch": {"samples": 4}}), "8xA100-80GB")
    (few,) = estimate(run_config(stage={"batch": {"samples": 4}}), "4xA100-80GB")
    assert many.seconds == few.seconds


def test_blocks_are_computed_again_only_where_a_device_is_too_small_otherwise():
    roomy, tight, small = (estimate(run_config(), name)[0] for name in ("8xH200", "8xA100-40GB", "8xRTX4090"))
    assert (roomy.checkpointing, roomy.fits) == (False, True)
    assert (tight.checkpointing, tight.fits) == (True, True)
    assert tight.memory == roomy.memory
    assert (small.checkpointing, small.fits) == (True, True)
    (alone,) = estimate(run_config(), "RTX4090")
    assert (alone.checkpointing, alone.fits) == (True, False)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_memory_of_weights_gradients_and_optimizer_is_that_of_a_run(tmp_path, optim):
    """To the byte, but for the optimizer's counts of its steps."""
    model = tiny_model(tmp_path)
    settings = {"adamw": {"kind": "adamw", "lr": 1e-3}, "muon": {"kind": "muon", "lr": 1e-3, "rest": {"lr": 1e-3}}}
    only = stage(optim=settings[optim], steps=1)
    config = run_config(model="llava-1.5-tiny", precision="float32", stage=only.model_dump())
    encoder = Encoder(model.config, model.tokenizer)
    feed = Feed(
        DrawnSource(8), only, encode=lambda sample: encoder.encode(sample, mode="train"), max_tokens=512, seed=0
    )
    trainable = choose(model.vlm, only.trainable, idle=idle_tensors(model.vlm, model.config))
    gradients = []

    def objective(vlm, batch):
        gradients[:] = [p for p in vlm.parameters() if p.requires_grad]
        return next_token(vlm, batch)

    loop = StageLoop(model.vlm, feed, trainable=trainable, objective=objective)
    list(loop.rows())
    memory = estimate(config)[0].memory
    assert memory.weights == sum(p.nbytes for p in model.vlm.parameters())
    assert memory.gradients == sum(p.nbytes for p in gradients)
    states = [state for each in loop.optimizer._optimizers.values() for state in each.state.values()]
    assert memory.optimizer == sum(t.nbytes for state in states for name, t in state.items() if name != "step")


def test_adapters_and_few_bits_are_reckoned_with():
    """LLaVA-1.5-7B: 319,815,680 numbers at rank 128; the frozen linear layers in 4.25 bits."""
    whole, adapters, few = (
        estimate(read_run(name, overrides))[0]
        for name, overrides in (
            ("llava-1.5/finetune", ()),
            ("llava-1.5/finetune-lora", ()),
            ("llava-1.5/finetune-lora", ("quantize=nf4",)),
        )
    )
    assert adapters.parts[-1] == ("decoder", 6_738_415_616 + 319_815_680, 319_815_680)
    assert adapters.memory.gradients == 4 * (319_815_680 + 20_979_712)
    assert adapters.memory.optimizer == 2 * adapters.memory.gradients
    assert 0.6 < adapters.flops / whole.flops < 0.8
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 24 * (4 * 1024**2 + 2 * 1024 * 4096)
    assert adapters.memory.weights - few.memory.weights == round((4 - 4.25 / 8) * layers)


def test_several_devices_share_what_is_kept_between_steps():
    (one,), (eight,) = estimate(run_config(), "H200"), estimate(run_config(), "8xH200")
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(one.memory, part) == pytest.approx(8 * getattr(eight.memory, part), rel=1e-9)
    assert eight.memory.activations == one.memory.activations  # a pass each
    assert eight.flops == one.flops
    assert eight.seconds_per_step == one.seconds_per_step / 8


def test_the_model_that_compares_pictures_with_texts_has_its_costs_too():
    parts = ["norm_features", "queries", "qformer", "words", "positions", "vision_proj", "text_proj", "itm_head"]
    changes = {"trainable": [*parts, "captions", "temperature"], "batch": {"samples": 100, "form": "pad"}, "steps": 10}
    changes["objective"] = "blip2_stage1"
    (done,) = estimate(run_config(model="blip2-stage1-vit-g", stage=changes), "16xA100-40GB")
    assert done.backward["vision"] == 0
    assert done.forward["vision"] == pytest.approx(2 * 100 * 257 * 0.985e9, rel=0.06)  # 2 N T, and attention
    assert done.steps == 10


def test_the_largest_model_is_estimated_without_its_weights():
    config = run_config(model="qwen2-vl-72b")
    (done,) = estimate(config, "64xH100")
    assert {part: total for part, total, _ in done.parts}["decoder"] > 72e9
    layers = on_meta(describe_model(config.model)).decoder.layers
    parameters = sum(p.numel() for p in layers.parameters())
    assert done.backward["decoder"] == pytest.approx(4 * parameters * done.tokens, rel=0.06)


def test_a_dry_run_prints_the_estimate_and_gives_it_to_programs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "llava-1.5/finetune", "--dry-run", "stages.0.data.0.count=665298"]
    assert opsin([*arguments, "--on", "8xA100-80GB"]) == 0
    out = capsys.readouterr().out
    assert "665,298 samples per epoch, 128 per step: 5,198 steps, 1.00 epochs" in out
    assert re.search(r"^on 8xA100-80GB: .* hours in all, at 40% of 2.5 PFLOP/s", out, re.MULTILINE)
    assert opsin([*arguments, "--on", "8xA100-80GB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (only,) = told["stages"]
    (done,) = estimate(read_run("llava-1.5/finetune", ["stages.0.data.0.count=665298"]), "8xA100-80GB")
    assert (only["flops"], only["seconds"], only["memory"]) == (done.flops, done.seconds, asdict(done.memory))
    assert told["config"]["stages"][0]["name"] == only["stage"] == "finetune"


def test_a_machine_without_a_dry_run_is_refused(capsys):
    assert opsin(["train", "llava-1.5/finetune", "--on", "H100"]) == 2
    assert "--on and --json belong to --dry-run" in capsys.readouterr().err


def test_one_device_too_small_is_told(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert opsin(["train", "llava-1.5/finetune", "--dry-run", "--on", "RTX4090"]) == 0
    assert "does NOT fit: take more devices, or a smaller batch.micro_tokens" in capsys.readouterr().out


def test_times_are_written_for_people():
    assert [readable(seconds) for seconds in (59, 7199, 25200, 6 * 86400)] == [
        "0:59",
        "1:59:59",
        "7.0 hours",
        "6.0 days",
    ]
