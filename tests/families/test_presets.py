"""Every published size: its tensors, its parameters, its picture tokens, its name."""

import json
from functools import cache
from math import prod
from pathlib import Path

import pytest

from families.published import CONFIGS, TENSORS
from opsin import families
from opsin.errors import ConfigError, UnknownNameError
from opsin.families import Preset
from opsin.weights.init import on_meta
from opsin.weights.rules import Renamer

PRESETS = families.all_presets()
EVERY = (*PRESETS, *(family.tiny for family in families.FAMILIES))


@cache
def shapes_of(id: str) -> dict[str, tuple[int, ...]]:
    """Our names and shapes at full size, from the model on the meta device."""
    return {name: tuple(tensor.shape) for name, tensor in on_meta(families.preset(id).config).state_dict().items()}


def by_id(preset: Preset) -> str:
    return preset.id


def test_every_preset_has_its_published_tensors_listed() -> None:
    assert {preset.id for preset in PRESETS} == set(TENSORS)


@pytest.mark.parametrize("preset", PRESETS, ids=by_id)
def test_every_tensor_of_the_published_checkpoint_is_accounted_for(preset: Preset) -> None:
    """The full-size model, on the meta device, written backwards into its layout: the repository's names and shapes."""
    name, published = TENSORS[preset.id]
    family = families.family_of(preset.config)
    renamer = Renamer(next(layout for layout in family.layouts(preset.config) if layout.name == name))
    written = {}
    for target, shape in shapes_of(preset.id).items():
        match = renamer.from_target(target)
        assert match is not None, target
        written[match.source] = match.source_shape(shape)
    assert written == published
    assert sum(prod(shape) for shape in published.values()) == preset.parameters


@pytest.mark.parametrize("preset", EVERY, ids=by_id)
def test_rules_of_every_layout_are_bijective(preset: Preset) -> None:
    targets = shapes_of(preset.id)
    for layout in families.family_of(preset.config).layouts(preset.config):
        renamer = Renamer(layout)
        stored = [target for target in targets if renamer.fills(target) is None]
        matches = [match for target in stored if (match := renamer.from_target(target)) is not None]
        assert len(matches) == len(stored)
        for match in matches:
            assert match in renamer.from_source(match.source)
            assert not renamer.drops(match.source)
        sources = {match.source for match in matches}
        back = [one.target for source in sources for one in renamer.from_source(source)]
        assert sorted(back) == sorted(stored)


@pytest.mark.parametrize("preset", EVERY, ids=by_id)
def test_parameters_are_those_of_the_model(preset: Preset) -> None:
    assert sum(prod(shape) for shape in shapes_of(preset.id).values()) == preset.parameters


@pytest.mark.parametrize(
    ("id", "billions"),
    [
        # Model sizes as the hub shows them for the safetensors repositories.
        ("llava-1.5-7b-hf", "7.06"),
        ("llava-1.5-13b-hf", "13.35"),
        ("llava-next-vicuna-7b-hf", "7.06"),
        ("llava-next-mistral-7b-hf", "7.57"),
        ("llava-next-34b-hf", "34.75"),
    ],
)
def test_parameters_are_as_published(id: str, billions: str) -> None:
    assert f"{families.preset(id).parameters / 1e9:.2f}" == billions


def test_a_typo_in_a_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'llava-1.5-7' \(did you mean 'llava-1.5-7b'"):
        families.preset("llava-1.5-7")
    with pytest.raises(UnknownNameError, match="did you mean 'llava_next'"):
        families.family("llava_nxt")
    with pytest.raises(UnknownNameError, match="did you mean 'mistral_instruct'"):
        families.chat("mistral")


def test_presets_are_found_by_their_repository() -> None:
    found = families.preset_of_hub("llava-hf/llava-v1.6-mistral-7b-hf")
    assert found is not None
    assert found.id == "llava-next-mistral-7b-hf"
    assert families.preset_of_hub("someone/else") is None


@pytest.mark.parametrize("preset", EVERY, ids=by_id)
def test_every_preset_says_where_its_numbers_come_from_and_how_to_get_it(preset: Preset) -> None:
    assert preset.source
    if preset in PRESETS:
        assert bool(preset.hub) != bool(preset.access), "either a repository holds it, or it says what to do instead"
    if preset.twin is not None:
        assert families.preset(preset.twin).twin == preset.id


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_every_config_belongs_to_the_family_that_lists_it(family: families.Family) -> None:
    for preset in (*family.presets, family.tiny):
        assert families.family_of(preset.config) is family


def test_twins_differ_in_pixels_and_in_vocabulary_rows() -> None:
    """What the converters changed: 64 rows, `<image>` the first of them, and how pictures are prepared."""
    for preset in PRESETS:
        if preset.id.endswith("-hf"):
            original = families.preset(preset.id.removesuffix("-hf")).config
            rows = original.decoder.vocab_size
            assert preset.config.decoder == original.decoder.replace(vocab_size=rows + 64)
            assert preset.config.image_token_id == rows
            assert preset.config.resolution != original.resolution
            assert preset.config.chat == original.chat


@pytest.mark.parametrize("size", [(1, 1), (336, 336), (640, 480), (33, 1000), (4000, 3000)])
def test_llava_15_gives_every_picture_576_tokens_and_llava_256(size: tuple[int, int]) -> None:
    assert families.preset("llava-1.5-7b").config.plan(size).num_slots == 576
    assert families.preset("llava-1.5-7b-hf").config.plan(size).num_slots == 576
    assert families.preset("llava-7b-v0").config.plan(size).num_slots == 256


@pytest.mark.parametrize(
    ("size", "original", "hf"),
    [
        # The recorded table of sizes: tokens by the authors' arithmetic and by transformers'.
        ((336, 336), 1176, 1176),
        ((672, 672), 2928, 2928),
        ((640, 480), 2340, 2340),
        ((250, 300), 1276, 1080),
        ((110, 352), 1296, 1392),
        ((1000, 3000), 2376, 2376),
    ],
)
def test_llava_next_tokens_follow_the_recorded_table(size: tuple[int, int], original: int, hf: int) -> None:
    assert families.preset("llava-next-vicuna-7b").config.plan(size).num_slots == original
    assert families.preset("llava-next-vicuna-7b-hf").config.plan(size).num_slots == hf


@pytest.mark.parametrize(
    ("size", "tokens"),
    [((224, 224), 528), ((640, 480), 1632), ((480, 640), 1642), ((1920, 1080), 1628), ((1344, 224), 1808)],
)
def test_the_hd_variant_tiles_at_224_pixels(size: tuple[int, int], tokens: int) -> None:
    assert families.preset("llava-1.5-13b-hd").config.plan(size).num_slots == tokens


def test_no_published_description_is_taken_by_two_families() -> None:
    for hub in CONFIGS.values():
        assert sum(family.matches(hub) for family in families.FAMILIES) == 1


def test_a_model_of_no_family_is_refused_by_name() -> None:
    hub = {"model_type": "idefics", "architectures": ["IdeficsForVisionText2Text"]}
    with pytest.raises(ConfigError, match=r"'idefics'.*no family here reads.*LLaVA-NeXT"):
        families.family_for_hub(hub)


def test_presets_survive_json() -> None:
    for preset in EVERY:
        data = json.loads(json.dumps(preset.model_dump(mode="json")))
        assert Preset.parse(data, where="json") == preset


def test_figures_open_the_family_files() -> None:
    for family in families.FAMILIES:
        text = (Path(families.__file__).parent / f"{family.name}.py").read_text()
        assert text.startswith('"""')
        assert "nn/vision.py:VisionTower" in text.split('"""')[1]
