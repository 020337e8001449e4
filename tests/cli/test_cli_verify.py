"""`opsin verify`: equal models are equal, a broken copy is caught on the rung where it is broken."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin.verify.run import write_tiny
from weights.folders import edit_json, rewrite


@pytest.fixture(autouse=True)
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    return pytest.importorskip("transformers", minversion="5")


@pytest.mark.parametrize("family", ["llava15", "llava_next", "blip2", "internvl15", "qwen2_vl"])
def test_every_tiny_family_that_transformers_has_is_equal(opsin, family):
    done = opsin("verify", "--tiny", family, "--json")
    assert done.code == 0, done
    steps = {step["rung"]: step["verdict"] for step in json.loads(done.out)["steps"]}
    assert steps.pop("ids") == "skipped"
    assert set(steps.values()) == {"equal"}


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


def test_what_transformers_cannot_express_is_refused(opsin):
    assert "connector of two layers" in opsin("verify", "--tiny", "llava").refused()
