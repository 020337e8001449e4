"""Published config files, read and written: what they mean, what they leave out, what is refused."""

import json
from typing import Any

import pytest

from families.published import (
    CLIP_L_336,
    CONFIGS,
    HF_15,
    HF_16,
    HF_LLAMA,
    ORIGINAL_15,
    ORIGINAL_16,
    PINPOINTS,
    VICUNA_7B,
)
from opsin import families
from opsin.errors import ConfigError
from opsin.families import HubConfig
from opsin.families._hub import original_resolution, read_pinpoints
from opsin.families._parts import CLIP_L_336 as TOWER
from opsin.spec.connector import MLPConnector
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import AnyRes, CenterCrop, Pad
from parity.case import ROOT, SHARED

CLIP_PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 336},
}
ORIGINAL = ORIGINAL_15 | VICUNA_7B
HF = HF_15 | {"text_config": HF_LLAMA}
NEXT = HF_16 | {"text_config": HF_LLAMA}


def read(hub: HubConfig, preprocessor: HubConfig | None = None) -> VLMConfig:
    return families.family_for_hub(hub).from_hub(hub, preprocessor)


def changed(hub: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The file with some keys set; `part__key` sets a key of a part."""
    hub = json.loads(json.dumps(hub))
    for key, value in changes.items():
        part, _, inner = key.rpartition("__")
        (hub[part] if part else hub)[inner] = value
    return hub


@pytest.mark.parametrize("id", CONFIGS)
def test_published_files_give_the_preset(id: str) -> None:
    assert read(CONFIGS[id]) == families.preset(id).config


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_written_files_read_back(family: families.Family) -> None:
    """Every preset in every layout that can hold it; only what the layout has no word for may differ."""
    for preset in (*family.presets, family.tiny):
        config = preset.config
        for layout in ("original", "hf", "hf-v5"):
            try:
                files = family.write(config, layout)
            except ConfigError:
                continue
            files = json.loads(json.dumps(files))
            back = read(files["config.json"], files.get("preprocessor_config.json"))
            expected = config
            if layout == "original":
                if back.image_token_id is None:  # LLaVA's authors mark slots outside the vocabulary
                    expected = config.replace(image_token_id=None)
                if isinstance(config.resolution, AnyRes):
                    back = back.replace(resolution=back.resolution.replace(compat=config.resolution.compat))
            elif isinstance(config.resolution, AnyRes):
                expected = config.replace(resolution=config.resolution.replace(compat="hf"))
            assert back == expected


def test_what_a_layout_cannot_say_is_refused_with_the_reason() -> None:
    def refused(id: str, layout: str, reason: str, **changes: Any) -> None:
        config = families.preset(id).config.replace(**changes)
        with pytest.raises(ConfigError, match=reason):
            families.family_of(config).write(config, layout)

    three = MLPConnector(num_layers=3)
    refused("llava-1.5-tiny", "hf", "connector of two layers; this one has 3.*'original'", connector=three)
    refused("llava-1.5-7b", "hf", "marks picture slots by a token id, and this model has none")
    tiny = families.preset("llava-next-tiny").config
    refused(
        "llava-next-tiny", "hf", "merges tiles as 'spatial_unpad'", resolution=tiny.resolution.replace(merge="flat")
    )
    vision = tiny.vision.replace(out_layers=(-2, -1))
    refused("llava-next-tiny", "original", "names one tower layer", vision=vision)


@pytest.mark.parametrize("folder", [ROOT / "tests/goldens/llava", SHARED / "goldens/llava"], ids=["ours", "shared"])
def test_every_recorded_model_has_a_config_that_is_read(folder: Any) -> None:
    files = [file for file in folder.glob("*/config.json") if (file.parent / "model.safetensors").exists()]
    if not files:
        pytest.skip(f"no recorded models in {folder}")
    for file in files:
        read(json.loads(file.read_text()))


def test_layouts_are_told_by_content_not_by_model_type() -> None:
    """`llava` is the model_type of both kinds."""
    assert ORIGINAL["model_type"] == HF["model_type"] == "llava"
    assert isinstance(read(ORIGINAL).resolution, Pad)
    assert isinstance(read(HF).resolution, CenterCrop)
    assert read(changed(ORIGINAL, model_type="llava_llama")) == read(ORIGINAL)


def test_missing_keys_mean_the_class_defaults_of_transformers() -> None:
    everything = HF | {"text_config": {**HF_LLAMA, **VICUNA_7B, "rope_theta": 1e4, "hidden_act": "silu"}}
    assert read(HF) == read(everything)
    no_tower = {key: value for key, value in HF.items() if key != "vision_config"}
    assert read(no_tower).vision == read(HF).vision
    assert read(changed(HF, text_config={"model_type": "llama", "vocab_size": 32064})).decoder.norm_eps == 1e-6
    without_pinpoints = {key: value for key, value in NEXT.items() if key != "image_grid_pinpoints"}
    assert read(without_pinpoints) == read(NEXT)
    # CLIPVisionConfig's own defaults are those of the base tower, not of the large one.
    assert read(changed(HF, vision_config={"image_size": 336, "patch_size": 14})).vision.dim == 768


def test_files_of_transformers_5_say_the_same_as_published_ones() -> None:
    text = {**HF_LLAMA, **VICUNA_7B, "head_dim": 128, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert read(HF | {"dtype": "float16", "image_seq_length": 576, "text_config": text}) == read(HF)
    moved = {**text, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert read(HF | {"text_config": moved}).decoder.rope.theta == 5e5


def test_pinpoints_may_be_a_list_a_string_or_a_range() -> None:
    wanted = tuple((w, h) for w, h in PINPOINTS)
    assert read_pinpoints(PINPOINTS, 336) == wanted
    assert read_pinpoints("[(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]", 336) == wanted
    assert read_pinpoints("(1x1),...,(2x3)", 336) == tuple((336 * x, 336 * y) for x in (1, 2) for y in (1, 2, 3))
    for bad in ("", "os.system('x')", [], [[336]], [["336", 672]], 5, None, "(1x1)"):
        with pytest.raises(ConfigError, match="image_grid_pinpoints"):
            read_pinpoints(bad, 336)


def test_pinpoints_that_tiles_do_not_fill_are_refused() -> None:
    with pytest.raises(ConfigError, match="resolution 300x336 does not consist of whole tiles of 336"):
        read(ORIGINAL_16 | VICUNA_7B | {"image_grid_pinpoints": [[300, 336]]})
    with pytest.raises(ConfigError, match="whole tiles of 336"):
        read(NEXT | {"image_grid_pinpoints": [[448, 448]]})


def test_the_preprocessor_decides_between_crop_and_pad() -> None:
    assert isinstance(read(HF, CLIP_PREPROCESSOR).resolution, CenterCrop)
    padded = read(HF, CLIP_PREPROCESSOR | {"do_pad": True}).resolution
    assert padded == Pad(tile_size=336)
    other = read(HF, CLIP_PREPROCESSOR | {"do_pad": True, "image_mean": [0.5, 0.5, 0.5]})
    assert other.resolution == Pad(tile_size=336, fill=(127, 127, 127))
    assert other.vision.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"do_center_crop": False}, "do_center_crop False"),
        ({"do_normalize": False}, "do_normalize False"),
        ({"resample": 2}, "resample 2 is not served; it must be 3"),
        ({"rescale_factor": 1.0}, "must be 1/255"),
        ({"size": {"shortest_edge": 224}}, "size {'shortest_edge': 224} differs from the tower's image_size 336"),
        ({"crop_size": 224}, "crop_size 224 differs"),
        ({"image_mean": [0.5]}, "mean"),
        ({"image_std": [0.0, 1.0, 1.0]}, "std"),
    ],
)
def test_a_preprocessor_that_does_something_else_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(HF, CLIP_PREPROCESSOR | changes)


def test_two_files_that_disagree_on_pinpoints_are_refused() -> None:
    read(NEXT, CLIP_PREPROCESSOR | {"image_grid_pinpoints": PINPOINTS})
    with pytest.raises(ConfigError, match="image_grid_pinpoints differ"):
        read(NEXT, CLIP_PREPROCESSOR | {"image_grid_pinpoints": PINPOINTS[:2]})


@pytest.mark.parametrize(
    ("hub", "reason"),
    [
        (changed(ORIGINAL, mm_projector_type="mlp2x_gelo"), "'mlp2x_gelo' is not known .did you mean 'mlp2x_gelu'"),
        (changed(ORIGINAL, mm_projector_type="mlp2x_res2x_gelu"), "Known: linear, mlpNx_gelu"),
        (changed(ORIGINAL, mm_projector_type="identity"), "mm_projector_type 'identity'"),
        (changed(ORIGINAL, mm_vision_tower="google/siglip-so400m"), "'google/siglip-so400m' is not a known tower"),
        (changed(ORIGINAL, mm_vision_select_feature="slicefour_patch"), "mm_vision_select_feature"),
        (changed(ORIGINAL, mm_vision_select_layer=-30), "out_layers names hidden state -30"),
        (changed(ORIGINAL, mm_hidden_size=768), "mm_hidden_size 768 differs from the 1024 channels"),
        (changed(ORIGINAL, image_aspect_ratio="highres"), "image_aspect_ratio 'highres' is not known"),
        (
            changed(ORIGINAL, image_aspect_ratio="anyres", image_grid_pinpoints=None),
            "anyres needs image_grid_pinpoints",
        ),
        (changed(ORIGINAL_16 | VICUNA_7B, mm_patch_merge_type="spatial_unpa"), "merge"),
        (changed(ORIGINAL, mm_resampler_type="perceiver"), "mm_resampler_type 'perceiver' changes"),
        (changed(ORIGINAL, s2=True), "s2 True changes"),
        (changed(ORIGINAL, mm_gate="tanh"), "key 'mm_gate' .value 'tanh'. is not known and may change"),
        (changed(ORIGINAL, rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.*changes what the model"),
        (changed(ORIGINAL, attention_bias=True), "attention_bias True changes"),
        (changed(ORIGINAL, hidden_act="gelu"), "hidden_act 'gelu' changes.*only 'silu'"),
        (changed(ORIGINAL, tie_word_embeddings=True), "tie_word_embeddings True"),
        (changed(ORIGINAL, quantization_config={"bits": 4}), "quantization_config"),
        (changed(ORIGINAL, num_key_value_heads=5), "num_heads 32 is not a multiple of num_kv_heads 5"),
        (changed(ORIGINAL, hidden_size="wide"), "dim.*'wide'"),
        (changed(ORIGINAL, num_attention_heads=0), "num_heads"),
        (changed(HF, projector_hidden_act="relu"), "projector_hidden_act 'relu'"),
        (changed(HF, multimodal_projector_bias=False), "multimodal_projector_bias False"),
        (changed(HF, vision_feature_select_strategy="cls"), "vision_feature_select_strategy 'cls'"),
        (changed(HF, image_token_index=99999), "image_token_id 99999 lies outside the vocabulary of 32064"),
        (changed(HF, text_config__model_type="qwen2"), "type 'qwen2' is not served. Known: llama, mistral"),
        (changed(HF, text_config__mlp_bias=True), "text_config: mlp_bias True"),
        (changed(HF, text_config__rope_parameters={"rope_type": "llama3", "factor": 8}), "only plain rotary"),
        (changed(HF, vision_config__model_type="siglip_vision_model"), "'siglip_vision_model' is not served"),
        (changed(HF, vision_config__hidden_act="gelu_new"), "vision_config: activation"),
        (changed(HF, text_config=[1, 2]), "malformed"),
        (changed(NEXT, use_image_newline_parameter=False), "use_image_newline_parameter False"),
        (changed(NEXT, vision_feature_select_strategy="full"), "class tokens"),
        (changed(NEXT, text_config={"model_type": "mistral", "vocab_size": 32064}), "sliding_window 4096 is shorter"),
        (
            changed(NEXT, text_config={"model_type": "mistral", "sliding_window": 1024}),
            "sliding_window 1024 is shorter",
        ),
    ],
)
def test_keys_that_would_change_the_numbers_are_refused(hub: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(hub)


def test_keys_that_change_nothing_are_ignored() -> None:
    harmless = {
        "auto_map": {"AutoModel": "modeling_evil.Evil"},
        "transformers_version": "4.31.0",
        "torch_dtype": "float16",
        "use_cache": False,
        "mm_vision_tower_lr": 2e-6,
        "mm_unknown_but_off": None,
        "tokenizer_padding_side": "right",
        "attention_dropout": 0.0,
        "_name_or_path": "./checkpoints/x",
    }
    assert read(ORIGINAL | harmless) == read(ORIGINAL)
    assert read(HF | harmless) == read(HF)


@pytest.mark.parametrize(
    ("hub", "name"),
    [
        (CONFIGS["llava-7b-v0"], "llava_v0"),
        (CONFIGS["llava-7b-v1.1"], "v1"),
        (ORIGINAL, "v1"),
        (HF, "v1"),
        (CONFIGS["llava-next-mistral-7b"], "mistral_instruct"),
        (CONFIGS["llava-next-mistral-7b-hf"], "mistral_instruct"),
        (CONFIGS["llava-next-34b"], "chatml_direct"),
        (CONFIGS["llava-next-34b-hf"], "chatml_direct"),
    ],
)
def test_the_chat_format_follows_from_the_file(hub: dict[str, Any], name: str) -> None:
    assert read(hub).chat.name == name


def test_learned_tokens_stand_around_pictures_where_the_file_says_so() -> None:
    for hub, tokens in ((CONFIGS["llava-7b-v0"], ["<im_start>"]), (ORIGINAL, [])):
        before = read(hub).chat.markup.before
        assert [piece.token for piece in before if piece.kind == "control"] == tokens


def test_a_known_repository_brings_its_own_chat_format() -> None:
    """Llama-2 previews cannot be told from Vicuna by their files."""
    known = families.preset("llava-llama-2-13b").config.chat
    hub = changed(ORIGINAL, mm_projector_type="linear", mm_vision_tower="openai/clip-vit-large-patch14")
    hub["image_aspect_ratio"] = None
    assert families.family_for_hub(hub).from_hub(hub).chat.name == "v1"
    assert families.family_for_hub(hub).from_hub(hub, chat=known).chat.name == "llava_llama_2"


def test_merge_types_of_the_authors_are_read() -> None:
    def merge(name: str, aspect: str = "anyres") -> AnyRes:
        hub = {"image_aspect_ratio": aspect, "image_grid_pinpoints": PINPOINTS, "mm_patch_merge_type": name}
        resolution = original_resolution(hub, TOWER)
        assert isinstance(resolution, AnyRes)
        return resolution

    assert merge("flat").merge == "flat"
    assert merge("spatial").merge == "spatial"
    assert merge("spatial_unpad").uses_newline
    assert merge("spatial_maxpool2x2").merge == "spatial_maxpool2x2"
    assert (merge("spatial_unpad_nobase").merge, merge("spatial_unpad_nobase").base) == ("spatial_unpad", "none")
    assert merge("spatial_unpad", "anyres_max_9").max_base_tiles == 9


def test_several_tower_layers_widen_the_features() -> None:
    config = read(HF | {"vision_feature_layer": [-3, -1], "vision_feature_select_strategy": "full"})
    assert config.vision.out_layers == (-3, -1)
    assert config.vision.out_dim == 2048
    assert config.vision.class_token == "keep"
    assert config.plan((100, 100)).num_slots == 577


def test_a_tower_can_be_described_inside_the_file() -> None:
    inline = {key: value for key, value in CLIP_L_336.items() if key != "model_type"}
    hub = changed(ORIGINAL, mm_vision_tower="vision_tower_config", vision_tower_config=inline)
    assert read(hub) == read(ORIGINAL)
    family = families.family_for_hub(hub)
    assert family.tower(hub) is None
    assert family.tower(ORIGINAL) == "openai/clip-vit-large-patch14-336"
    assert family.tower(changed(ORIGINAL, mm_vision_tower="./ckpt/clip-vit-large-patch14")) == (
        "openai/clip-vit-large-patch14"
    )
