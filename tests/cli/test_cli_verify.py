"""`opsin verify`: equal models are equal, a broken copy is caught on the rung where it is broken."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mixes
from opsin import families, weights
from opsin.verify.run import write_tiny
from parity.case import ROOT, SHARED
from toys import tokenizer_folder
from weights.folders import edit_json, rewrite

GOLDENS = ROOT / "tests" / "goldens"
LLAVA = GOLDENS / "llava" / "hf_llava15_mlp"


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return pytest.importorskip("transformers", minversion="5")


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("family", ["llava", "llava15", "llava_next", "blip2", "internvl15", "qwen2_vl"])
def test_every_tiny_family_that_transformers_has_is_equal(opsin, family):
    done = opsin("verify", "--tiny", family, "--json")
    assert done.code == 0, done
    steps = {step["rung"]: step["verdict"] for step in json.loads(done.out)["steps"]}
    assert steps.pop("ids") == "skipped"
    assert set(steps.values()) == {"equal"}


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize("preset", ["llava-tiny", "llava-1.5-tiny", "llava-next-tiny", "internvl-1.5-tiny"])
def test_a_checkpoint_as_its_authors_published_it_is_equal(opsin, preset, tmp_path):
    """transformers reads an export of it; LLaVA's has one id more, and one layer more where it has one only."""
    config = families.preset(preset).config
    model = weights.Model(weights.build(config, seed=1), config, preset, tokenizer_folder=None)
    weights.export(tmp_path / "out", model, layout="original")
    done = opsin("verify", tmp_path / "out", "--json")
    assert done.code == 0, done
    steps = {step["rung"]: step["verdict"] for step in json.loads(done.out)["steps"]}
    assert steps.pop("ids") == "skipped"
    assert set(steps.values()) == {"equal"}
    assert "by way of an export" in done.out


def change_mean(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", image_mean=[0.5, 0.4578275, 0.40821073])


def change_theta(folder: Path) -> None:
    hub = json.loads((folder / "config.json").read_text())
    text = hub["text_config"]
    for table in (text, text.get("rope_parameters") or {}):
        if "rope_theta" in table:
            table["rope_theta"] = 500.0
    text["rope_theta"] = 500.0
    edit_json(folder / "config.json", text_config=text)


def shift_layer(folder: Path) -> None:
    edit_json(folder / "config.json", vision_feature_layer=-1)


def perturb_last_layer(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["language_model.model.layers.1.mlp.down_proj.weight"].mul_(1.05)

    rewrite(folder, change)


@pytest.mark.usefixtures("transformers")
@pytest.mark.parametrize(
    ("spoil", "rung"),
    [
        (change_mean, "pixels"),
        (shift_layer, "features"),
        (change_theta, "first layer"),
        (perturb_last_layer, "last layer"),
    ],
)
def test_a_broken_copy_is_caught_on_its_rung(opsin, tmp_path, spoil, rung):
    for name in ("good", "broken"):
        write_tiny("llava15", tmp_path / name)
    spoil(tmp_path / "broken")
    done = opsin("verify", tmp_path / "good", "--against", tmp_path / "broken", "--json")
    assert done.code == 1, done
    said = json.loads(done.out)
    assert said["first_difference"] == rung
    assert said["conclusion"].startswith(f"The first rung that differs is {rung}. Likely cause: ")


def test_without_transformers_it_says_so(opsin, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers cannot be imported" in opsin("verify", "--tiny", "llava15").refused()


def test_an_unknown_family_gets_the_nearest_name(opsin):
    assert "did you mean 'llava_next'" in opsin("verify", "--tiny", "llava_nxt").refused()


@pytest.mark.usefixtures("transformers")
def test_what_transformers_cannot_express_is_refused(opsin, tmp_path):
    config = mixes.MIXES["mix-native-mlp-llama"]
    weights.save_native(tmp_path / "mix", weights.build(config), config)
    for given in (["--tiny", "qwen_vl"], [tmp_path / "mix"]):
        message = opsin("verify", *given).refused()
        assert "transformers cannot hold" in message
        assert "opsin verify --case FOLDER" in message


def test_a_tokenizer_that_transformers_cannot_read_shows_in_the_last_line(opsin, transformers, monkeypatch, tmp_path):
    def fail(*_: object, **__: object) -> None:
        raise ValueError("unknown format")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    done = opsin("verify", "--tiny", "llava15", "--tokenizer", tokenizer_folder(tmp_path))
    assert done.code == 0, done
    said = "8 of 9 rungs equal; ids not compared: transformers cannot read the tokenizer (unknown format)."
    assert done.out.rstrip().splitlines()[-1].endswith(said)


# ---- recorded cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "rungs"),
    [
        ("llava/hf_llava15_mlp", {"rows", "logits", "loss", "greedy"}),
        ("llava/orig_llava16_anyres_unpad", {"rows", "logits", "loss", "greedy"}),
        ("internvl/vit_300m_two_inputs", {"features"}),
        ("internvl/chat_v1_5_internlm2", {"rows", "logits", "loss", "greedy"}),
        ("internvl/internlm2_dynamic_ntk", {"logits"}),
        ("blip2/hf_opt", {"features", "rows", "logits", "loss", "greedy"}),
        ("blip2/hf_t5", {"features", "rows", "logits", "loss", "greedy"}),
        ("qwen_vl/image_prompt", {"rows", "logits", "loss", "greedy"}),
        ("qwen_vl/visual_448", {"features", "rows"}),
        ("qwen2_vl/video_and_image", {"positions", "rows", "logits", "greedy"}),
        ("qwen2_vl/vit_features", {"features", "rows"}),
    ],
)
def test_a_recorded_case_is_equal(opsin, monkeypatch, folder, rungs):
    monkeypatch.setitem(sys.modules, "transformers", None)  # nobody needs it here
    case = next((each / folder for each in (GOLDENS, SHARED / "goldens") if (each / folder).is_dir()), None)
    if case is None:
        pytest.skip(f"../shared/goldens/{folder} is not there")
    done = opsin("verify", "--case", case, "--json")
    assert done.code == 0, done
    said = json.loads(done.out)
    assert {step["rung"] for step in said["steps"] if step["verdict"] == "equal"} == rungs
    assert (
        f"{len(rungs)} of {9 + ('loss' in rungs)} rungs equal; pixels, ids not compared: the case's inputs;"
        in said["conclusion"]
    )


@pytest.mark.parametrize("folder", ["text/tokenizer_legacy", "qwen2_vl/tokenizer"])
def test_a_recorded_tokenizer_is_equal(opsin, folder):
    if not (SHARED / "tokenizers").is_dir():
        pytest.skip("../shared/tokenizers is not there")
    done = opsin("verify", "--case", GOLDENS / folder, "--tokenizers", SHARED / "tokenizers")
    assert done.code == 0, done
    assert "1 of 9 rungs equal" in done.out


def test_a_tokenizer_that_is_not_there_is_named(opsin, tmp_path):
    said = opsin("verify", "--case", GOLDENS / "qwen2_vl" / "tokenizer", "--tokenizers", tmp_path).refused()
    assert f"no tokenizer 'qwen2' in {tmp_path}" in said


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A copy of a case, to be spoiled."""
    return shutil.copytree(LLAVA, tmp_path / "case")


def test_a_case_with_other_weights_exits_1(opsin, case):
    rewrite(case, lambda state: state["multi_modal_projector.linear_2.bias"].add_(2e-5))  # recorded: 1e-5
    done = opsin("verify", "--case", case, "--json")
    assert done.code == 1, done
    said = json.loads(done.out)
    assert said["first_difference"] == "rows"
    rows = next(step for step in said["steps"] if step["rung"] == "rows")
    assert rows["error"] == pytest.approx(2e-5, rel=0.1)
    assert rows["tolerance"] == 1e-5


def test_another_model_may_take_the_place_of_the_case_s_own(opsin, case):
    rewrite(case, lambda state: state["language_model.lm_head.weight"].mul_(1.01))
    assert opsin("verify", case, "--case", LLAVA).code == 1
    done = opsin("verify", LLAVA, "--case", case)
    assert done.code == 0, done
    assert "0.0001 + 0.0001·|x|" in done.out


def test_a_case_without_a_model_is_refused(opsin):
    said = opsin("verify", "--case", GOLDENS / "llava" / "prompts").refused()
    assert "holds nothing that `opsin verify --case` compares: its kind is 'prompt' of family 'llava'" in said


@pytest.mark.parametrize("file", ["case.json", "outputs.safetensors", "model.safetensors"])
def test_a_case_that_lacks_a_file_is_refused(opsin, case, file):
    (case / file).unlink()
    assert str(case) in opsin("verify", "--case", case).refused()


def test_a_case_of_a_tower_takes_no_model(opsin):
    tower = GOLDENS / "internvl" / "vit_300m_two_inputs"
    assert "is of kind 'vision_features' and takes no model" in opsin("verify", LLAVA, "--case", tower).refused()


def test_a_case_takes_no_options_of_the_other_comparison(opsin):
    assert "--case records its inputs" in opsin("verify", "--case", LLAVA, "--dtype", "float16").refused()
