"""What a dry run tells about a run: tokens, FLOPs, memory, time."""

import json
import re
from dataclasses import asdict

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import toys
from opsin.cli.app import run as opsin
from opsin.data.feed import Feed
from opsin.encode import Encoder
from opsin.errors import PlanError
from opsin.spec.recipe import RunConfig
from opsin.train.config import read_run, recipe_names
from opsin.train.estimate import estimate
from opsin.train.loop import StageLoop
from opsin.train.objectives import next_token
from opsin.train.optim import Optimizer
from opsin.train.prepare import describe_model, stage_trainable
from opsin.train.preview import readable
from opsin.train.trainable import set_trainable
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


def test_several_devices_gather_two_blocks_and_hold_whole_what_is_no_block():
    (done,) = estimate(run_config(), "8xA100-80GB")
    vlm = on_meta(describe_model("llava-1.5-7b"))
    block = sum(p.numel() for p in vlm.decoder.layers[0].parameters())
    tower = sum(p.numel() for p in vlm.vision.layers.parameters())
    rest = sum(p.numel() for p in vlm.parameters()) - tower - 32 * block
    frozen = sum(p.numel() for p in vlm.vision.parameters()) - tower
    logits = 2 * 4 * 2**24  # and their gradient
    taught = 4 * CONVERSATION.taught_tokens  # four samples fit a pass of 4,096 tokens
    loss = 4 * (vlm.decoder.head.weight.numel() + taught * 4096)
    assert done.memory.working == 2 * 2 * block + 4 * (2 * rest - frozen) + logits + loss


def test_a_bad_sample_that_the_run_would_leave_out_is_left_out_of_the_estimate(tmp_path):
    folder = toys.tokenizer_folder(tmp_path / "tokenizer")
    toys.picture((40, 30)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "abc"}]
    records = [{"image": f"{'bad' if number == 3 else 'good'}.png", "conversations": turns} for number in range(6)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = {"data": [{"path": str(tmp_path / "data.json")}], "batch": {"samples": 6}}
    (refused,) = estimate(run_config(model="llava-1.5-tiny", tokenizer=str(folder), stage=data))
    assert "bad.png" in refused.problem
    data["bad_samples"] = "skip"
    (done,) = estimate(run_config(model="llava-1.5-tiny", tokenizer=str(folder), stage=data))
    assert (done.problem, done.tokens_from, done.image_tokens) == ("", "estimated from 6 samples", 6 * 9)


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


def test_blocks_are_computed_again_where_the_run_says_so():
    larger = {"batch": {"samples": 64, "micro_tokens": 5120}}
    (kept,) = estimate(run_config(stage=larger), "8xA100-40GB")
    (again,) = estimate(run_config(stage=larger, activations="recompute"), "8xA100-40GB")
    assert (kept.checkpointing, kept.fits) == (False, False)
    assert (again.checkpointing, again.fits) == (True, True)
    assert again.memory == kept.memory
    assert again.flops == kept.flops + kept.again


def test_a_picture_that_leaves_no_room_for_text_is_made_smaller():
    narrow = {"data": [{"path": "nowhere.json"}], "max_tokens": 1000}
    (done,) = estimate(run_config(model="internvl-1.5-2b", stage=narrow))
    assert done.tokens_from.startswith("assumed: a picture of 448x448 px and 350 tokens")
    assert done.image_tokens == 64 * 256
    with pytest.raises(PlanError, match="take 256 tokens, and max_tokens is 200"):
        estimate(run_config(model="internvl-1.5-2b", stage=narrow | {"max_tokens": 200}))


def test_the_update_of_muon_multiplies_too_as_torch_counts(tmp_path):
    only = stage(optim={"kind": "muon", "lr": 1e-3, "rest": {"lr": 1e-3}})
    config = run_config(model="llava-1.5-tiny", stage=only.model_dump())
    vlm = tiny_model(tmp_path).vlm
    trained = set_trainable(vlm, stage_trainable(vlm, vlm.config, only))
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        Optimizer(trained, only.optim).step(1.0)
    (done,) = estimate(config)
    assert done.update == counter.get_total_flops() > 0
    assert done.flops == sum(done.forward.values()) + sum(done.backward.values()) + done.update


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
    trainable = stage_trainable(model.vlm, model.config, only)
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
    # Weights that are made of codes for a product are dropped after it: no copy of them stays.
    decoder = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert adapters.memory.working - few.memory.working == 2 * decoder - 2 * 4096 * 11008


def test_several_devices_share_what_is_kept_between_steps():
    (one,), (eight,) = estimate(run_config(), "H200"), estimate(run_config(), "8xH200")
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(one.memory, part) == pytest.approx(8 * getattr(eight.memory, part), rel=1e-9)
    assert eight.memory.activations == one.memory.activations  # a pass each
    assert eight.flops == one.flops
    assert eight.seconds_per_step == one.seconds_per_step / 8


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_has_an_estimate(name):
    """Without its data; of the time only where the number of samples was published, or that of steps."""
    for done in estimate(read_run(name), "64xH100"):
        assert done.problem
        assert done.flops > 1e12
        assert (done.seconds is None) == (done.steps is None)
        trained = {part for part, _, trained in done.parts if trained}
        assert (done.backward.get("vision", 0) > 0) == ("vision" in trained)
        assert done.memory.gradients == 4 * sum(trained for _, _, trained in done.parts) // 64


def test_the_model_that_compares_pictures_with_texts_has_its_costs_too():
    (done,) = estimate(read_run("blip2/stage1"), "16xA100-40GB")
    assert done.backward["vision"] == 0
    assert done.forward["vision"] == pytest.approx(2 * 1680 * 257 * 0.985e9, rel=0.06)  # 2 N T, and attention
    assert done.steps == 250_000


def test_a_caption_that_is_split_is_read_by_half_and_written_by_half():
    (done,) = estimate(read_run("blip2/stage2-flan-t5"))
    assert (done.tokens, done.image_tokens, done.taught_tokens) == (1520 * 52, 1520 * 32, 1520 * 10)


def test_the_largest_model_is_estimated_without_its_weights():
    config = run_config(model="qwen2-vl-72b")
    (done,) = estimate(config, "64xH100")
    assert {part: total for part, total, _ in done.parts}["decoder"] > 72e9
    layers = on_meta(describe_model(config.model)).decoder.layers
    parameters = sum(p.numel() for p in layers.parameters())
    assert done.backward["decoder"] == pytest.approx(4 * parameters * done.tokens, rel=0.06)


def test_a_dry_run_prints_the_estimate_and_gives_it_to_programs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "llava-1.5/finetune", "--dry-run"]
    assert opsin([*arguments, "--on", "8xA100-80GB"]) == 0
    out = capsys.readouterr().out
    assert "by the published counts: 665,298 samples per epoch, 128 per step: 5,198 steps, 1.00 epochs" in out
    assert re.search(r"^on 8xA100-80GB: .* hours in all, at 40% of 2.5 PFLOP/s", out, re.MULTILINE)
    assert opsin([*arguments, "--on", "8xA100-80GB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (only,) = told["stages"]
    (done,) = estimate(read_run("llava-1.5/finetune"), "8xA100-80GB")
    assert (only["flops"], only["seconds"], only["memory"]) == (done.flops, done.seconds, asdict(done.memory))
    assert told["config"]["stages"][0]["name"] == only["stage"] == "finetune"


def test_a_machine_without_a_dry_run_is_refused(capsys):
    assert opsin(["train", "llava-1.5/finetune", "--on", "H100"]) == 2
    assert "--on and --json belong to --dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "machine", "help"),
    [
        ("llava-1.5/finetune", "8xA100-40GB", r"set activations=recompute \(\d\d\.\d\d GiB\);"),
        ("llava-1.5/finetune", "RTX4090", "take more devices, or train less;"),
        ("internvl-1.5/finetune-26b", "64xRTX4090", "take more devices, or lower batch.micro_tokens;"),
    ],
)
def test_a_device_that_is_too_small_is_told_with_what_would_help(recipe, machine, help, capsys):
    assert opsin(["train", recipe, "--dry-run", "--on", machine]) == 0
    assert re.search(f"which does NOT fit: {help}", capsys.readouterr().out)


def test_times_are_written_for_people():
    assert [readable(seconds) for seconds in (59, 7199, 25200, 6 * 86400)] == [
        "0:59",
        "1:59:59",
        "7.0 hours",
        "6.0 days",
    ]
