"""Parts of different families in one model: written in YAML, built, saved, loaded, talked to; and what does not fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mixes
import toys
from opsin import families, weights
from opsin.cli.app import run as main
from opsin.errors import ConfigError, OpsinError, UnknownNameError
from opsin.families import MIX, family_of
from opsin.generate import Chat, Sampling
from opsin.spec.decoder import RopeConfig
from opsin.spec.model import VLMConfig

PAGE = (Path(__file__).parents[1] / "docs/mixing.md").read_text()


@pytest.mark.parametrize("name", mixes.MIXES)
def test_a_mix_is_saved_loaded_and_talked_to(name: str, tmp_path: Path) -> None:
    config = mixes.MIXES[name]
    tokenizer = toys.byte_tokenizer(tmp_path / "tokenizer")
    vlm = weights.build(config, seed=1).eval()
    answers = []
    weights.save_native(tmp_path / "saved", vlm, config, tokenizer)
    for model in (
        weights.Model(vlm=vlm, config=config, name=name, tokenizer_folder=tmp_path / "tokenizer"),
        weights.load(tmp_path / "saved"),
    ):
        chat = Chat(model, sampling=Sampling(max_new_tokens=6))
        answers.append(chat.ask("What is this?", toys.picture((60, 35))).ids)
    assert answers[0] == answers[1]
    assert len(answers[0]) > 0


@pytest.mark.parametrize("name", mixes.MIXES)
def test_a_mix_has_no_published_layout(name: str, tmp_path: Path) -> None:
    config = mixes.MIXES[name]
    assert family_of(config) is MIX
    model = weights.Model(vlm=weights.build(config), config=config, name=name, tokenizer_folder=None)
    with pytest.raises(ConfigError, match=r"no published family.*save_native"):
        weights.export(tmp_path / "out", model, layout="hf")
    assert not (tmp_path / "out").exists()


def test_parts_of_a_mix_start_from_other_models(tmp_path: Path) -> None:
    """A tower of one model, a language model of another."""
    config = mixes.MIXES["mix-anyres-resampler-qwen2"]
    vlm = weights.build(config, seed=1)
    for preset, part in (("llava-next-tiny", "vision"), ("qwen2-vl-tiny", "decoder")):
        source = families.preset(preset).config
        other = weights.build(source, seed=7)
        weights.save_native(tmp_path / preset, other, source)
        weights.load_part(vlm, part, tmp_path / preset)  # type: ignore[arg-type]
        for key, tensor in getattr(other, part).state_dict().items():
            torch.testing.assert_close(getattr(vlm, part).state_dict()[key], tensor, rtol=0, atol=0)


def test_yaml_and_python_of_the_page_make_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written = re.search(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    python = re.search(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert written is not None
    assert python is not None
    Path("mix.yaml").write_text(written[1])
    names: dict[str, Any] = {}
    exec(compile(python[1], "mixing.md", "exec"), names)
    assert families.mix(yaml.safe_load(written[1])) == names["config"]
    for command in re.findall(r"^opsin (.*)$", PAGE, re.MULTILINE):
        assert main(command.split()) == 0, command
    assert "resampler" in capsys.readouterr().out


NEXT, QWEN2, BLIP2, INTERNVL = (
    families.preset(f"{name}-tiny").config for name in ("llava-next", "qwen2-vl", "blip2", "internvl-1.5")
)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (NEXT, {"vision": NEXT.vision.replace(image_size=56)}, "tile_size .* differs from vision.image_size"),
        (NEXT, {"resolution": QWEN2.resolution}, "'native' gives pictures of any size"),
        (NEXT, {"vision": NEXT.vision.replace(class_token="keep")}, "class tokens have no place"),
        (NEXT, {"image_token_id": 10**6}, "outside the vocabulary"),
        (QWEN2, {"connector": NEXT.connector}, "vision.patch_block must be 1"),
        (NEXT, {"connector": QWEN2.connector}, "vision.patch_block must be 2"),
        (QWEN2, {"resolution": QWEN2.resolution.replace(factor=21)}, "factor 21 is not a multiple of the 14 px"),
        (
            BLIP2,
            {"connector": mixes.MIXES["mix-eva-resampler-llama"].connector},
            "a class token has none; use vision.class_token 'drop'",
        ),
    ],
)
def test_parts_that_disagree_are_one_clear_error(base: VLMConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base.replace(**changes)


def test_rotation_sections_must_fill_a_head() -> None:
    with pytest.raises(ConfigError, match="sections"):
        QWEN2.decoder.replace(rope=RopeConfig(sections=(1, 1, 1)))


def test_unknown_names_in_a_file_get_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"vision": "llava-next-tiny", "connector": "llava-next-tiny", "decoder": "qwen2-vl-tiny"}
    good |= {"resolution": "llava-next-tiny", "chat": "qwen2_vl"}
    families.mix(good)
    for change, error, message in (
        ({"vision": "lava-next-tiny"}, UnknownNameError, "llava-next-tiny"),
        ({"chat": "qwen2-vl"}, UnknownNameError, "qwen2_vl"),
        ({"decodr": 1}, ConfigError, "decoder"),
        ({"decoder": {"from": "qwen2-vl-tiny", "num_layer": 3}}, ConfigError, "num_layers"),
    ):
        with pytest.raises(error, match=message):
            families.mix(good | change)
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(good | {"vision": "qwen2-vl-tiny"}))
    assert main(["show", str(tmp_path / "mix.yaml")]) != 0
    shown = capsys.readouterr().err
    assert "patch_block" in shown
    assert "Traceback" not in shown


def test_a_mixed_up_folder_is_one_clear_error(tmp_path: Path) -> None:
    """Weights of one family beside the config of another."""
    for name in ("qwen2-vl-tiny", "llava-1.5-tiny"):
        config = families.preset(name).config
        model = weights.Model(vlm=weights.build(config), config=config, name=name, tokenizer_folder=None)
        weights.export(tmp_path / name, model, layout="hf")
    wrong = tmp_path / "qwen2-vl-tiny" / "config.json"
    wrong.write_text((tmp_path / "llava-1.5-tiny" / "config.json").read_text())
    with pytest.raises(OpsinError) as caught:
        weights.load(tmp_path / "qwen2-vl-tiny")
    assert "missing" in str(caught.value)
    assert len(str(caught.value)) < 4000
