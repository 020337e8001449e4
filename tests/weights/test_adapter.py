"""Adapters: ours in PEFT and PEFT's here, on the models that transformers has; refusals; merging."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import toys
from opsin import weights
from opsin.cli.app import run as opsin
from opsin.collate import pad
from opsin.encode import Encoded, Encoder
from opsin.errors import ConfigError, WeightError
from opsin.families.blip2 import TINY_T5
from opsin.nn.lora import adapted, attach, find_targets, merge
from opsin.nn.quantize import quantize
from opsin.spec.lora import Lora
from opsin.text.messages import Conversation, user
from opsin.verify.theirs import CLASSES, class_name, to_tiles
from opsin.weights import Model
from opsin.weights.adapter_exporter import save_adapter, whole_modules
from opsin.weights.exporter import with_image_token
from weights.folders import edit_json, published, tiny

IDS = ("llava-1.5-tiny", "llava-next-tiny", "qwen2-vl-tiny", "internvl-1.5-tiny", "blip2-tiny", "blip2-t5-tiny")
EVERYTHING = ("vision", "connector", "decoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in transformers' layout of every family that it has."""
    place = tmp_path_factory.mktemp("published")
    toys.tokenizer_folder(place / "tokenizer")
    weights.export(place / IDS[-1], Model(vlm=weights.build(TINY_T5, seed=1), config=TINY_T5, name=IDS[-1]))
    return {id: published(place / id, id) for id in IDS[:-1]} | {IDS[-1]: place / IDS[-1]}


def sample(folder: Path, model: Model) -> Encoded:
    """A question about a picture."""
    tokenizer = toys.byte_tokenizer(folder / "tokenizer")
    conversation = Conversation((user("what is it?", images=[0]),), (toys.picture((60, 40)),))
    return Encoder(model.config, tokenizer).encode(conversation)


@torch.no_grad()
def our_logits(model: Model, sample: Encoded) -> Tensor:
    """(T, V); of an encoder-decoder, the decoder's."""
    return model.vlm.logits(model.vlm.hidden(pad([sample])))[0, sample.encoder_length :]


@torch.no_grad()
def their_logits(theirs: Any, name: str, model: Model, sample: Encoded) -> Tensor:
    """(T, V), of transformers' model, with PEFT around it or without."""
    ids = torch.from_numpy(sample.ids)[None]
    inputs = CLASSES[name].inputs(sample.images[0], to_tiles(sample.images[0], model.config.vision), ids)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"][:, sample.slots] = 1
    if sample.encoder_length:
        inputs["decoder_input_ids"] = ids[:, sample.encoder_length :]
        ids = ids[:, : sample.encoder_length]
    return theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]


def load_theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    name = class_name(folder)
    return getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()


def shake(model: Model, names: list[str], *, seed: int = 5) -> None:
    """Move tensors away from where they are, as training does."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.vlm.named_parameters())
    with torch.no_grad():
        for name in names:
            parameters[name].add_(0.05 * torch.randn(parameters[name].shape, generator=generator))


def adapt(model: Model, lora: Lora, *, also: tuple[str, ...] = ()) -> list[str]:
    """Adapters with numbers in both factors, and other tensors changed as a whole. Returns the latter's names."""
    targets = [t for t in find_targets(model.vlm, lora.targets) if not t.startswith(also)]
    attach(model.vlm, lora, targets, seed=3)
    whole = [name for name, _ in model.vlm.named_parameters() if also and name.startswith(also)]
    shake(model, [*whole, *(f"{target}.lora_B.weight" for target in targets)])
    return whole


@pytest.mark.parametrize("scaling", ["rank", "sqrt_rank"])
@pytest.mark.parametrize("also", [(), ("connector", "newline")], ids=["lora", "lora and whole connector"])
@pytest.mark.parametrize("id", IDS)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(folders, tmp_path, id, also, scaling) -> None:
    peft = pytest.importorskip("peft")
    model = weights.load(folders[id])
    given = sample(folders[id].parent, model)
    before = our_logits(model, given)
    lora = Lora(rank=3, alpha=12, targets=EVERYTHING, scaling=scaling)
    whole = adapt(model, lora, also=also)
    save_adapter(tmp_path / "adapter", model, lora, trained=whole)
    ours = our_logits(model, given)
    assert (ours - before).abs().max() > 1e-2

    theirs = peft.PeftModel.from_pretrained(load_theirs(folders[id]), tmp_path / "adapter").eval()
    torch.testing.assert_close(their_logits(theirs, class_name(folders[id]), model, given), ours, atol=1e-5, rtol=1e-5)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert bool(settings["modules_to_save"]) == bool(also)
    assert settings["base_model_name_or_path"] == str(folders[id])

    loaded = weights.load(tmp_path / "adapter")
    assert not adapted(loaded.vlm)
    torch.testing.assert_close(our_logits(loaded, given), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("id", IDS)
def test_an_adapter_of_peft_gives_the_same_logits_here(folders, tmp_path, id) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = load_theirs(folders[id])
    connector = {
        "qwen2-vl-tiny": "model.visual.merger",
        "blip2-tiny": "language_projection",
        "blip2-t5-tiny": "language_projection",
    }.get(id, "model.multi_modal_projector")
    # All that PEFT adapts by itself, ranks and alphas of some layers their own; the connector as a whole.
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        exclude_modules=rf"{connector}.*".replace(".", r"\.").replace(r"\.*", ".*") + "|.*lm_head",
        modules_to_save=[connector],
        rank_pattern={r"language_model.*\.q_proj": 2, "qkv": 3},
        alpha_pattern={"v_proj": 5},
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(theirs, config)
    for name, tensor in wrapped.named_parameters():
        if "modules_to_save" in name:
            tensor.data.add_(0.05 * torch.randn(tensor.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    model = weights.load(folders[id])
    given = sample(folders[id].parent, model)
    before = our_logits(model, given)
    found = weights.load_adapter(model, tmp_path / "adapter")
    assert len(found.whole) in (2, 4, 6)
    ours = our_logits(model, given)
    assert (ours - before).abs().max() > 1e-2
    wanted = their_logits(wrapped.eval(), class_name(folders[id]), model, given)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    merge(model.vlm)
    torch.testing.assert_close(our_logits(model, given), wanted, atol=1e-5, rtol=1e-5)


def test_merging_is_exact_to_rounding_and_the_merged_model_is_a_plain_one(folders, tmp_path) -> None:
    model = weights.load(folders["qwen2-vl-tiny"])
    given = sample(folders["qwen2-vl-tiny"].parent, model)
    names = list(model.vlm.state_dict())
    lora = Lora(rank=2, alpha=6, targets=EVERYTHING)
    adapt(model, lora)
    before = our_logits(model, given)
    layers = merge(model.vlm)
    assert list(model.vlm.state_dict()) == names
    assert len(layers) == 2 * 6 + 2 + 2 * 7
    torch.testing.assert_close(our_logits(model, given), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("to", ["opsin", "hf"])
def test_the_command_merges_and_chat_takes_the_adapter_itself(folders, tmp_path, capsys, to) -> None:
    base = folders["llava-next-tiny"]
    model = weights.load(base, tokenizer=base.parent / "tokenizer")
    given = sample(base.parent, model)
    lora = Lora(rank=2, alpha=6, dropout=0.1)
    whole = adapt(model, lora, also=("connector",))
    save_adapter(tmp_path / "adapter", model, lora, trained=whole)
    assert opsin(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", to]) == 0
    merged = weights.load(tmp_path / "out")
    assert merged.layout == to
    torch.testing.assert_close(our_logits(merged, given), our_logits(model, given), atol=1e-5, rtol=1e-5)
    toys.picture((60, 40)).save(tmp_path / "photo.png")
    answers = []
    for folder in ("out", "adapter"):
        capsys.readouterr()
        ask = ["what?", "--image", str(tmp_path / "photo.png"), "--max-new-tokens", "5"]
        assert opsin(["chat", str(tmp_path / folder), *ask]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert opsin(["merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("id", ["llava-tiny", "qwen-vl-tiny"])
def test_adapters_of_models_that_transformers_has_not_carry_their_authors_names(tmp_path, id) -> None:
    model = tiny(id)
    weights.save_native(tmp_path / "base", model.vlm, model.config)
    lora = Lora(rank=2, alpha=4, targets=("decoder", "vision"))
    whole = adapt(model, lora, also=("connector",))
    save_adapter(tmp_path / "adapter", model, lora, base="../base", trained=whole)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    authors = {
        "llava-tiny": "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "qwen-vl-tiny": "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight",
    }
    assert authors[id] in stored
    loaded = weights.load(tmp_path / "adapter").vlm.state_dict()
    merge(model.vlm)
    for name, tensor in model.vlm.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, atol=1e-6, rtol=1e-6)


def test_a_trained_connector_of_one_layer_goes_as_two_and_comes_back(tmp_path) -> None:
    model = with_image_token(tiny("llava-tiny"))
    weights.save_native(tmp_path / "base", model.vlm, model.config)
    lora = Lora(rank=2, alpha=4, targets=("decoder",))
    save_adapter(tmp_path / "adapter", model, lora, base="../base", trained=adapt(model, lora, also=("connector",)))
    file, second = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.model.multi_modal_projector."
    stored = load_file(file)
    assert torch.equal(stored[f"{second}linear_2.weight"], torch.eye(model.config.decoder.dim))
    loaded = weights.load(tmp_path / "adapter").vlm.state_dict()
    merge(model.vlm)
    for name, tensor in model.vlm.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, atol=1e-6, rtol=1e-6)
    save_file(stored | {f"{second}linear_2.bias": stored[f"{second}linear_2.bias"] + 1}, file)
    with pytest.raises(WeightError, match=r"linear_2.bias   holds other numbers than a model like this"):
        weights.load(tmp_path / "adapter")


def test_a_fused_layer_of_an_adapter_stays_of_its_rank(folders, tmp_path) -> None:
    """Queries, keys and values that came from one layer share its A, so that it goes back as it came."""
    model = weights.load(folders["qwen2-vl-tiny"])
    place = "base_model.model.model.visual.blocks.0.attn.qkv."
    dim = model.config.vision.dim
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, dim, generator=generator), torch.randn(3 * dim, 3, generator=generator)
    (tmp_path / "one").mkdir()
    save_file({f"{place}lora_A.weight": a, f"{place}lora_B.weight": b}, tmp_path / "one" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "base_model_name_or_path": "x"}
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps(settings))
    weights.load_adapter(model, tmp_path / "one")
    save_adapter(tmp_path / "two", model, Lora(rank=3, alpha=6))
    again = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert torch.equal(again[f"{place}lora_A.weight"], a)
    assert torch.equal(again[f"{place}lora_B.weight"], b)


@pytest.fixture
def authors_folder(tmp_path: Path) -> tuple[Path, Model]:
    """What LLaVA's code leaves behind: config.json of the whole, adapters of a Vicuna, the projector apart."""
    model = tiny("llava-1.5-tiny")
    weights.export(tmp_path / "whole", model, layout="original")
    state = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "vicuna").mkdir()
    language = {name: value for name, value in state.items() if name.startswith(("model.layers", "model.norm"))}
    language |= {name: state[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(language, tmp_path / "vicuna" / "model.safetensors")
    (tmp_path / "vicuna" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tower = {
        name.removeprefix("model.vision_tower.vision_tower."): value
        for name, value in state.items()
        if "vision_tower" in name
    }
    (tmp_path / "clip").mkdir()
    save_file(tower, tmp_path / "clip" / "model.safetensors")

    lora = Lora(rank=2, alpha=4)
    adapt(model, lora)
    shake(model, [name for name, _ in model.vlm.named_parameters() if name.startswith("connector.")])
    folder = tmp_path / "adapter"
    save_adapter(folder, model, lora, base=str(tmp_path / "vicuna"))
    theirs = {name.replace("model.model.language_model.", "model.model."): v for name, v in _stored(folder).items()}
    save_file(theirs, folder / "adapter_model.safetensors")
    others = {
        f"base_model.model.model.mm_projector.{2 * layer}.{kind}": tensor.detach()
        for layer in (0, 1)
        for kind, tensor in model.vlm.connector.layers[layer].named_parameters()
    }
    save_file(others, folder / "non_lora_trainables.safetensors")
    (folder / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    return folder, model


def _stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_what_llavas_own_lora_runs_write_is_read(authors_folder, tmp_path) -> None:
    folder, model = authors_folder
    loaded = weights.load(folder, tower=tmp_path / "clip")
    merge(model.vlm)
    for name, tensor in loaded.vlm.state_dict().items():
        torch.testing.assert_close(tensor, model.vlm.state_dict()[name], atol=1e-6, rtol=1e-6)
    assert weights.describe(str(folder)) == loaded.config
    file = folder / "non_lora_trainables.safetensors"
    file.rename(folder / "non_lora_trainables.bin")
    with pytest.raises(WeightError, match=r"Python pickles only \(non_lora_trainables.bin\)"):
        weights.load(folder, tower=tmp_path / "clip")
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(WeightError, match=r"lacks 4 tensors that its base has not either, such as connector"):
        weights.load(folder, tower=tmp_path / "clip")


def test_the_largest_whole_modules_are_named() -> None:
    names = {"a.norm.weight", "a.layers.0.x.weight", "a.layers.0.x.bias", "a.layers.1.x.weight", "q", "a.b.c.weight"}
    assert whole_modules({"a.layers.0.x.weight", "a.layers.0.x.bias", "q"}, names) == ["a.layers.0"]
    assert whole_modules({"a.layers.0.x.weight", "a.layers.1.x.weight"}, names) == ["a.layers.1"]
    everything = {"a.layers.0.x.weight", "a.layers.0.x.bias", "a.layers.1.x.weight"}
    assert whole_modules(everything, names) == ["a.layers.0", "a.layers.1"]
    assert whole_modules(names, names) == ["a"]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """An adapter of a tiny LLaVA-1.5, to be spoilt."""
    model = tiny("llava-1.5-tiny")
    weights.save_native(tmp_path / "base", model.vlm, model.config)
    lora = Lora(rank=2, alpha=4)
    adapt(model, lora)
    save_adapter(tmp_path / "adapter", model, lora, base="../base")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "an adapter of kind 'IA3'; only LORA is read"),
        ({"use_dora": True}, "uses use_dora, which is more than a change of low rank. Merge it with PEFT"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses init_lora_weights: pissa_niter_4"),
        ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
        ({"base_model_name_or_path": None}, "does not say of which model; give both to opsin merge"),
        ({"base_model_name_or_path": "./nowhere"}, "nowhere, which cannot be loaded: there is no folder"),
    ],
)
def test_adapters_that_are_something_else_are_refused(broken, changes, message) -> None:
    edit_json(broken / "adapter_config.json", **changes)
    with pytest.raises(WeightError, match=message):
        weights.load(broken)


def test_every_tensor_of_an_adapter_is_accounted_for_in_one_error(broken) -> None:
    file = broken / "adapter_model.safetensors"
    state = load_file(file)
    place = "base_model.model.model.language_model.layers.0.self_attn."
    state[f"{place}q_projj.lora_A.weight"] = state.pop(f"{place}q_proj.lora_A.weight")
    state[f"{place}k_proj.lora_A.weight"] = torch.zeros(2, 7)
    state["base_model.model.lm_head.lora_A.weight"] = torch.zeros(2, 64)
    state["base_model.model.lm_head.lora_B.weight"] = torch.zeros(384, 2)
    state["base_model.model.model.image_newlin"] = torch.zeros(3)
    del state[f"{place}v_proj.lora_B.weight"]
    save_file(state, file)
    with pytest.raises(WeightError) as caught:
        weights.load(broken)
    text = str(caught.value)
    for line in (
        r"6 of 30 tensors",
        "lm_head   is no linear layer that can have an adapter",
        "self_attn.k_proj   lora_A 2x7 and lora_B",
        "self_attn.q_projj   has lora_A and no lora_B",
        "self_attn.v_proj   has lora_A and no lora_B",
        "model.image_newlin   is unknown to the model",
        "self_attn.q_proj.lora_B.weight   has no lora_A",
    ):
        assert line in text


def test_models_with_adapters_are_not_saved_as_plain_ones(tmp_path) -> None:
    model = tiny("llava-1.5-tiny")
    with pytest.raises(WeightError, match="has no adapter to save"):
        save_adapter(tmp_path / "adapter", model, Lora(rank=2, alpha=4))
    adapt(model, Lora(rank=2, alpha=4))
    with pytest.raises(WeightError, match=r"has adapters: merge them .* or save_adapter"):
        weights.save_native(tmp_path / "model", model.vlm, model.config)
    with pytest.raises(ConfigError, match="has an adapter of rank 2; merge it before one of 3 is added"):
        attach(model.vlm, Lora(rank=3, alpha=4), find_targets(model.vlm, ["decoder"]))


def test_an_adapter_goes_beside_quantised_weights_and_never_over_another(broken) -> None:
    base = broken.parent / "base"
    model, merged = weights.load(base), weights.load(broken)
    quantize(model.vlm, "int8")
    weights.load_adapter(model, broken)
    layer, whole = model.vlm.decoder.layers[0].attn.q, merged.vlm.decoder.layers[0].attn.q
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert (layer(x) - whole(x)).norm() < 0.02 * whole(x).norm()
    with pytest.raises(WeightError, match="has an adapter already; merge it before"):
        weights.load_adapter(model, broken)
