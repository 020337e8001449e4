"""Run files, overrides, and the recipes that ship with the library."""

import re
from pathlib import Path

import pytest
import yaml

from opsin import families
from opsin.errors import ConfigError, UnknownNameError
from opsin.spec.model import VLMConfig
from opsin.spec.recipe import RANDOM, PartSources, RunConfig
from opsin.train.config import RECIPES, apply_override, differences, find_recipe, read_run, recipe_names, to_yaml
from opsin.train.optim import make_groups
from opsin.train.prepare import describe_run, on_meta, published_samples, stage_config, stage_trainable
from opsin.train.trainable import matches
from train.published import PUBLISHED, table_row

RUN = """
model: llava-1.5-tiny
output: runs/x
stages:
  - name: align
    trainable: [connector]
    batch: {samples: 8}
    optim: {kind: adamw, lr: 1e-3}
    epochs: 1
  - name: tune
    trainable: [connector, decoder]
    batch: {samples: 8}
    optim: {kind: muon, lr: 0.02, rest: {lr: 1e-3}}
    steps: 100
"""


@pytest.fixture
def run_file(tmp_path) -> str:
    (tmp_path / "run.yaml").write_text(RUN)
    return str(tmp_path / "run.yaml")


def test_a_run_file_is_read_with_overrides_by_number_and_by_name(run_file):
    config = read_run(
        run_file,
        [
            "stages.0.optim.lr=5e-4",
            "stages.tune.optim.rest.betas=[0.9, 0.95]",
            "stages.1.schedule.warmup_steps=10",
            "stages.align.data=[{path: a.json, limit: 10}]",
            "checkpoint.every=7",
            "tokenizer=null",
            "init=random",
            "stages.align.steps=3",
        ],
    )
    assert config.stages[0].optim.lr == 5e-4
    assert config.stages[1].optim.rest.betas == (0.9, 0.95)
    assert config.stages[1].schedule.warmup_steps == 10
    assert config.stages[0].data[0].limit == 10
    assert config.checkpoint.every == 7
    assert config.init == "random"
    assert (config.stages[0].steps, config.stages[0].epochs) == (3, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "key=value is needed"),
        ("=3", "key=value is needed"),
        ("stages.third.steps=1", r"no entry 'third' in a list of 2.*its name: align, tune"),
        ("stages.2.steps=1", "no entry '2' in a list of 2"),
        ("stages.tun.steps=1", r"did you mean 'tune'\?"),
        ("seed=[1", "the value is not YAML"),
        ("sed=1", r"unknown key 'sed' \(did you mean 'seed'\?\)"),
        ("stages.0.optim.wieght_decay=1", r"unknown key 'stages.0.optim.wieght_decay' \(did you mean 'weight_decay'"),
        ("stages.0.optim.lr=fast", r"stages.0.optim.lr: .*valid number.*got 'fast'"),
        ("stages.0.optim.kind=adam", "stages.0.optim: .*'adamw', 'muon'"),
        ("stages.0.batch.samples=0", r"stages.0.batch.samples: .*greater than or equal to 1 \(got 0\)"),
        ("stages.0.epochs=null", "stage 'align' does not say how long it is: give epochs or steps"),
        ("stages.0.name=tune", "two stages are called 'tune'"),
        ("stages.0.name=checkpoints", "the run itself writes there"),
        ("stages.0.trainable=[]", "stage 'align' trains nothing"),
        ("stages=[]", "a run needs at least one stage"),
        ("init.visoin=x", r"unknown key .*visoin' \(did you mean 'vision'\?\)"),
    ],
)
def test_a_wrong_override_says_what_and_where(run_file, override, message):
    with pytest.raises(ConfigError, match=message):
        read_run(run_file, [override])


def test_a_file_that_is_no_run_file_is_told(tmp_path):
    path = tmp_path / "x.yaml"
    for text, message in (("a: [1\nb: 2", "line 2: not YAML"), ("- 1", "is not a run file"), ("", "is not a run file")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_run(str(path))
    with pytest.raises(UnknownNameError, match=r"no recipe of that name \(did you mean 'llava-1.5/finetune'"):
        find_recipe("llava-1.5/finetun")


def test_a_config_written_out_reads_back_equal(run_file, tmp_path):
    config = read_run(run_file)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert read_run(str(tmp_path / "again.yaml")) == config


def test_differences_name_keys_and_leave_out_the_machine(run_file):
    before = read_run(run_file).model_dump(mode="json")
    changes = ["workers=9", "output=y", "device=cpu", "stages.1.steps=5", "stages.0.trainable=[decoder]", "log_every=1"]
    after = read_run(run_file, changes).model_dump(mode="json")
    assert differences(before, after) == ["stages.0.trainable.0: 'connector' -> 'decoder'", "stages.1.steps: 100 -> 5"]
    assert differences(before, before) == []


def test_an_override_makes_the_sections_it_needs():
    data = {}
    apply_override(data, "a.b.c=2.5")
    assert data == {"a": {"b": {"c": 2.5}}}


def test_recipes_are_named_by_their_families():
    named = [name for family in families.FAMILIES for name in family.recipes]
    assert sorted(named) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_holds_together(name):
    """It parses, its model exists at full size, and what it names exists in that model."""
    config = read_run(name)
    model = describe_run(config)
    module = on_meta(model)
    parameters = dict(module.named_parameters())
    for stage in config.stages:
        trainable = stage_trainable(module, model, stage)
        whole = [name for name in trainable.names if name in parameters]  # adapters come when their stage begins
        assert make_groups({name: parameters[name] for name in whole}, stage.optim)
        for pattern in stage.trainable:
            assert any(matches(each, pattern) for each in trainable.names), pattern
        longest = model.max_positions if config.compares else model.decoder.max_positions
        assert stage.max_tokens <= longest
        assert stage.overlong == "truncate"
        assert not stage.drop_path or any(each.startswith("vision.") for each in trainable.names)
        if isinstance(model, VLMConfig):
            stage_config(model, stage)
    if isinstance(model, VLMConfig):
        assert name in families.family_of(model).recipes
    if isinstance(config.init, PartSources):
        named = {part for part in PartSources.model_fields if getattr(config.init, part) != RANDOM}
        assert "qformer" in named if config.compares else "decoder" in named


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_starts_from_another_recipes_folder_or_from_the_hub(name):
    """`runs/...` in a recipe is what another shipped recipe leaves behind."""
    left = {f"{config.output}/{stage.name}" for config in map(read_run, recipe_names()) for stage in config.stages}
    init = read_run(name).init
    for source in (getattr(init, part) for part in PartSources.model_fields) if isinstance(init, PartSources) else ():
        assert not source.startswith("runs/") or source.removesuffix("/connector.safetensors") in left, source


@pytest.mark.parametrize("name", recipe_names())
def test_every_setting_of_a_shipped_recipe_has_its_source(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    tags = set(re.findall(r"\[([\w.]+)\]", text.split("model:")[0]))
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key = line.split("#")[0].strip().removeprefix("- ").split(":")[0]
        value = line.split("#")[0].partition(":")[2].strip()
        if key.startswith("#") or not value or key in ("model", "output", "name", "image_root", "tile_size", "path"):
            continue
        used = re.findall(r"\[([\w.]+)\]", line.partition("#")[2])
        above = re.findall(r"\[([\w.]+)\]", "".join(lines[max(0, number - 2) : number]))
        assert used or (key == "kind" and above) or key == "connector", f"{name}: {line.strip()!r} has no source"
        assert set(used) <= tags | {"code"}, f"{name}: {used} is not explained at the top"


def test_each_recipe_has_its_published_numbers_here():
    assert sorted(PUBLISHED) == recipe_names()


@pytest.mark.parametrize("name", recipe_names())
def test_published_numbers_are_those_of_the_papers(name):
    (stage,) = read_run(name).stages
    found = {
        "lr": stage.optim.lr,
        "min": stage.schedule.min_lr,
        "start": stage.schedule.warmup_start_lr,
        "kind": stage.schedule.kind,
        "warmup": stage.schedule.warmup_ratio if stage.schedule.warmup_steps is None else stage.schedule.warmup_steps,
        "batch": stage.batch.samples,
        "steps": stage.steps,
        "epochs": stage.epochs,
        "tokens": stage.max_tokens,
        "samples": published_samples(stage),
        "side": stage.resolution and getattr(stage.resolution, "tile_size", None),
        "betas": stage.optim.betas,
        "eps": stage.optim.eps,
        "wd": stage.optim.weight_decay,
        "clip": stage.clip,
        "layer_decay": stage.optim.layer_decay,
        "part_lr": stage.optim.part_lr,
        "drop": stage.drop_path,
        "parts": " ".join(stage.trainable),
        "objective": stage.objective,
        "captions": stage.captions,
        "lora": stage.lora and (stage.lora.rank, stage.lora.alpha, stage.lora.dropout, stage.lora.targets),
    }
    assert {key: found[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_shares_and_counts_of_a_mixture_add_up():
    """InternVL-1.5's first stage is known by shares, Qwen-VL's second by counts."""
    for size in ("26b", "2b", "4b"):
        (stage,) = read_run(f"internvl-1.5/pretrain-{size}").stages
        assert sum(file.weight for file in stage.data) == pytest.approx(100)
    (stage,) = read_run("qwen-vl/multitask").stages
    assert [file.count / 1e6 for file in stage.data] == [19.7, 3.6, 3.5, 8.7, 8.7, 24.8, 7.8]


def test_the_documentation_has_every_published_stage_with_its_numbers():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    named = [name for family in families.FAMILIES for name in family.recipes]
    assert "\n".join(map(table_row, named)) in text


def test_recipes_lie_inside_the_package():
    """An installed wheel holds them, since the package's folder is what is packed."""
    import opsin

    assert RECIPES.parent == Path(opsin.__file__).parent
    for name in recipe_names():
        assert RunConfig.parse(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()), where=name) == read_run(name)
