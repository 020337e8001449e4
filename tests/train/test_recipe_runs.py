"""Every shipped recipe really runs: with tiny models and toy data, each from what the recipe before it left behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import toys
from opsin import families, weights
from opsin.families.blip2 import TINY, TINY_RETRIEVER, TINY_T5
from opsin.spec.recipe import RunConfig
from opsin.train import run
from opsin.train.config import RECIPES
from opsin.train.prepare import stage_trainable, start_model

BERT_CONTROLS = ("[CLS]", "[SEP]", "[DEC]")
SIDES = {"qwen_vl": {224: 112, 448: 224}, "blip2": {224: 42, 490: 98}, "internvl15": {448: 28}}
"""Sides of tiles in the recipes, and what stands for them at tiny sizes."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, data of several kinds, a tokenizer, and tiny models that no preset describes."""
    folder = tmp_path_factory.mktemp("project")
    toys.tokenizer_folder(folder / "tokenizer", controls=(*toys.CONTROLS, *BERT_CONTROLS))
    (folder / "images").mkdir()
    for number in range(8):
        toys.picture((40 + 9 * number, 50), seed=number).save(folder / "images" / f"{number}.png")

    def turns(question: str, number: int) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": "a red house " * (1 + number % 3)}]

    pairs = [{"image": f"{n}.png", "conversations": turns("<image>\nWhat?", n)} for n in range(8)]
    text = [{"conversations": turns("Spell it.", n)} for n in range(2)]
    several = [{"image": ["0.png", "5.png"], "conversations": turns("<image><image>\nWhich?", n)} for n in range(2)]
    frames = [["1.png"] * 4, ["3.png"] * 5]
    videos = [{"videos": [shown], "conversations": turns("<video>\nWhat?", 1)} for shown in frames]
    for name, records in (("pairs", pairs), ("mixed", pairs + text + several), ("videos", pairs + text + videos)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    larger = TINY.config.vision.replace(image_size=70)
    squash = TINY.config.resolution.replace(tile_size=70)
    tiled = families.family("llava_next").tiny.config.resolution
    for name, config in (
        ("blip2-t5", TINY_T5),
        ("blip2-coco", TINY.config.replace(vision=larger, resolution=squash)),
        ("llava-hd", families.family("llava15").tiny.config.replace(resolution=tiled)),
    ):
        weights.save_native(folder / name, weights.build(config), config)
    for name, compares in (
        ("stage1", TINY_RETRIEVER),
        ("stage1-coco", TINY_RETRIEVER.replace(vision=larger, resolution=squash)),
    ):
        weights.export_retriever(folder / f"blip2-{name}", weights.build_retriever(compares))
    return folder


MODELS = {
    "blip2/stage1": "blip2-stage1",
    "blip2/retrieval-coco": "blip2-stage1-coco",
    "blip2/stage2-flan-t5": "blip2-t5",
    "blip2/caption-coco": "blip2-coco",
    "llava-1.5/finetune-hd": "llava-hd",
}


def tiny(name: str, family: families.Family) -> RunConfig:
    """A shipped recipe with a tiny model and two short steps; all that is published of it stays."""
    data: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    model = MODELS.get(name)
    data |= {"model": f"./{model}" if model else family.tiny.id, "tokenizer": "tokenizer", "device": "cpu"}
    data |= {"precision": "float32", "workers": 0, "checkpoint": {"every": 100}}
    init = data["init"]
    if isinstance(init, dict):
        data["init"] = {part: source for part, source in init.items() if source.startswith("runs/")}
    else:
        data["init"] = "random"
    (stage,) = data["stages"]
    kind = "videos" if family.name == "qwen2_vl" else "pairs" if family.name == "blip2" else "mixed"
    kind = "pairs" if stage.get("chat") == "plain" else kind
    stage |= {"data": [{"path": f"{kind}.json", "image_root": "images"}], "steps": 2}
    stage["batch"] |= {"samples": 6, "micro_tokens": None if stage["batch"].get("form") == "pad" else 400}
    stage["schedule"] |= {"warmup_steps": 1}
    if resolution := stage.get("resolution"):
        if "tile_size" in resolution:
            side = SIDES.get(family.name, {}).get(resolution["tile_size"], family.tiny.config.vision.image_size)
            resolution["tile_size"] = side
        elif resolution["kind"] == "native":
            stage["resolution"] = family.tiny.config.resolution.model_dump()
    return RunConfig.parse(data, where=name)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_all_recipes_of_a_family_run_one_after_the_other(family, project, monkeypatch):
    """Each trains exactly what it says, from what it says, with losses that are numbers."""
    monkeypatch.chdir(project)
    for name in family.recipes:
        config = tiny(name, family)
        (stage,) = config.stages
        before = start_model(config)
        result = run(config)
        assert result.status == "finished"
        assert result.steps == 2
        module = result.model.module
        trained = set(stage_trainable(module, result.model.config, stage).merged)
        state = dict(before.module.named_parameters())
        changed = {each for each, tensor in module.named_parameters() if not torch.equal(tensor, state[each])}
        assert changed <= trained, name
        # Keys' biases change nothing that attention gives, and words that do not occur get no gradient.
        still = {each for each in trained - changed if not each.endswith("k.bias")}
        assert not still, (name, still)
        rows = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        left = Path(config.output) / stage.name
        again = weights.load_retriever(left) if config.compares else weights.load(left)
        assert all(
            torch.equal(tensor, dict(again.module.named_parameters())[each])
            for each, tensor in module.named_parameters()
        )
