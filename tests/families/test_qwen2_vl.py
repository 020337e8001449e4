"""Qwen2-VL's published files: what they mean, what they leave out, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from families.published import CONFIGS
from opsin import families, weights
from opsin.collate import pad
from opsin.encode import Encoder
from opsin.errors import ConfigError
from opsin.families._qwen2_vl_hub import read_config
from opsin.families.qwen2_vl import INSTRUCT, QWEN2_VL
from opsin.spec.model import VLMConfig
from opsin.spec.native import Native, VideoSampling
from opsin.text.messages import ask

HUB = CONFIGS["qwen2-vl-7b-instruct"]
PREPROCESSOR: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}


def read(hub: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> VLMConfig:
    return read_config(hub, preprocessor, INSTRUCT)


def test_the_published_preprocessor_gives_the_preset() -> None:
    assert read(HUB, PREPROCESSOR) == families.preset("qwen2-vl-7b-instruct").config


def test_a_partial_file_means_the_defaults_of_its_classes() -> None:
    """transformers' defaults describe the 72B, but with another norm; the hub's files must be read, not assumed."""
    config = read({"model_type": "qwen2_vl"})
    published = families.preset("qwen2-vl-72b-instruct").config
    assert config == published.replace(decoder=published.decoder.replace(norm_eps=1e-5))


def test_a_preprocessor_without_limits_means_the_defaults_of_its_class() -> None:
    resolution = read(HUB, {"image_processor_type": "Qwen2VLImageProcessor"}).resolution
    assert resolution == Native(min_pixels=3136, max_pixels=1003520)


def test_transformers_5_says_the_limits_as_edges() -> None:
    size = {"size": {"shortest_edge": 200704, "longest_edge": 1003520}}
    assert read(HUB, size).resolution == Native(min_pixels=200704, max_pixels=1003520)


def test_nested_and_flat_files_mean_the_same() -> None:
    text = {key: value for key, value in HUB.items() if key not in ("vision_config", "architectures", "model_type")}
    rope = {"mrope_section": [16, 24, 24], "rope_theta": 1e6, "rope_type": "default", "type": "mrope"}
    nested = {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": False,
        "text_config": {**text, "rope_scaling": None, "rope_theta": None, "rope_parameters": rope},
        "vision_config": HUB["vision_config"] | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"}},
    }
    assert read(nested) == read(HUB)


@pytest.mark.parametrize("place", ["root", "text_config"])
def test_a_tied_head_is_found_wherever_it_is_said(place: str) -> None:
    hub = {"model_type": "qwen2_vl", "text_config": {}, "tie_word_embeddings": place == "root"}
    if place == "text_config":
        hub["text_config"] = {"tie_word_embeddings": True}
    assert read(hub).decoder.head == "tied"


@pytest.mark.parametrize(
    ("changes", "preprocessor", "reason"),
    [
        ({"use_sliding_window": True}, None, "use_sliding_window True changes what the model computes"),
        ({"hidden_act": "gelu"}, None, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, None, "positions of type 'yarn' are not served"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 23]}}, None, "do not add up to half"),
        ({"vision_config": {"spatial_merge_size": 4}}, None, "spatial_merge_size 4"),
        ({"vision_config": {"in_chans": 1}}, None, "in_chans 1"),
        ({"vision_config": {"hidden_size": 1536}}, None, "1536 wide, the language model 3584"),
        ({"vision_config": {"rope_parameters": {"rope_theta": 5.0}}}, None, "rope_theta 5.0 is not served"),
        ({"vision_config": {"embed_dim": "x"}}, None, "malformed|embed_dim|dim"),
        ({"rope_scale": 2}, None, "key 'rope_scale'.*did you mean 'rope_scaling'"),
        ({"image_token_id": 999_999}, None, "image_token_id 999999 lies outside the vocabulary"),
        ({"video_token_id": 999_999}, None, "video_token_id 999999 lies outside the vocabulary"),
        ({}, {"patch_size": 16}, "patch_size 16 is not served; it must be 14"),
        ({}, {"merge_size": 1}, "merge_size 1"),
        ({}, {"resample": 2}, "resample 2"),
        ({}, {"do_normalize": False}, "do_normalize False"),
        ({}, {"rescale_factor": 1 / 128}, "must be 1/255"),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    changes: dict[str, Any], preprocessor: dict[str, Any] | None, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        QWEN2_VL.from_hub(HUB | changes, preprocessor)


def test_what_the_files_have_no_words_for_survives_an_export(tmp_path: Path) -> None:
    config = families.preset("qwen2-vl-tiny").config
    assert config.decoder.rope is not None
    config = config.replace(
        decoder=config.decoder.replace(rope=config.decoder.rope.replace(picture_span="space")),
        resolution=config.resolution.replace(small_sides="refuse", video=VideoSampling(fps=1.0)),
    )
    for layout in ("hf", "hf-v5"):
        files = json.loads(json.dumps(QWEN2_VL.write(config, layout)))
        assert QWEN2_VL.from_hub(files["config.json"], files["preprocessor_config.json"]) == config
    model = weights.Model(vlm=weights.build(config, seed=0), config=config, name="x")
    assert weights.export(tmp_path / "out", model, layout="hf").changed == ()


@pytest.mark.parametrize(
    ("part", "changes", "reason"),
    [
        ("vision", {"qk_norm": True}, "differs from Qwen2-VL's in more than its sizes"),
        ("vision", {"out_layers": (-2,)}, "differs from Qwen2-VL's in more than its sizes"),
        ("decoder", {"attention_bias": "none"}, "biases on queries, keys and values"),
        ("resolution", {"factor": 28}, "no words for factor 28 with patches of 7 px"),
    ],
)
def test_a_model_that_the_layout_cannot_hold_is_refused(part: str, changes: dict[str, Any], reason: str) -> None:
    config = families.preset("qwen2-vl-tiny").config
    config = config.replace(**{part: getattr(config, part).replace(**changes)})
    with pytest.raises(ConfigError, match=reason):
        QWEN2_VL.write(config, "hf")
    with pytest.raises(ConfigError, match="use 'hf'"):
        QWEN2_VL.write(families.preset("qwen2-vl-tiny").config, "original")


def test_a_head_that_was_saved_although_it_is_tied_is_left_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = families.preset("qwen2-vl-tiny").config
    model = weights.Model(vlm=weights.build(config, seed=0), config=config, name="x")
    weights.export(tmp_path / "out", model, layout="hf")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "out" / "model.safetensors")
    assert weights.load(tmp_path / "out").vlm.decoder.head is None


@pytest.mark.parametrize("size", ["2b", "7b", "72b"])
def test_base_and_instruct_differ_in_the_chat_alone(size: str) -> None:
    base, instruct = (families.preset(f"qwen2-vl-{size}{suffix}") for suffix in ("", "-instruct"))
    assert base.config.replace(chat=instruct.config.chat) == instruct.config
    assert base.generation["repetition_penalty"] == 1.05
    assert base.generation["top_k"] == instruct.generation["top_k"] == 1


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((512, 512), 324), ((40, 400), 14), ((224, 224), 64), ((1920, 1080), 2691), ((1, 1), 4), ((4096, 4096), 16384)],
)
def test_tokens_are_those_of_the_sheet(size: tuple[int, int], tokens: int) -> None:
    assert families.preset("qwen2-vl-7b").config.plan(size).num_slots == tokens


@pytest.mark.parametrize("head", ["tied", "own"])
def test_transformers_computes_the_same_from_what_is_exported(tmp_path: Path, head: Any) -> None:
    """Both layouts, two pictures of different sizes, random weights: the same logits."""
    transformers = pytest.importorskip("transformers")
    config = families.preset("qwen2-vl-tiny").config
    config = config.replace(
        vision=config.vision.replace(patch_size=14, image_size=14),  # transformers assumes it when it counts
        resolution=config.resolution.replace(factor=28, min_pixels=4 * 784, max_pixels=30 * 784),
        decoder=config.decoder.replace(head=head),
    )
    model = weights.Model(vlm=weights.build(config, seed=3).eval(), config=config, name="x")
    conversation = ask("what?", toys.picture((100, 60)), toys.picture((60, 170), 1))
    batch = pad([Encoder(config, toys.byte_tokenizer(tmp_path / "tokenizer")).encode(conversation)])
    with torch.no_grad():
        ours = model.vlm.logits(model.vlm.hidden(batch))
        for layout in ("hf", "hf-v5"):
            weights.export(tmp_path / layout, model, layout=layout)
            loaded = transformers.Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / layout).eval()
            theirs = loaded(
                input_ids=batch.ids,
                pixel_values=batch.patches,
                image_grid_thw=batch.grids,
                mm_token_type_ids=(batch.ids == config.image_token_id).long(),
            ).logits
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
