"""The model that comes with opsin: its name leads to its folder wherever a model is named, without a download."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import opsin
from opsin import families, weights
from opsin.errors import ConfigError, UnknownNameError, WeightError
from opsin.spec.recipe import RunConfig
from opsin.train.prepare import describe_model, start_model
from opsin.train.stage_models import published_name
from opsin.weights import shipped
from opsin.weights.card import find_model
from opsin.weights.hub import locate
from shipped import put_in_place, write_shipped
from weights.folders import published, same


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shipped(tmp_path_factory.mktemp("shipped") / "opsin-mini")


@pytest.fixture
def mini(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    put_in_place(monkeypatch, folder)
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.usefixtures("no_hub")
def test_the_name_loads_the_folder_with_its_tokenizer(mini: Path) -> None:
    model = weights.load("opsin-mini")
    assert model.name == "opsin-mini"
    assert next(model.vlm.parameters()).dtype == torch.float16
    assert same(model.vlm.state_dict(), weights.load(mini).vlm.state_dict())
    assert model.tokenizer.vocab_size > 256
    assert weights.resolve("opsin-mini") == mini
    assert weights.describe("opsin-mini") == model.config


@pytest.mark.usefixtures("mini", "no_hub")
def test_the_public_face_plans_and_chats_without_naming_a_download() -> None:
    assert opsin.plan((64, 64), model="opsin-mini").num_slots == weights.describe("opsin-mini").plan((64, 64)).num_slots
    answer = opsin.chat(sampling=opsin_sampling()).ask("What?")
    assert answer.usage.new_tokens == 2


def opsin_sampling() -> object:
    from opsin.generate.sampling import Sampling

    return Sampling(max_new_tokens=2)


def test_a_folder_of_the_same_name_counts_only_where_it_is_written_as_a_path(
    mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    published(tmp_path / "opsin-mini")
    assert locate("opsin-mini").folder == mini
    for path in ("./opsin-mini", str(tmp_path / "opsin-mini"), Path("opsin-mini"), Path("./opsin-mini")):
        assert locate(path).folder.resolve() == tmp_path / "opsin-mini"
        assert weights.load(path).family.name == "llava_next"
    assert weights.load("opsin-mini").family.name == "qwen2_vl"


@pytest.mark.parametrize("missing", ["opsin.json", "model.safetensors", "tokenizer.json", None])
def test_an_installation_without_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    place = tmp_path / "place"
    if missing is not None:
        write_shipped(place)
        (place / missing).unlink()
    put_in_place(monkeypatch, place)
    for call in (weights.load, weights.describe, weights.resolve, find_model):
        with pytest.raises(WeightError, match=r"comes with opsin, but this installation lacks (.*)of it") as error:
            call("opsin-mini")
        assert (missing or "opsin.json, model.safetensors, tokenizer.json") in str(error.value)
        assert str(place) in str(error.value)


def test_names_that_are_nearly_right_lead_to_it() -> None:
    for name in ("opsinmini", "opsin_mini", "opsin-min"):
        for look_up in (weights.load, families.preset, describe_model):
            with pytest.raises(UnknownNameError, match=r"did you mean 'opsin-mini'"):
                look_up(name)
    with pytest.raises(ConfigError, match=r"no preset but the folder of a model.*opsin\.weights\.describe"):
        families.preset("opsin-mini")


@pytest.mark.usefixtures("mini")
def test_a_mix_takes_parts_of_it(tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    parts = {"vision": "opsin-mini", "connector": {"from": "opsin-mini"}, "resolution": "opsin-mini"}
    decoder = {"from": "opsin-mini", "num_layers": 1}
    file.write_text(yaml.safe_dump({**parts, "decoder": decoder, "chat": "qwen2_vl"}))
    config = weights.describe(str(file))
    assert config.vision == weights.describe("opsin-mini").vision
    assert config.decoder.num_layers == 1


@pytest.mark.usefixtures("mini", "no_hub")
def test_a_run_starts_from_it_in_float32_and_its_adapters_name_it() -> None:
    stage = {"name": "tune", "trainable": ["decoder"], "steps": 1, "batch": {"samples": 1}}
    run = {"model": "opsin-mini", "output": "out", "stages": [{**stage, "optim": {"kind": "adamw", "lr": 1e-3}}]}
    model = start_model(RunConfig.parse(run, where="run"))
    assert next(model.module.parameters()).dtype == torch.float32
    assert model.name == "opsin-mini"
    assert describe_model("opsin-mini") == model.config
    assert published_name("opsin-mini") == "opsin-mini"


def test_describing_it_imports_no_torch(folder: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom opsin.weights import shipped\n"
        f"shipped.FOLDER = Path({str(folder)!r})\n"
        "from opsin.cli.app import run\n"
        "code = run(['plan', '64x64', '--model', 'opsin-mini', '--json'])\n"
        "sys.exit(code or str([name for name in sys.modules if name == 'torch'] or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["model"], row["text_tokens_from"]) == ("opsin-mini", "tokenizer")


def test_what_is_shipped_is_whole_and_small() -> None:
    if not (shipped.FOLDER / "model.safetensors").is_file():
        pytest.skip("this checkout has no weights of opsin-mini yet")
    model = weights.load("opsin-mini")
    assert next(model.vlm.parameters()).dtype.itemsize == 2
    assert model.tokenizer.vocab_size <= model.config.decoder.vocab_size
    assert sum(file.stat().st_size for file in shipped.FOLDER.rglob("*")) <= 12_000_000
