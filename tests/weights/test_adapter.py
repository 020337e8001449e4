"""Adapters: ours in PEFT and PEFT's here, on the models that transformers has; refusals; merging."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toys
from opsin import weights
from opsin.collate import pad
from opsin.encode import Encoded, Encoder
from opsin.nn.lora import adapted, attach, find_targets, merge
from opsin.spec.lora import Lora
from opsin.text.messages import Conversation, user
from opsin.verify.theirs import CLASSES, class_name, to_tiles
from opsin.weights import Model
from opsin.weights.adapter import load_adapter
from opsin.weights.adapter_exporter import save_adapter
from weights.folders import published

IDS = ("llava-1.5-tiny", "llava-next-tiny", "qwen2-vl-tiny", "internvl-1.5-tiny", "blip2-tiny")
EVERYTHING = ("vision", "connector", "decoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in transformers' layout of every family that it has."""
    place = tmp_path_factory.mktemp("published")
    toys.tokenizer_folder(place / "tokenizer")
    return {id: published(place / id, id) for id in IDS}


def sample(folder: Path, model: Model) -> Encoded:
    """A question about a picture."""
    tokenizer = toys.byte_tokenizer(folder / "tokenizer")
    conversation = Conversation((user("what is it?", images=[0]),), (toys.picture((60, 40)),))
    return Encoder(model.config, tokenizer).encode(conversation)


@torch.no_grad()
def our_logits(model: Model, sample: Encoded) -> Tensor:
    """(T, V)"""
    return model.vlm.logits(model.vlm.hidden(pad([sample])))[0]


@torch.no_grad()
def their_logits(theirs: Any, name: str, model: Model, sample: Encoded) -> Tensor:
    """(T, V), of transformers' model, with PEFT around it or without."""
    ids = torch.from_numpy(sample.ids)[None]
    inputs = CLASSES[name].inputs(sample.images[0], to_tiles(sample.images[0], model.config.vision), ids)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"][:, sample.slots] = 1
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
    found = load_adapter(model.vlm, tmp_path / "adapter", model.family.layouts(model.config))
    assert len(found.whole) in (2, 4, 6)
    ours = our_logits(model, given)
    assert (ours - before).abs().max() > 1e-2
    wanted = their_logits(wrapped.eval(), class_name(folders[id]), model, given)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    merge(model.vlm)
    torch.testing.assert_close(our_logits(model, given), wanted, atol=1e-5, rtol=1e-5)
