"""InternVL-1.5: published files in both layouts, what they leave out, what is refused; from pictures to slots."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toys
from families.published_internvl import CONFIGS, INTERNLM2_1_8B, INTERNVIT_300M, chat_config
from opsin import families, weights
from opsin.encode import Encoder
from opsin.errors import ConfigError
from opsin.families import HubConfig
from opsin.families._internvl_layouts import possible_names
from opsin.families._parts import INTERNVIT_6B
from opsin.families._parts import INTERNVIT_300M as TOWER
from opsin.nn.connectors import make_connector
from opsin.spec.connector import PixelShuffleConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import DynamicTiles, Pad, Squash
from opsin.spec.rules import Split
from opsin.text.messages import Conversation, assistant, user
from opsin.weights.exporter import to_layout

ORIGINAL = CONFIGS["internvl-1.5-2b"]
NATIVE: dict[str, Any] = {
    "model_type": "internvl",
    "architectures": ["InternVLForConditionalGeneration"],
    "image_token_id": 92546,
    "tie_word_embeddings": False,
    "text_config": {"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 16, "vocab_size": 92553},
    "vision_config": {"model_type": "internvl_vision", "attention_bias": True},
}


def read(hub: HubConfig, preprocessor: HubConfig | None = None) -> VLMConfig:
    return families.family_for_hub(hub).from_hub(hub, preprocessor)


def changed(hub: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The file with some keys set, or taken out with None; `part__key` sets a key of a part."""
    hub = json.loads(json.dumps(hub))
    for key, value in changes.items():
        part, _, inner = key.rpartition("__")
        place = hub[part] if part else hub
        if value is None:
            place.pop(inner, None)
        else:
            place[inner] = value
    return hub


@pytest.mark.parametrize(
    ("id", "billions", "tower", "connector"),
    [
        ("internvl-1.5-26b", "25.51", "5.54", 116_429_824),
        ("internvl-1.5-2b", "2.21", "0.30", 12_595_200),
        ("internvl-1.5-4b", "4.15", "0.30", 22_034_432),
    ],
)
def test_parts_have_the_published_numbers_of_parameters(id: str, billions: str, tower: str, connector: int) -> None:
    vlm = weights.init.on_meta(families.preset(id).config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in vlm.named_children()}
    assert f"{sum(counts.values()) / 1e9:.2f}" == billions
    assert f"{counts['vision'] / 1e9:.2f}" == tower
    assert counts["connector"] == connector


def test_missing_keys_mean_the_defaults_of_the_authors_classes() -> None:
    least = {
        "model_type": "internvl_chat",
        "llm_config": {"architectures": ["InternLM2ForCausalLM"]},
        "vision_config": {},
    }
    config = read(least)
    assert config.vision == INTERNVIT_6B.replace(image_size=224, num_layers=48)
    assert config.connector.order == "columns"  # ps_version v1
    assert config.resolution == Squash(tile_size=224)
    assert config.decoder == DecoderConfig(
        vocab_size=103_168, dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, mlp_dim=11_008, norm_eps=1e-6,
        attention_bias="all", max_positions=2048,
    )  # fmt: skip
    tiled = read(changed(least, dynamic_image_size=True))
    assert tiled.resolution == DynamicTiles(tile_size=224, max_tiles=6, thumbnail="none")


def test_missing_keys_mean_the_defaults_of_transformers_in_its_own_layout() -> None:
    config = read({"model_type": "internvl"})
    assert config.vision == TOWER.replace(qkv_bias="none")
    assert config.connector.order == "rows"
    assert config.resolution == DynamicTiles(tile_size=448)
    assert config.image_token_id == 151_667
    assert isinstance(config.decoder, DecoderConfig)
    assert (config.decoder.attention_bias, config.decoder.head) == ("qkv", "tied")
    assert read(NATIVE).decoder.head == "own"


def test_how_pictures_are_prepared_stands_in_config_json() -> None:
    assert read(changed(ORIGINAL, force_image_size=224)).resolution == DynamicTiles(tile_size=224)
    assert read(changed(ORIGINAL, min_dynamic_patch=2, max_dynamic_patch=24)).resolution == DynamicTiles(
        tile_size=448, min_tiles=2, max_tiles=24
    )
    assert read(changed(ORIGINAL, use_thumbnail=False)).resolution.thumbnail == "none"
    whole = changed(ORIGINAL, dynamic_image_size=False)
    assert read(whole).resolution == Squash(tile_size=448)
    assert read(changed(whole, pad2square=True)).resolution == Pad(tile_size=448, fill=(123, 116, 103))
    other = read(ORIGINAL, {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}).vision
    assert (other.mean, other.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_the_template_names_the_format_and_the_file_may_bring_its_own_system_text() -> None:
    assert read(ORIGINAL).chat.name == "internlm2_chat"
    assert read(CONFIGS["internvl-1.5-4b"]).chat.name == "phi3_chat"
    assert read(changed(ORIGINAL, template="internvl2_5")).chat.name == "internvl2_5"
    assert read(changed(ORIGINAL, template=None)).chat.name == "internlm2_chat"
    assert read(changed(CONFIGS["internvl-1.5-4b"], template=None)).chat.name == "phi3_chat"
    assert read(changed(ORIGINAL, system_message="Be brief.")).chat.system == "Be brief."
    assert read(NATIVE).chat.name == "internvl_hf"
    with pytest.raises(ConfigError, match=r"template 'internlm-chat' is not known \(did you mean 'internlm2-chat'"):
        read(changed(ORIGINAL, template="internlm-chat"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"downsample_ratio": 0.25}, "downsample_ratio 0.25 changes"),
        ({"use_llm_lora": 16}, "use_llm_lora 16 changes"),
        ({"ps_version": "v3"}, "ps_version 'v3' is neither"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"vision_config__norm_type": "batch_norm"}, "norm_type 'batch_norm'"),
        ({"vision_config__qk_norm_kind": "head"}, "key 'qk_norm_kind'"),
        ({"llm_config__architectures": ["MambaForCausalLM"]}, "type 'mamba' is not served"),
        ({"llm_config__rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' are not served"),
        ({"llm_config__rope_scaling": {"type": "dynamic", "factor": 2.0, "beta_fast": 32}}, "'beta_fast'"),
        ({"llm_config__num_attention_heads": 15}, "not a multiple"),
        ({"min_dynamic_patch": 13}, "min_tiles 13 is more than max_tiles 12"),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(changed(ORIGINAL, **changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_config__use_mean_pooling": False}, "use_mean_pooling False changes"),
        ({"vision_config__image_size": [448, 224]}, r"image_size \[448, 224\] is not square"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
        ({"text_config__model_type": "qwen3"}, "type 'qwen3' is not served"),
    ],
)
def test_what_transformers_layout_cannot_mean_here_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(changed(NATIVE, **changes))
    tower = {"use_qk_norm": True, "layer_norm_eps": 1e-5}
    with pytest.raises(ConfigError, match="layer_norm_eps 1e-05 is not served with use_qk_norm"):
        read(changed(NATIVE, vision_config=tower))


def test_phi3_with_a_window_shorter_than_its_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="sliding_window 2047 is shorter"):
        read(changed(CONFIGS["internvl-1.5-4b"], llm_config__sliding_window=2047))


def test_queries_are_taken_out_of_wqkv_by_key_head() -> None:
    """Rows of one group: its query heads, its key head, its value head (modeling_internlm2.py)."""
    config = families.preset("internvl-1.5-tiny").config
    decoder = config.decoder
    assert isinstance(decoder, DecoderConfig)
    width, groups = decoder.head_width, decoder.num_kv_heads
    layout = next(each for each in families.family("internvl15").layouts(config) if each.name == "original")
    (rule,) = [rule for rule in layout.rules if isinstance(rule, Split) and "wqkv" in rule.source]
    fused = torch.arange(groups * 4 * width).reshape(groups, 4, width)
    ours = {"q": fused[:, :2], "k": fused[:, 2], "v": fused[:, 3]}
    state = {
        f"decoder.layers.0.attn.{name}.weight": part.reshape(-1, 1).expand(-1, decoder.dim)
        for name, part in ours.items()
    }
    written = to_layout(state, layout)[rule.source.format(0)]
    assert written[:, 0].tolist() == list(range(groups * 4 * width))


def test_channels_of_a_row_are_its_four_patches_in_reading_order() -> None:
    """A 4x6 grid of patches numbered 0 to 23: rows join neighbours, along rows (v2) or along columns (v1)."""
    grid = torch.tensor([[1, 4, 6]])
    features = torch.arange(24.0)[:, None]
    joined = {}
    for order in ("rows", "columns"):
        connector = make_connector(PixelShuffleConnector(order=order), in_dim=1, out_dim=4)
        # What stands behind the joining is left out.
        connector.norm, connector.layers = torch.nn.Identity(), torch.nn.ModuleList([torch.nn.Identity()])
        joined[order] = connector(features, grid).tolist()
    assert joined["rows"][:3] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    assert joined["columns"][:3] == [[0, 1, 6, 7], [12, 13, 18, 19], [2, 3, 8, 9]]


def test_the_tower_reads_tiles_of_other_sides_and_shapes() -> None:
    """Its table of positions is resized at every call; its own size leaves the table as it is."""
    config = families.preset("internvl-1.5-tiny").config
    tower = weights.build(config, seed=6).vision.eval()
    with torch.no_grad():
        for rows, columns in ((4, 4), (6, 6), (2, 6)):
            patches = torch.ones(2 * rows * columns, config.vision.patch_dim)
            features = tower(patches, torch.tensor([[1, rows, columns]] * 2))
            assert features.shape == (2 * rows * columns, config.vision.dim)


def test_fresh_layer_scales_are_those_of_internvit() -> None:
    state = weights.build(families.preset("internvl-1.5-tiny").config, seed=7).state_dict()
    assert (state["vision.layers.0.scale1.weight"] == 0.1).all()


def test_a_language_model_can_carry_the_names_that_its_biases_allow() -> None:
    decoder = families.preset("internvl-1.5-2b").config.decoder
    assert isinstance(decoder, DecoderConfig)
    assert possible_names(decoder)[0] == "internlm2"
    assert possible_names(decoder.replace(attention_bias="qkv")) == ("llama",)
    assert possible_names(decoder.replace(attention_bias="all")) == ("internlm2", "llama")
    phi3 = families.preset("internvl-1.5-4b").config.decoder
    assert isinstance(phi3, DecoderConfig)
    assert possible_names(phi3)[0] == "phi3"


@pytest.mark.parametrize("names", ["internlm2", "phi3", "llama"])
def test_files_with_every_kind_of_names_are_read(names: str, tmp_path: Path) -> None:
    """A tiny model written under the names of each language model reads back bit for bit."""
    from safetensors.torch import save_file

    config = families.preset("internvl-1.5-tiny").config
    decoder = config.decoder
    assert isinstance(decoder, DecoderConfig)
    assert decoder.rope is not None
    if names != "internlm2":
        decoder = decoder.replace(rope=decoder.rope.replace(scaling=None))
    config = config.replace(decoder=decoder)
    vlm = weights.build(config, seed=4)
    layouts = {layout.name: layout for layout in families.family("internvl15").layouts(config)}
    layout = layouts.get(f"original-{names}", layouts["original"])
    save_file(
        {name: t.contiguous() for name, t in to_layout(vlm.state_dict(), layout).items()},
        tmp_path / "model.safetensors",
    )
    hub = families.family("internvl15").write(config, "original")["config.json"]
    kind = {"internlm2": "InternLM2ForCausalLM", "phi3": "Phi3ForCausalLM", "llama": "LlamaForCausalLM"}[names]
    hub["llm_config"] |= {"architectures": [kind]}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    model = weights.load(tmp_path)
    assert model.layout == layout.name
    assert model.config == config
    for name, tensor in vlm.state_dict().items():
        assert torch.equal(model.vlm.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"connector": {"kind": "pixel_shuffle", "order": "columns"}}, "ps_version v2"),
        ({"image_token_id": None}, "marks picture slots by a token id"),
        ({"resolution": Squash(tile_size=28)}, "ends them with a thumbnail"),
    ],
)
def test_what_transformers_cannot_run_is_not_exported_to_it(changes: dict[str, Any], reason: str) -> None:
    config = families.preset("internvl-1.5-tiny").config.replace(**changes)
    with pytest.raises(ConfigError, match=f"{reason}.*export with layout 'original'"):
        families.family("internvl15").write(config, "hf")
    families.family("internvl15").write(config, "original")


def test_phi3s_rotation_has_no_words_in_llamas_file() -> None:
    with pytest.raises(ConfigError, match="no words for rotary positions"):
        families.family("internvl15").write(families.preset("internvl-1.5-4b").config, "hf")


def test_pictures_of_one_conversation_share_their_tiles_where_the_model_says_so(tmp_path: Path) -> None:
    config = families.preset("internvl-1.5-tiny").config
    tokenizer = toys.byte_tokenizer(tmp_path)
    pictures = tuple(toys.picture((90, 60), seed) for seed in range(3))
    conversation = Conversation((user("Which?", images=[0, 1, 2]), assistant("None.")), pictures)
    alone = Encoder(config, tokenizer).encode(conversation, mode="train")
    shared = Encoder(config.replace(resolution=config.resolution.replace(budget="shared")), tokenizer)
    assert [image.plan.num_tiles for image in alone.images] == [7, 7, 7]  # 3x2 and a thumbnail
    assert [image.plan.num_tiles for image in shared.encode(conversation, mode="train").images] == [3, 3, 3]  # 2x1
    asked = Conversation(conversation.messages[:1], pictures)
    assert shared.encode(asked).num_image_tokens == 3 * 3 * 4  # prompts are what training has seen


def test_slots_hold_the_id_that_the_authors_code_puts_there(tmp_path: Path) -> None:
    config = families.preset("internvl-1.5-tiny").config
    encoded = Encoder(config, toys.byte_tokenizer(tmp_path)).encode(
        Conversation((user("Q?", images=[0]),), (toys.picture((28, 28)),))
    )
    assert np.flatnonzero(encoded.ids == config.image_token_id).tolist() == encoded.slots.tolist()
    # The third of the nine tokens added to InternLM2's 92544 pieces and to Phi-3's 32011.
    assert families.preset("internvl-1.5-26b").config.image_token_id == 92_546
    assert families.preset("internvl-1.5-4b").config.image_token_id == 32_013


def test_a_llama_as_language_model_is_read() -> None:
    text = {**INTERNLM2_1_8B, "architectures": ["LlamaForCausalLM"], "attention_bias": True, "rope_scaling": None}
    decoder = read(chat_config(text, INTERNVIT_300M, "internvl2_5")).decoder
    assert isinstance(decoder, DecoderConfig)
    assert decoder.attention_bias == "all"
    assert decoder.rope is not None
    assert decoder.rope.scaling is None
