"""BLIP-2's stage 1 as a run: from a YAML file to a folder that compares and that stage 2 starts from."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import toys
from opsin import match, weights
from opsin.cli.app import run as opsin
from opsin.errors import ConfigError, DataError
from opsin.families.blip2 import TINY, TINY_RETRIEVER
from opsin.spec.recipe import BatchSize
from opsin.train import StopRequest, read_run, run
from opsin.train.prepare import start_model
from opsin.train.stage1 import check_pairs

TRAINED = ("norm_features", "queries", "qformer", "words", "positions", "vision_proj", "text_proj", "itm_head")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with pictures of one colour, captions that name it, a tiny model and a run file."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    toys.tokenizer_folder(tmp_path / "tokenizer", controls=(*toys.CONTROLS, "[CLS]", "[SEP]", "[DEC]"))
    weights.export_retriever(tmp_path / "model", weights.build_retriever(TINY_RETRIEVER))
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "white": (240, 240, 240)}
    records = []
    for number in range(16):
        name = list(colours)[number % 4]
        Image.new("RGB", (42, 42), colours[name]).save(f"{name}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"{name} paper"}]
        records.append({"image": f"{name}.png", "conversations": turns})
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    stage = {
        "name": "stage1",
        "objective": "itc_itm_itg",
        "trainable": [*TRAINED, "captions", "temperature"],
        "data": [{"path": "pairs.json"}],
        "batch": {"samples": 8, "form": "pad"},
        "optim": {"kind": "adamw", "lr": 2e-3, "weight_decay": 0.05},
        "schedule": {"kind": "constant", "warmup_steps": 3},
        "steps": 60,
    }
    config = {"model": "model", "init": "random", "tokenizer": "tokenizer", "output": "out", "device": "cpu"}
    config |= {"workers": 1, "checkpoint": {"every": 5}, "stages": [stage]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_a_run_learns_to_compare_and_stage_2_goes_on_with_its_qformer(project, capsys):
    """Pictures that repeat in a batch are no negatives of each other."""
    assert opsin(["train", "run.yaml"]) == 0
    rows = [json.loads(line) for line in (project / "out" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.65 * rows[0]["loss"]
    matcher = match.load(project / "out" / "stage1")
    texts = [f"{name} paper" for name in ("red", "green", "blue", "white")]
    for index, name in enumerate(("red", "green", "blue", "white")):
        assert matcher.rank_texts(project / f"{name}.png", texts)[0].index == index
    capsys.readouterr()
    second = yaml.safe_load((project / "run.yaml").read_text())
    second |= {"model": "blip2-tiny", "output": "two", "init": {"connector": "out/stage1", "vision": "out/stage1"}}
    (stage,) = second["stages"]
    stage |= {"name": "stage2", "objective": "next_token", "trainable": ["connector"], "chat": "blip2_opt_caption"}
    stage |= {"batch": {"samples": 8}, "steps": 2}
    (project / "second.yaml").write_text(yaml.safe_dump(second))
    started = start_model(read_run("second.yaml")).vlm
    learned = matcher.model.retriever
    assert torch.equal(started.connector.queries, learned.queries)
    assert torch.equal(started.vision.positions, learned.vision.positions)
    fresh = weights.build(TINY.config).connector.proj.weight
    assert torch.equal(started.connector.proj.weight, fresh), "the projection is new in stage 2"
    assert opsin(["train", "second.yaml"]) == 0


def test_a_stopped_run_goes_on_to_the_same_bits(project):
    """Negatives are drawn from the step's number."""
    config = read_run("run.yaml", ["stages.0.steps=8", "checkpoint.every=100"])
    straight = run(config).model.retriever.state_dict()
    stop, done = StopRequest(), []

    def after(row):
        done.append(row)
        if len(done) == 3:
            stop.make()

    again = config.replace(output="again")
    assert run(again, stop=stop, on_row=after).status == "stopped"
    result = run(again)
    assert result.status == "finished"
    assert all(torch.equal(tensor, straight[name]) for name, tensor in result.model.retriever.state_dict().items())


def test_pictures_are_cropped_and_flipped_and_equal_captions_are_no_negatives(project):
    """Four pictures with a caption each, in 16 records: all of one colour are one picture, however they are shown."""
    shown = ["stages.0.augment={crop: [0.5, 1.0], flip: 0.5, turns: true}", "stages.0.equal_captions=positives"]
    config = read_run("run.yaml", [*shown, "stages.0.steps=6", "stages.0.optim.lr=2e-3"])
    rows = []
    whole = run(config, on_row=rows.append).model.retriever.state_dict()
    other = []
    run(config.replace(output="plain", stages=(config.stages[0].replace(augment=None),)), on_row=other.append)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in other], abs=1e-4), "one colour each"
    stop = StopRequest()
    run(config.replace(output="again"), stop=stop, on_row=lambda row: row["step"] == 3 and stop.make())
    again = run(config.replace(output="again")).model.retriever.state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


def test_it_is_judged_while_it_trains_and_its_best_model_compares(project, capsys):
    judged = "stages.0.evaluate={every: 5, data: [{path: pairs.json}]}"
    assert opsin(["train", "run.yaml", "stages.0.steps=20", judged]) == 0
    rows = [json.loads(line) for line in (project / "out" / "log.jsonl").read_text().splitlines()]
    losses = [row["evaluation"]["loss"] for row in rows if "evaluation" in row]
    assert len(losses) == 4
    assert min(losses) < losses[0]
    assert match.load(project / "out" / "best" / "stage1").rank_texts(project / "red.png", ["red paper", "blue paper"])
    asked = "stages.0.evaluate={every: 5, metric: exact_match, data: [{path: pairs.json}]}"
    assert opsin(["train", "run.yaml", "output=other", asked]) == 2
    assert "a model that compares gives no answers; set evaluate.metric: loss" in capsys.readouterr().err


def test_a_dry_run_shows_it_without_data_by_the_published_counts(project, capsys):
    assert opsin(["train", "run.yaml", "--dry-run"]) == 0
    assert "16 samples per epoch, 8 per step: 60 steps, 30.00 epochs" in capsys.readouterr().out
    assert opsin(["train", "blip2/stage1", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "vision           985,949,440               0" in out
    assert "186,70" in out
    assert "129,000,000 samples per epoch, 1,680 per step: 250,000 steps, 3.26 epochs" in out


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["stages.0.batch.form=pack"], "pairs are compared row by row; set batch.form: pad"),
        (["stages.0.chat=plain"], "itc_itm_itg reads captions as they are"),
        (["init={decoder: x}"], "init.decoder: this run's model has no such part"),
        (["stages.0.batch.samples=15"], "leave a pair alone"),
        (["stages.0.resolution={kind: center_crop, tile_size: 42}"], "reads squashed pictures only"),
        (["stages.0.augment={crop: [1, 0.5]}"], "crop is the least and the most share"),
        (["stages.0.objective=next_token", "stages.0.equal_captions=positives"], "equal_captions is for objective itc"),
        (["stages.0.max_tokens=4000"], "max_tokens 4000 is more than max_positions 40"),
        (["stages.0.objective=next_token", "model=blip2-tiny", "init={qformer: x}"], "init.qformer: this run's model"),
    ],
)
def test_what_cannot_be_is_told_before_the_first_step(project, overrides, error):
    with pytest.raises((ConfigError, DataError), match=error):
        run(read_run("run.yaml", overrides))


def test_a_model_of_the_other_kind_is_refused(project):
    model = start_model(read_run("run.yaml"))
    config = read_run("run.yaml", ["stages.0.objective=next_token", "output=other"])
    with pytest.raises(ConfigError, match="objective next_token trains a model that answers; model does not"):
        run(config, model=model)


def test_passes_of_one_pair_are_found_beforehand():
    check_pairs(16, BatchSize(samples=8, form="pad"))
    check_pairs(4, BatchSize(samples=8, form="pad"))
    check_pairs(16, BatchSize(samples=8, micro_samples=4, form="pad"))
    for count, batch in (
        (17, BatchSize(samples=8, form="pad")),
        (16, BatchSize(samples=8, micro_samples=7, form="pad")),
        (16, BatchSize(samples=8, micro_samples=1, form="pad")),
        (1, BatchSize(samples=8, form="pad")),
    ):
        with pytest.raises(ConfigError, match="a pair alone"):
            check_pairs(count, batch)
