"""Stages that train adapters: what trains, what is left behind, going on to the same bits."""

import json
from pathlib import Path

import pytest
import torch

from opsin import weights
from opsin.errors import ConfigError
from opsin.nn.lora import adapted, attach, find_targets, merge
from opsin.spec.lora import Lora
from opsin.spec.recipe import RunConfig
from opsin.train import run, train_stage
from opsin.train.checkpoint import CheckpointStore
from opsin.train.trainable import choose, idle_tensors
from train.test_runs import Crash, crash_after, log_of, optimizer_of
from train.toy import DrawnSource, differing, stage, tensors_of, tiny_model, two_sources, two_stages

LORA = {"rank": 4, "alpha": 8, "dropout": 0.25}


def three_stages(output: Path, **changes) -> RunConfig:
    """Connector alone; adapters in decoder and tower, connector as a whole; the decoder: 4 + 6 + 3 steps."""
    data = two_stages(output).model_dump(mode="json")
    first, second = data["stages"]
    adapters = {
        **second,
        "name": "adapters",
        "trainable": ["connector"],
        "lora": {**LORA, "targets": ["decoder", "vision.layers.*.attn.*"]},
        "optim": {"kind": "adamw", "lr": 1e-2},
        "steps": 6,
    }
    last = {**second, "name": "last", "trainable": ["decoder"], "steps": 3}
    return RunConfig.parse({**data, "stages": [first, adapters, last], **changes}, where="test")


def three_sources():
    sources = two_sources()
    return {"first": sources["first"], "adapters": sources["second"], "last": DrawnSource(12)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    result = run(three_stages(folder / "out"), model=tiny_model(folder), sources=three_sources())
    return folder / "out", result


def test_an_adapter_stage_trains_its_adapters_and_what_trainable_names(straight):
    output, result = straight
    first, tuned = (tensors_of(weights.load(output / name)) for name in ("first", "adapters"))
    changed = differing(first, tuned)
    linear = [name for name in changed if not name.startswith("connector.")]
    assert linear
    assert all(name.startswith(("decoder.layers.", "vision.layers.")) and name.endswith(".weight") for name in linear)
    assert not any("norm" in name for name in linear)
    assert {name for name in first if name.startswith("connector.")} <= set(changed)
    assert sorted(f.name for f in (output / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    settings = json.loads((output / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "../first"
    assert settings["modules_to_save"] == ["model.multi_modal_projector"]
    assert not adapted(result.model.vlm)
    assert differing(tensors_of(weights.load(output / "last")), tensors_of(result.model)) == []
    assert weights.describe(str(output / "adapters")) == result.model.config


# The run saves after steps 3 and 4 (first stage), 7 and 10 (adapters), 13. Crashes within each stage and at borders.
@pytest.mark.parametrize("crashes", [[5], [8], [10], [11], [12], [4, 3, 3]], ids=str)
def test_a_resumed_run_with_adapters_is_bitwise_equal(straight, tmp_path, crashes):
    expected_output, expected = straight
    output = tmp_path / "out"
    for steps in crashes:
        with pytest.raises(Crash):
            run(three_stages(output), model=tiny_model(tmp_path), sources=three_sources(), on_row=crash_after(steps))
    result = run(three_stages(output), model=tiny_model(tmp_path), sources=three_sources())
    assert differing(tensors_of(result.model), tensors_of(expected.model)) == []
    assert log_of(output) == log_of(expected_output)
    assert differing(optimizer_of(output), optimizer_of(expected_output)) == []
    for file in ("adapters/adapter_model.safetensors", "adapters/adapter_config.json", "last/model.safetensors"):
        assert (output / file).read_bytes() == (expected_output / file).read_bytes()


def one_stage(output: Path, **changes) -> RunConfig:
    data = three_stages(output).model_dump(mode="json")
    adapters = {**data["stages"][1], "trainable": [], "lora": LORA, "steps": 5}
    return RunConfig.parse({**data, "stages": [adapters], **changes}, where="test")


def test_checkpoints_of_adapters_hold_adapters_only(tmp_path):
    config = one_stage(tmp_path / "out")
    result = run(config, model=tiny_model(tmp_path), sources={"adapters": DrawnSource(18)})
    saved = CheckpointStore(tmp_path / "out" / "checkpoints", keep=2).newest()
    names = set(saved.tensors("weights"))
    assert names
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert {key.split("/", 1)[1] for key in saved.tensors("optimizer")} == names
    # Weights without a name of their own are kept beside the adapter, which points to them.
    assert differing(tensors_of(weights.load(tmp_path / "out" / "base")), tensors_of(tiny_model(tmp_path))) == []
    assert differing(tensors_of(weights.load(result.folder)), tensors_of(result.model)) == []
    again = run(config, model=tiny_model(tmp_path), sources={"adapters": DrawnSource(18)})
    assert differing(tensors_of(again.model), tensors_of(result.model)) == []


def test_adapters_of_a_model_with_a_name_point_to_it(tmp_path):
    model = tiny_model(tmp_path)
    weights.save_native(tmp_path / "model", model.vlm, model.config, model.tokenizer)
    config = one_stage(tmp_path / "out", model=str(tmp_path / "model"), init="model")
    result = run(config, sources={"adapters": DrawnSource(18)})
    assert not (tmp_path / "out" / "base").exists()
    settings = json.loads((result.folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "model")
    # A run that starts from an adapter starts from the merged model.
    more = run(
        one_stage(tmp_path / "more", model=str(result.folder), init="model"), sources={"adapters": DrawnSource(9)}
    )
    assert differing(tensors_of(weights.load(more.folder)), tensors_of(more.model)) == []


def test_training_in_memory_leaves_the_adapters_on(tmp_path):
    model = tiny_model(tmp_path)
    before = tensors_of(model)
    tuned = stage(trainable=[], lora={**LORA, "targets": ["decoder.layers.*.attn.q"]}, steps=4)
    rows = train_stage(model.vlm, tuned, DrawnSource(8), tokenizer=model.tokenizer)
    assert rows[-1]["lr"].keys() == {"decoder"}
    after = tensors_of(model)
    assert differing(before, {name: after[name] for name in before}) == []
    assert len(after) == len(before) + 4
    assert merge(model.vlm) == tuple(f"decoder.layers.{n}.attn.q" for n in range(2))
    assert differing(before, tensors_of(model)) == [f"decoder.layers.{n}.attn.q.weight" for n in range(2)]


def test_fresh_adapters_change_nothing_and_follow_from_the_seed(tmp_path):
    states = []
    for seed in (1, 1, 2):
        model = tiny_model(tmp_path)
        before = tensors_of(model)
        attach(model.vlm, Lora(rank=2, alpha=4), find_targets(model.vlm, ["decoder"]), seed=seed)
        states.append(tensors_of(model))
        merge(model.vlm)
        assert differing(before, tensors_of(model)) == []
    assert differing(states[0], states[1]) == []
    assert all(name.endswith("lora_A.weight") for name in differing(states[0], states[2]))


def test_targets_are_the_layers_that_are_called(tmp_path):
    vlm = tiny_model(tmp_path).vlm
    assert "decoder.head" not in find_targets(vlm, ["decoder"])
    assert "vision.patch" not in find_targets(vlm, ["vision"])
    with pytest.raises(ConfigError, match=r"'decoder.head' names no linear layer.*read without the layer being called"):
        find_targets(vlm, ["decoder.head"])
    with pytest.raises(ConfigError, match=r"'decodr' names no linear layer"):
        find_targets(vlm, ["decodr"])


def test_a_layer_trains_whole_or_by_an_adapter(tmp_path):
    model = tiny_model(tmp_path)
    with pytest.raises(ConfigError, match=r"decoder.layers.0.attn.q is named by trainable and by lora.targets"):
        choose(model.vlm, ["decoder"], idle={}, lora=Lora(rank=2, alpha=4))


def test_layers_that_no_output_depends_on_get_no_adapter(tmp_path):
    model = tiny_model(tmp_path)
    idle = idle_tensors(model.vlm, model.config)
    chosen = choose(model.vlm, [], idle=idle, lora=Lora(rank=2, alpha=4, targets=("vision",)))
    assert any(name.startswith("vision.layers.2.") for name in chosen.idle)
    assert not any(target.startswith("vision.layers.2.") for target in chosen.targets)
    with pytest.raises(ConfigError, match="would train nothing"):
        choose(model.vlm, [], idle=idle, lora=Lora(rank=2, alpha=4, targets=("vision.layers.2",)))


def test_adapters_train_in_bfloat16_passes_too(tmp_path):
    model = tiny_model(tmp_path)
    tuned = stage(trainable=[], lora=LORA, steps=2)
    rows = train_stage(model.vlm, tuned, DrawnSource(8), tokenizer=model.tokenizer, precision="bfloat16")
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)


@pytest.mark.parametrize("bits", ["int8", "int4", "nf4"])
def test_a_quantised_run_trains_adapters_that_fit_the_whole_model(tmp_path, bits):
    config = one_stage(tmp_path / "out", quantize=bits)
    with pytest.raises(Crash):
        run(config, model=tiny_model(tmp_path), sources={"adapters": DrawnSource(18)}, on_row=crash_after(4))
    result = run(config, model=tiny_model(tmp_path), sources={"adapters": DrawnSource(18)})
    straight = one_stage(tmp_path / "straight", quantize=bits)
    run(straight, model=tiny_model(tmp_path), sources={"adapters": DrawnSource(18)})
    file = "adapters/adapter_model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    assert log_of(tmp_path / "out") == log_of(tmp_path / "straight")
    tuned = tensors_of(weights.load(result.folder))
    changed = differing(tensors_of(tiny_model(tmp_path)), tuned)
    assert changed
    assert all(name.startswith("decoder.layers.") for name in changed)


def test_few_bits_need_a_run_of_one_stage_with_adapters(tmp_path):
    with pytest.raises(ConfigError, match="quantize is for a run of one stage that trains adapters"):
        three_stages(tmp_path, quantize="int8")
    with pytest.raises(ConfigError, match="quantize is for a run of one stage that trains adapters"):
        RunConfig.parse({**two_stages(tmp_path).model_dump(mode="json"), "quantize": "int4"}, where="test")


def test_few_bits_hold_what_is_read_in_the_dtype_of_its_file(tmp_path):
    model = tiny_model(tmp_path)
    weights.save_native(tmp_path / "model", model.vlm.bfloat16(), model.config, model.tokenizer)
    config = one_stage(tmp_path / "out", model=str(tmp_path / "model"), init="model", quantize="int4")
    result = run(config, sources={"adapters": DrawnSource(9)})
    assert {parameter.dtype for parameter in result.model.vlm.parameters()} == {torch.float32}
    assert weights.load(result.folder).vlm.decoder.embed.weight.dtype == torch.bfloat16


def test_the_best_evaluation_of_an_adapter_stage_is_an_adapter_of_the_same_base(tmp_path):
    data = three_stages(tmp_path / "out").model_dump(mode="json")
    data["stages"][1]["evaluate"] = {"every": 2}
    config = RunConfig.parse({**data, "stages": data["stages"][:2]}, where="test")
    held_out = {"adapters": DrawnSource(3, fingerprint="held out")}
    sources = {name: source for name, source in three_sources().items() if name != "last"}
    result = run(config, model=tiny_model(tmp_path), sources=sources, held_out=held_out)
    best = tmp_path / "out" / "best" / "adapters"
    settings = json.loads((best / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "../../first"
    changed = differing(tensors_of(weights.load(tmp_path / "out" / "first")), tensors_of(weights.load(best)))
    assert any(name.startswith("decoder.") for name in changed)
    rows = [row for row in log_of(tmp_path / "out") if row.get("best")]
    if rows[-1]["step"] == 6:
        assert differing(tensors_of(weights.load(best)), tensors_of(result.model)) == []


def test_a_model_that_compares_trains_no_adapters(tmp_path):
    with pytest.raises(ConfigError, match="lora and cache_features are for models that answer"):
        stage(objective="itc_itm_itg", batch={"samples": 4, "form": "pad"}, lora=LORA)
