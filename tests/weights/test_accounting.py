"""Every key of a checkpoint is accounted for, and everything that is wrong comes in one error."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin import weights
from opsin.errors import ConfigError, WeightError
from weights.folders import edit_json, published, rewrite

Q = "language_model.model.layers.1.self_attn.q_proj.weight"


def refused(folder: Path) -> str:
    with pytest.raises(WeightError) as caught:
        weights.load(folder)
    return str(caught.value)


def test_everything_wrong_comes_in_one_error_with_the_nearest_names(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")

    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["language_model.model.layers.1.mlp.gate_proj.gamma"] = torch.ones(3)
        state["language_model.model.layers.9.mlp.gate_proj.weight"] = torch.ones(3)
        del state["language_model.model.layers.0.mlp.down_proj.weight"]
        state[Q] = state[Q][:8].contiguous()
        state["image_newline"] = state["image_newline"].to(torch.int32)

    rewrite(folder, spoil)
    assert refused(folder).splitlines() == [
        f"2 unexpected, 1 mis-shaped, 1 mis-typed, 1 missing keys in {folder} (read as layout 'hf')",
        "  unexpected  language_model.model.layers.1.mlp.gate_proj.gamma   nearest known: "
        "language_model.model.layers.1.mlp.gate_proj.weight",
        "  unexpected  language_model.model.layers.9.mlp.gate_proj.weight   nearest known: "
        "language_model.model.layers.1.mlp.gate_proj.weight",
        f"  mis-shaped  {Q}   is 8x64, the config asks for 64x64",
        "  mis-typed   image_newline   is I32; only BF16, F16, F32, F64 are read",
        "  missing     decoder.layers.0.mlp.down.weight <- language_model.model.layers.0.mlp.down_proj.weight",
    ]


def test_a_transposed_square_matrix_is_beyond_shapes_but_others_are_not(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda state: state.update({name: state[name].T.contiguous()}))
    assert f"{name}   is 64x96, the config asks for 96x64" in refused(folder)


def test_a_patch_convolution_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    name = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    rewrite(folder, lambda state: state.update({name: torch.ones(32, 3, 16, 16)}))
    assert "is 32x3x16x16, the config asks for 32x3x14x14" in refused(folder)


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", shard_bytes=200_000)
    files = sorted(folder.glob("model-*.safetensors"))
    first, second = load_file(files[0]), load_file(files[1])
    name = next(iter(first))
    save_file(second | {name: first[name]}, files[1])
    assert f"1 duplicate key in {folder}" in refused(folder)
    assert f"{name}   in {files[0].name} and {files[1].name}" in refused(folder)


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    """Rows of the vocabulary, layers, widths: told from the headers, before anything is allocated."""
    folder = published(tmp_path / "model")
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "num_hidden_layers": 1, "vocab_size": 400}
    edit_json(folder / "config.json", text_config=text)
    message = refused(folder)
    assert "language_model.model.embed_tokens.weight   is 384x64, the config asks for 400x64" in message
    assert "9 unexpected" in message


def test_weights_of_another_family_are_refused_in_a_few_lines(tmp_path: Path) -> None:
    folder = published(tmp_path / "next", layout="original")
    other = published(tmp_path / "first", "llava-tiny", "original")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    message = refused(folder)
    assert "  unexpected  model.mm_projector.weight   nearest known: model.mm_projector." in message
    assert "  missing     newline <- model.image_newline" in message
    assert "... and" in message
    assert len(message.splitlines()) < 40


def test_weights_of_no_known_model_say_so(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    save_file({"transformer.h.0.attn.c_attn.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    assert "holds no tensor of this model under any name known here. Its 1 tensors: transformer.h.0" in refused(folder)


def test_numbers_in_names_are_read_as_numbers(tmp_path: Path) -> None:
    """`layers.01` is not `layers.1`."""
    folder = published(tmp_path / "model")
    odd = Q.replace("layers.1", "layers.01")
    rewrite(folder, lambda state: state.update({odd: state.pop(Q)}))
    message = refused(folder)
    assert f"unexpected  {odd}   nearest known: {Q}" in message
    assert f"<- {Q}" in message


def test_a_config_in_our_format_is_checked_like_any_other(tmp_path: Path) -> None:
    from weights.folders import tiny

    model = tiny()
    weights.save_native(tmp_path / "model", model.vlm, model.config)
    file = tmp_path / "model/opsin.json"
    text = file.read_text()
    file.write_text(text.replace('"num_layers": 2', '"num_layer": 2'))
    with pytest.raises(ConfigError, match=r"unknown key 'decoder.num_layer' .did you mean 'num_layers'"):
        weights.load(tmp_path / "model")
    file.write_text(text.replace('"format": 1', '"format": 99'))
    assert "has format 99; this opsin reads formats up to 1" in refused(tmp_path / "model")
    file.write_text("[1]")
    assert "opsin.json holds list, not a table of keys" in refused(tmp_path / "model")
    file.write_text("{")
    assert "opsin.json cannot be read" in refused(tmp_path / "model")
