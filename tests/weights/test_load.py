"""Loading: both layouts and their variants, shards, towers of their own, dtypes, parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import toys
from opsin import families, weights
from opsin.errors import ConfigError, TokenizerError, UnknownNameError, WeightError
from opsin.weights.exporter import to_layout
from opsin.weights.init import on_meta
from weights.folders import edit_json, published, rewrite, same, tiny

TINY = [family.tiny.id for family in families.FAMILIES]


@pytest.mark.parametrize("id", TINY)
def test_every_known_layout_is_recognised_by_its_names(id: str, tmp_path: Path) -> None:
    """Whatever program wrote the names, the same tensors come back."""
    model = tiny(id)
    names = {layout.name for layout in model.family.layouts(model.config)}
    folder = published(tmp_path / "model", id, "original" if "original" in names else "hf")
    for layout in model.family.layouts(model.config):
        save_file(to_layout(model.vlm.state_dict(), layout), folder / "model.safetensors")
        loaded = weights.load(folder)
        assert loaded.layout == layout.name
        assert same(loaded.vlm.state_dict(), model.vlm.state_dict())


def test_a_loaded_model_is_ready_to_use(tmp_path: Path) -> None:
    model = weights.load(published(tmp_path / "model"))
    assert not model.vlm.training
    assert all(parameter.requires_grad for parameter in model.vlm.parameters())
    assert not any(parameter.is_meta for parameter in model.vlm.parameters())
    assert model.name == str(tmp_path / "model")
    assert model.family.name == "llava_next"


def test_shards_and_single_files_give_the_same_model(tmp_path: Path) -> None:
    whole = weights.load(published(tmp_path / "whole"))
    folder = published(tmp_path / "sharded", shard_bytes=200_000)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) >= 3
    assert same(weights.load(folder).vlm.state_dict(), whole.vlm.state_dict())
    # Some programs write shards without an index; their names say how many there are.
    (folder / "model.safetensors.index.json").unlink()
    assert same(weights.load(folder).vlm.state_dict(), whole.vlm.state_dict())


def test_known_useless_tensors_are_passed_over(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")

    def add(state: dict[str, torch.Tensor]) -> None:
        state["language_model.model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        state["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(10)

    before = weights.load(folder).vlm.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    rewrite(folder, add)
    assert same(weights.load(folder).vlm.state_dict(), before)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def test_the_checkpoints_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path) -> None:
    model = tiny(dtype=torch.bfloat16)
    weights.save_native(tmp_path / "model", model.vlm, model.config)
    for dtype in (None, "auto"):
        assert {p.dtype for p in weights.load(tmp_path / "model", dtype=dtype).vlm.parameters()} == {torch.bfloat16}
    for given in ("float32", torch.float32):
        loaded = weights.load(tmp_path / "model", dtype=given).vlm
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        assert torch.equal(loaded.newline, model.vlm.newline.float())


def test_a_mixed_checkpoint_gets_the_dtype_of_most_of_its_numbers(tmp_path: Path) -> None:
    """Layers of different dtypes do not multiply; a half-precision model with float32 norms loads in half precision."""
    folder = published(tmp_path / "model")

    def mix(state: dict[str, torch.Tensor]) -> None:
        for name in state:
            if "norm" not in name:
                state[name] = state[name].half()

    rewrite(folder, mix)
    assert {parameter.dtype for parameter in weights.load(folder).vlm.parameters()} == {torch.float16}


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype 'fp4' is not known. Known: auto, float32"):
        weights.load(published(tmp_path / "model"), dtype="fp4")


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_loading_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    """134 MB of weights grow the process by less than a tenth of that before any is used."""
    config = families.preset("llava-1.5-tiny").config
    config = config.replace(decoder=config.decoder.replace(vocab_size=131_072, dim=128))
    weights.save_native(tmp_path / "model", on_meta(config).to_empty(device="cpu"), config)
    script = (
        "import os, sys\nfrom opsin import weights\n"
        "weights.load(sys.argv[2])\n"  # so that what is imported on the way is not counted
        "pages = lambda: int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')\n"
        "before = pages()\nmodel = weights.load(sys.argv[1])\nprint(pages() - before)\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    command = [sys.executable, "-c", script, tmp_path / "model", published(tmp_path / "tiny")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 13_000_000


def test_training_on_a_loaded_model_leaves_its_file_alone(tmp_path: Path) -> None:
    model = tiny()
    weights.save_native(tmp_path / "model", model.vlm, model.config)
    before = (tmp_path / "model/model.safetensors").read_bytes()
    loaded = weights.load(tmp_path / "model").vlm
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert (tmp_path / "model/model.safetensors").read_bytes() == before


# ---- the tower -------------------------------------------------------------------------------------------------------


@pytest.fixture
def towerless(tmp_path: Path) -> tuple[Path, Path]:
    """A LLaVA-1.5 checkpoint of the authors without its tower, and a CLIP model that has it."""
    folder = published(tmp_path / "model", "llava-1.5-tiny", "original")
    prefix = "model.vision_tower.vision_tower."
    everything = load_file(folder / "model.safetensors")
    clip = {name.removeprefix(prefix): tensor for name, tensor in everything.items() if name.startswith(prefix)}
    clip |= {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.tensor(2.0)}
    clip |= {"vision_model.embeddings.position_ids": torch.arange(10), "visual_projection.weight": torch.ones(8, 8)}
    (tmp_path / "clip").mkdir()
    save_file(clip, tmp_path / "clip/model.safetensors")
    rewrite(folder, lambda state: [state.pop(name) for name in list(state) if name.startswith(prefix)])
    return folder, tmp_path / "clip"


def test_a_missing_tower_is_taken_from_a_clip_model(towerless: tuple[Path, Path]) -> None:
    folder, clip = towerless
    assert same(weights.load(folder, tower=clip).vlm.state_dict(), tiny("llava-1.5-tiny").vlm.state_dict())
    # CLIPVisionModel of transformers 5 writes the tower's names bare.
    state = load_file(clip / "model.safetensors")
    bare = {name.removeprefix("vision_model."): t for name, t in state.items() if name.startswith("vision_model.")}
    save_file(bare, clip / "model.safetensors")
    assert same(weights.load(folder, tower=clip).vlm.state_dict(), tiny("llava-1.5-tiny").vlm.state_dict())


def test_the_config_names_the_towers_repository(towerless: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """openai/clip-vit-large-patch14-336 is asked for; here the question alone is what counts."""
    asked = []

    def offline(repository: str, **_: object) -> str:
        asked.append(repository)
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    folder, _ = towerless
    with pytest.raises(WeightError, match=r"holds no vision tower, and its config names none.*tower="):
        weights.load(folder)
    config = families.preset("llava-1.5-7b").config
    head = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    hub = families.family_of(config).write(config, "original")["config.json"] | head
    hub |= {"num_key_value_heads": 4, "vocab_size": 384, "head_dim": 12}
    (folder / "config.json").write_text(json.dumps(hub))
    projector = {"model.mm_projector.0.weight": torch.ones(48, 1024)}
    rewrite(folder, lambda state: state.update(projector))
    with pytest.raises(WeightError, match="openai/clip-vit-large-patch14-336"):
        weights.load(folder)
    assert asked == ["openai/clip-vit-large-patch14-336"]


def test_a_tower_of_another_size_is_refused_in_the_same_error(towerless: tuple[Path, Path]) -> None:
    folder, clip = towerless
    position = "vision_model.embeddings.position_embedding.weight"
    rewrite(clip, lambda state: state.update({position: torch.ones(5, 32)}))
    rewrite(clip, lambda state: state.pop("vision_model.pre_layrnorm.bias"))
    with pytest.raises(WeightError) as caught:
        weights.load(folder, tower=clip)
    text = str(caught.value)
    assert "1 mis-shaped, 1 missing keys in" in text
    assert "position_embedding.weight   is 5x32, the config asks for 10x32" in text
    assert "vision.norm_pre.bias <- vision_model.pre_layrnorm.bias" in text


def test_half_a_tower_is_not_completed_from_elsewhere(towerless: tuple[Path, Path], tmp_path: Path) -> None:
    _, clip = towerless
    whole = published(tmp_path / "whole", "llava-1.5-tiny", "original")
    norm = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"
    rewrite(whole, lambda state: state.pop(norm))
    with pytest.raises(WeightError, match="1 missing key"):
        weights.load(whole)
    with pytest.raises(WeightError, match="holds its own vision tower"):
        weights.load(whole, tower=clip)


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_parts_are_replaced_one_by_one(towerless: tuple[Path, Path], tmp_path: Path) -> None:
    """A model put together as stage 1 starts: a CLIP, a language model, a fresh connector; then a stage-1 projector."""
    _, clip = towerless
    wanted = tiny("llava-1.5-tiny", seed=1).vlm.state_dict()
    family = families.family("llava15")
    layout = next(each for each in family.part_layouts(family.tiny.config) if each.name == "language-model")
    decoder = {name: tensor for name, tensor in wanted.items() if name.startswith("decoder.")}
    llama = to_layout(decoder, layout) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(llama, tmp_path / "llama.safetensors")

    vlm = tiny("llava-1.5-tiny", seed=2).vlm
    weights.load_part(vlm, "vision", clip)
    weights.load_part(vlm, "decoder", tmp_path / "llama.safetensors")
    assert parts_taken(vlm.state_dict(), wanted) == {"vision", "decoder"}

    for prefix in ("model.mm_projector.", "mm_projector.", ""):
        fresh = tiny("llava-1.5-tiny", seed=3).vlm
        projector = {
            f"{prefix}{2 * layer}.{kind}": wanted[f"connector.layers.{layer}.{kind}"].clone()
            for layer in (0, 1)
            for kind in ("weight", "bias")
        }
        save_file(projector, tmp_path / "mm_projector.safetensors")
        weights.load_part(fresh, "connector", tmp_path / "mm_projector.safetensors")
        assert parts_taken(fresh.state_dict(), wanted) == {"connector"}


def parts_taken(state: dict[str, torch.Tensor], source: dict[str, torch.Tensor]) -> set[str]:
    """The parts whose tensors are all those of another model; parts that are mixed fail."""
    equal: dict[str, set[bool]] = {}
    for name, tensor in state.items():
        if tensor.unique().numel() > 1:  # norms and biases begin as ones and zeros in every model
            equal.setdefault(name.partition(".")[0], set()).add(torch.equal(tensor, source[name]))
    assert all(len(found) == 1 for found in equal.values())
    return {part for part, found in equal.items() if found == {True}}


def test_a_part_can_be_taken_from_a_whole_model(tmp_path: Path) -> None:
    for source in (published(tmp_path / "original", layout="original"), published(tmp_path / "hf")):
        vlm = tiny(seed=2).vlm
        weights.load_part(vlm, "newline", source)
        weights.load_part(vlm, "connector", source)
        assert parts_taken(vlm.state_dict(), tiny(seed=1).vlm.state_dict()) == {"newline", "connector"}


def test_a_part_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    save_file({"something.else": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightError, match=r"holds no tensor of 'connector' under any name known here.*something.else"):
        weights.load_part(tiny().vlm, "connector", tmp_path / "other.safetensors")
    with pytest.raises(WeightError, match="this model has no part 'newline'"):
        weights.load_part(tiny("llava-1.5-tiny").vlm, "newline", tmp_path / "other.safetensors")


# ---- names, files beside the weights ---------------------------------------------------------------------------------


def test_the_tokenizer_is_read_on_first_use(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    model = weights.load(folder)
    assert not model.has_tokenizer
    with pytest.raises(TokenizerError, match=r"holds neither tokenizer.model nor tokenizer.json"):
        model.tokenizer  # noqa: B018
    toys.tokenizer_folder(tmp_path / "tokenizer")
    assert weights.load(folder, tokenizer=tmp_path / "tokenizer").tokenizer.control_id("</s>") == 2
    assert weights.load(folder, tokenizer=tmp_path / "tokenizer").has_tokenizer


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny()
    config = model.config.replace(decoder=model.config.decoder.replace(vocab_size=100), image_token_id=99)
    weights.save_native(tmp_path / "model", weights.build(config), config)
    toys.tokenizer_folder(tmp_path / "model")
    with pytest.raises(TokenizerError, match=r"has \d+ ids, the embedding of .* only 100 rows"):
        weights.load(tmp_path / "model").tokenizer  # noqa: B018


def test_the_chat_format_can_be_named(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    assert weights.load(folder, chat_format="llava_llama_2").config.chat.name == "llava_llama_2"
    with pytest.raises(UnknownNameError, match="did you mean 'llava_v1'"):
        weights.load(folder, chat_format="llava_v")


def test_generation_defaults_come_along(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    assert weights.load(folder).generation == {}
    (folder / "generation_config.json").write_text('{"temperature": 0.2}')
    assert weights.load(folder).generation == {"temperature": 0.2}


def test_a_config_can_be_read_without_weights_and_without_torch(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    script = (
        "import sys\nfrom opsin import weights\n"
        "print(weights.describe(sys.argv[1]).chat.name, weights.describe('llava-1.5-7b').decoder.dim)\n"
        "assert 'torch' not in sys.modules and 'huggingface_hub' not in sys.modules\n"
    )
    out = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["mistral_instruct", "4096"]


def test_nothing_in_a_folder_is_ever_run(tmp_path: Path) -> None:
    """`auto_map` names code that is there; a canary shows whether anybody runs it."""
    folder, canary = published(tmp_path / "model"), tmp_path / "canary"
    for name in ("modeling_x", "configuration_x", "tokenization_x", "__init__", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(canary)!r}, 'w').write('ran')")
    custom = {"AutoConfig": "configuration_x.X", "AutoModel": "modeling_x.X", "AutoTokenizer": "tokenization_x.X"}
    edit_json(folder / "config.json", auto_map=custom, custom_pipelines={"x": {"impl": "modeling_x.X"}})
    before = os.getcwd()
    os.chdir(folder)
    try:
        weights.load(folder)
    finally:
        os.chdir(before)
    assert not canary.exists()
