"""Training starts from published parts whose tables are longer or shorter than the model's."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from opsin import families, weights
from opsin.families.blip2 import TINY, TINY_RETRIEVER
from opsin.weights.retrieval import load_retriever_part


def resized(table: Tensor, side: int) -> Tensor:
    before = round(len(table) ** 0.5)
    image = table.T.reshape(1, -1, before, before)
    return F.interpolate(image, (side, side), mode="bicubic", align_corners=False)[0].flatten(1).T


def test_tokens_that_a_language_model_did_not_have_are_new_rows(tmp_path: Path) -> None:
    """InternVL: what is read stays random, what is written becomes the mean of the others."""
    config = families.family("internvl15").tiny.config
    smaller = weights.build(config.replace(decoder=config.decoder.replace(vocab_size=370), image_token_id=None), seed=7)
    weights.save_native(tmp_path / "old", smaller, smaller.config)
    vlm = weights.build(config, seed=1)
    random = vlm.decoder.embed.weight.detach().clone()
    weights.load_part(vlm, "decoder", tmp_path / "old")
    embed, head = vlm.decoder.embed.weight, vlm.decoder.head.weight
    assert torch.equal(embed[:370], smaller.decoder.embed.weight)
    assert torch.equal(embed[370:], random[370:])
    assert torch.equal(head[:370], smaller.decoder.head.weight)
    torch.testing.assert_close(head[370:], smaller.decoder.head.weight.mean(0).expand(14, -1))
    assert torch.equal(vlm.decoder.layers[1].mlp.up.weight, smaller.decoder.layers[1].mlp.up.weight)


def test_rows_beyond_the_models_are_left_behind(tmp_path: Path) -> None:
    """Phi-3's file has more rows than InternVL's tokenizer."""
    config = families.family("internvl15").tiny.config
    larger = weights.build(config.replace(decoder=config.decoder.replace(vocab_size=400)), seed=7)
    weights.save_native(tmp_path / "old", larger, larger.config)
    vlm = weights.build(config, seed=1)
    weights.load_part(vlm, "decoder", tmp_path / "old")
    assert torch.equal(vlm.decoder.embed.weight, larger.decoder.embed.weight[:384])
    assert torch.equal(vlm.decoder.head.weight, larger.decoder.head.weight[:384])


@pytest.mark.parametrize("layout", ["native", "hf", "original"])
def test_a_tower_of_larger_pictures_starts_from_a_resized_table(layout: str, tmp_path: Path) -> None:
    old = weights.build(TINY.config, seed=3)
    with torch.no_grad():
        for layer in old.vision.layers:
            layer.attn.k.bias.zero_()
    if layout == "native":
        weights.save_native(tmp_path / "old", old, TINY.config)
    else:
        weights.export(tmp_path / "old", weights.Model(old, TINY.config, "old"), layout=layout)
    config = TINY.config
    vision = config.vision.replace(image_size=70)
    vlm = weights.build(config.replace(vision=vision, resolution=config.resolution.replace(tile_size=70)), seed=1)
    weights.load_part(vlm, "vision", tmp_path / "old")
    assert torch.equal(vlm.vision.positions[0], old.vision.positions[0])
    torch.testing.assert_close(vlm.vision.positions[1:], resized(old.vision.positions[1:], 5))


def test_qwen_vl_starts_from_open_clip_without_its_class_token(tmp_path: Path) -> None:
    config = families.family("qwen_vl").tiny.config
    vlm, source = weights.build(config, seed=1), weights.build(config, seed=2)
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn": "self_attn", "up": "fc1", "down": "fc2"}
    names |= {"norm_pre": "pre_layrnorm", "layers": "encoder.layers", "out": "out_proj"}
    names |= {name: f"{name}_proj" for name in "qkv"}
    file = {"vision_model.embeddings.class_embedding": torch.ones(32), "logit_scale": torch.ones(())}
    file["vision_model.embeddings.position_embedding.weight"] = torch.cat([torch.ones(1, 32), source.vision.positions])
    file["vision_model.embeddings.patch_embedding.weight"] = source.vision.patch.weight.view(32, 3, 7, 7)
    file |= {f"vision_model.post_layernorm.{name}": torch.ones(32) for name in ("weight", "bias")}
    for name, tensor in source.vision.named_parameters():
        if name not in ("positions", "patch.weight"):
            file["vision_model." + ".".join(names.get(part, part) for part in name.split("."))] = tensor
    save_file({name: tensor.detach().contiguous() for name, tensor in file.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    weights.load_part(vlm, "vision", tmp_path)
    for name, tensor in source.vision.named_parameters():
        assert torch.equal(vlm.vision.get_parameter(name), tensor), name


@pytest.mark.parametrize("norms", [("weight", "bias"), ("gamma", "beta")])
def test_stage_1_starts_from_a_bert(norms: tuple[str, str], tmp_path: Path) -> None:
    """Text side and words from the file; queries' feed-forwards are copies; the rest stays as it was."""
    config = TINY_RETRIEVER
    source, retriever = weights.build_retriever(config, seed=2), weights.build_retriever(config, seed=1)
    before = {name: tensor.clone() for name, tensor in retriever.state_dict().items()}
    with torch.no_grad():
        for name, tensor in source.named_parameters():
            if name.split(".")[0] in ("qformer", "captions"):
                tensor.uniform_()  # norms and biases too
    own = source.state_dict()
    names = {"attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value"}
    names |= {"attn.out": "attention.output.dense", "attn.norm": "attention.output.LayerNorm"}
    names |= {"text.mlp.up": "intermediate.dense", "text.mlp.down": "output.dense", "text.norm": "output.LayerNorm"}
    modules = {f"qformer.layers.{i}.{a}": f"bert.encoder.layer.{i}.{b}" for i in range(3) for a, b in names.items()}
    modules |= {"qformer.norm": "bert.embeddings.LayerNorm", "captions.dense": "cls.predictions.transform.dense"}
    modules |= {"captions.norm": "cls.predictions.transform.LayerNorm"}
    file = {"bert.embeddings.word_embeddings.weight": own["words.weight"][:383]}  # `[DEC]` is missing
    file |= {"bert.embeddings.position_embeddings.weight": own["positions.weight"]}
    file |= {"bert.embeddings.token_type_embeddings.weight": torch.ones(2, 32)}
    file |= {"cls.predictions.bias": own["captions.bias"][:383], "bert.pooler.dense.weight": torch.ones(32, 32)}
    for ours, theirs in modules.items():
        tensors = norms if theirs.endswith("LayerNorm") else ("weight", "bias")
        file |= {f"{theirs}.{a}": own[f"{ours}.{b}"] for a, b in zip(tensors, ("weight", "bias"), strict=True)}
    save_file({name: tensor.contiguous() for name, tensor in file.items()}, tmp_path / "model.safetensors")
    load_retriever_part(retriever, "qformer", tmp_path)
    for name, tensor in retriever.state_dict().items():
        if name in ("words.weight", "captions.bias"):
            assert torch.equal(tensor[:383], own[name][:383])
            assert torch.equal(tensor[383:], before[name][383:])
        elif ".query." in name:
            assert torch.equal(tensor, own[name.replace(".query.", ".text.")]), name
        elif (name.startswith("qformer.") and ".cross." not in name) or name.startswith(("positions", "captions")):
            assert torch.equal(tensor, own[name]), name
        else:
            assert torch.equal(tensor, before[name]), name
