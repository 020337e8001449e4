"""Saving and exporting: atomic, checked, and readable by the programs that the layouts come from."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import toys
from opsin import families, weights
from opsin.collate import pad
from opsin.encode import Encoder
from opsin.errors import ConfigError, UnknownNameError, WeightError
from opsin.spec.connector import MLPConnector
from opsin.spec.resolution import Pad
from opsin.text.messages import Conversation, user
from opsin.weights import Model, exporter
from weights.folders import published, same, tiny

TINY = [family.tiny.id for family in families.FAMILIES]


@pytest.mark.parametrize("id", TINY)
def test_native_folders_come_back_bit_for_bit(id: str, tmp_path: Path) -> None:
    model = tiny(id)
    tokenizer = toys.byte_tokenizer(tmp_path / "tokenizer")
    weights.save_native(tmp_path / "model", model.vlm, model.config, tokenizer, generation={"temperature": 0.5})
    loaded = weights.load(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.layout == "opsin"
    assert loaded.generation == {"temperature": 0.5}
    assert same(loaded.vlm.state_dict(), model.vlm.state_dict())
    assert loaded.tokenizer.controls == tokenizer.controls
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_a_saved_model_replaces_the_one_before_and_leaves_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "report.html").write_text("kept")
    for seed in (1, 2):
        model = tiny(seed=seed)
        weights.save_native(folder, model.vlm, model.config)
        assert same(weights.load(folder).vlm.state_dict(), model.vlm.state_dict())
    other = tiny("llava-1.5-tiny")
    weights.save_native(folder, other.vlm, other.config)
    assert weights.load(folder).config == other.config
    assert (folder / "report.html").read_text() == "kept"


def test_a_model_can_be_saved_over_the_file_it_is_mapped_from(tmp_path: Path) -> None:
    model = tiny()
    weights.save_native(tmp_path / "model", model.vlm, model.config)
    loaded = weights.load(tmp_path / "model")
    with torch.no_grad():
        loaded.vlm.newline.add_(1)
    weights.save_native(tmp_path / "model", loaded.vlm, loaded.config)
    again = weights.load(tmp_path / "model").vlm
    assert torch.equal(again.newline, model.vlm.newline + 1)
    assert torch.equal(again.decoder.head.weight, model.vlm.decoder.head.weight)


def test_a_folder_with_a_published_model_is_not_overwritten(tmp_path: Path) -> None:
    folder = published(tmp_path / "model")
    model = tiny()
    with pytest.raises(WeightError, match="holds a model in a published layout"):
        weights.save_native(folder, model.vlm, model.config)
    with pytest.raises(WeightError, match="exists and is not empty"):
        weights.export(folder, model)


@pytest.mark.parametrize("call", ["save_file", "_write_json", "_flush", "replace", "rename"])
@pytest.mark.parametrize("count", range(4))
def test_a_full_disk_at_any_step_leaves_the_model_before(
    call: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count-th write, flush or move fails: what was there still loads, and no temporary folder is left."""
    old, new = tiny(seed=1), tiny(seed=2)
    weights.save_native(tmp_path / "model", old.vlm, old.config)
    owner: Any = Path if call in ("replace", "rename") else exporter
    real, calls = getattr(owner, call), []

    def fails(*arguments: Any, **options: Any) -> Any:
        calls.append(call)
        if len(calls) == count + 1:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    for folder, save in (
        (tmp_path / "model", lambda to: weights.save_native(to, new.vlm, new.config)),
        (tmp_path / "export", lambda to: weights.export(to, new)),
    ):
        calls.clear()
        with monkeypatch.context() as patched:
            patched.setattr(owner, call, fails)
            finished = False
            with suppress(WeightError):
                save(folder)
                finished = True
        assert not list(tmp_path.glob(".*"))
        if folder.name == "export":
            assert folder.exists() == finished or call == "_flush"
            if folder.exists():
                assert same(weights.load(folder).vlm.state_dict(), new.vlm.state_dict())
        else:
            state = weights.load(folder).vlm.state_dict()
            assert same(state, new.vlm.state_dict()) or same(state, old.vlm.state_dict())


def test_a_model_packed_for_inference_cannot_be_saved(tmp_path: Path) -> None:
    model = tiny()
    del model.vlm.decoder.head.weight
    with pytest.raises(WeightError, match=r"1 of 81 tensors are missing.*decoder.head.weight.*packed for inference"):
        weights.save_native(tmp_path / "model", model.vlm, model.config)
    with pytest.raises(WeightError, match="is not what its config says"):
        weights.export(tmp_path / "model", model)
    assert not (tmp_path / "model").exists()


# ---- export ----------------------------------------------------------------------------------------------------------


def test_an_export_says_what_the_layout_could_not_hold(tmp_path: Path) -> None:
    model = tiny()
    report = weights.export(tmp_path / "hf", model, layout="hf")
    assert report.changed == ("resolution.compat: 'original' -> 'hf'",)
    assert report.num_tensors == 81
    assert report.num_bytes == 4 * families.preset("llava-next-tiny").parameters
    report = weights.export(tmp_path / "original", model, layout="original")
    assert report.changed == ("image_token_id: 383 -> None",)


def test_an_export_keeps_chat_format_pad_mode_and_tokenizer(tmp_path: Path) -> None:
    model = tiny("llava-1.5-tiny")
    model.config = model.config.replace(chat=families.chat("llava_v1"))
    model.tokenizer_folder = toys.tokenizer_folder(tmp_path / "tokenizer")
    for layout in ("original", "hf"):
        weights.export(tmp_path / layout, model, layout=layout)
        loaded = weights.load(tmp_path / layout)
        assert loaded.config.chat == model.config.chat
        assert loaded.config.resolution == Pad(tile_size=42)
        assert loaded.tokenizer.controls.items() >= model.tokenizer.controls.items()
        # transformers needs a token at the id that marks pictures, and none missing before it.
        assert loaded.tokenizer.vocab_size == (384 if layout == "hf" else model.tokenizer.vocab_size)


def test_a_sharded_export_has_an_index_and_stays_under_the_limit(tmp_path: Path) -> None:
    folder = published(tmp_path / "model", shard_bytes=200_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * families.preset("llava-next-tiny").parameters
    files = set(index["weight_map"].values())
    assert files == {file.name for file in folder.glob("*.safetensors")}
    assert all((folder / name).stat().st_size < 210_000 for name in files)


def test_what_does_not_read_back_equal_is_not_reported_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = exporter.save_file

    def faulty(state: dict[str, torch.Tensor], file: Path, **options: Any) -> None:
        name = "language_model.model.norm.weight"
        real(state | {name: state[name] + 1e-3}, file, **options)

    monkeypatch.setattr(exporter, "save_file", faulty)
    with pytest.raises(WeightError, match=r"'decoder.norm.weight' does not read back as it was written"):
        weights.export(tmp_path / "model", tiny())
    assert not list(tmp_path.iterdir())


def test_unknown_and_unfit_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layout 'orignal' .did you mean 'original'"):
        weights.export(tmp_path / "model", tiny(), layout="orignal")
    with pytest.raises(ConfigError, match="marks picture slots by a token id"):
        weights.export(tmp_path / "model", tiny("llava-tiny"), layout="hf")
    assert not list(tmp_path.iterdir())


def one_layer() -> Model:
    """A model with LLaVA's connector and an id that marks pictures."""
    return exporter.with_image_token(tiny("llava-tiny"))


@pytest.mark.parametrize("layout", ["hf", "hf-v5"])
def test_a_connector_of_one_layer_is_written_as_two_and_read_as_one(layout: str, tmp_path: Path) -> None:
    model = one_layer()
    report = weights.export(tmp_path / "model", model, layout=layout)
    assert report.changed == ()
    stored = load_file(tmp_path / "model" / "model.safetensors")
    second = [stored[f"multi_modal_projector.linear_2.{name}"] for name in ("weight", "bias")]
    assert torch.equal(second[0], torch.eye(model.config.decoder.dim))
    assert not second[1].any()
    loaded = weights.load(tmp_path / "model")
    assert loaded.config == model.config
    assert same(loaded.vlm.state_dict(), model.vlm.state_dict())


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("weight", lambda tensor: tensor * 1.001, "linear_2.weight is not the identity, which is all that this model"),
        ("bias", lambda tensor: tensor + 1e-6, "linear_2.bias is not all zeros"),
        ("weight", lambda tensor: tensor[:-1].clone(), r"mis-shaped .*linear_2.weight   is 47x48, the config asks for"),
        ("bias", lambda tensor: None, r"missing +multi_modal_projector.linear_2.bias"),
    ],
)
def test_a_second_layer_that_does_something_is_refused(name: str, change: Any, told: str, tmp_path: Path) -> None:
    weights.export(tmp_path / "model", one_layer(), layout="hf")
    file, key = tmp_path / "model" / "model.safetensors", f"multi_modal_projector.linear_2.{name}"
    stored = load_file(file)
    changed = change(stored.pop(key))
    save_file(stored if changed is None else stored | {key: changed}, file, metadata={"format": "pt"})
    with pytest.raises(WeightError, match=told):
        weights.load(tmp_path / "model")
    with pytest.raises(WeightError, match=told):
        weights.load_part(one_layer().vlm, "connector", tmp_path / "model")
    weights.load_part(one_layer().vlm, "decoder", tmp_path / "model")


def test_two_layers_are_not_taken_for_one(tmp_path: Path) -> None:
    """A connector whose first layer alone would fit."""
    first = one_layer().config
    config = first.replace(connector=MLPConnector(), chat=families.preset("llava-1.5-tiny").config.chat)
    weights.export(tmp_path / "model", Model(weights.build(config), config, "two layers", tokenizer_folder=None))
    with pytest.raises(WeightError, match=r"linear_2.(weight|bias) is not "):
        weights.load_part(one_layer().vlm, "connector", tmp_path / "model")


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return pytest.importorskip("transformers", minversion="5")


@pytest.mark.parametrize("id", ["llava-tiny", "llava-1.5-tiny", "llava-next-tiny"])
def test_transformers_loads_an_export_and_gives_equal_logits(id: str, tmp_path: Path, transformers: Any) -> None:
    model = one_layer() if id == "llava-tiny" else tiny(id)
    weights.export(tmp_path / "model", model, layout="hf")
    loaded, theirs = weights.load(tmp_path / "model"), load_in_transformers(transformers, tmp_path / "model")
    picture = toys.picture((60, 35))
    tokenizer = toys.byte_tokenizer(tmp_path / "tokenizer")
    sample = Encoder(loaded.config, tokenizer).encode(Conversation((user("What?", images=[0]),), (picture,)))
    assert (sample.ids[sample.slots] == loaded.config.image_token_id).all()

    with torch.no_grad():
        ours = loaded.vlm.logits(loaded.vlm.hidden(pad([sample])))[0]
        inputs = {"input_ids": torch.from_numpy(sample.ids)[None], "pixel_values": pixels(loaded, sample.images[0])}
        if loaded.config.resolution.kind == "anyres":
            inputs["image_sizes"] = torch.tensor([[35, 60]])  # (height, width), as transformers has it
        recorded = theirs(**inputs).logits[0]
    # float32 on both sides; the linear patch embedding and fused attention add in another order.
    torch.testing.assert_close(ours, recorded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("id", ["llava-1.5-tiny", "llava-next-tiny"])
def test_what_transformers_writes_is_read(id: str, tmp_path: Path, transformers: Any) -> None:
    """save_pretrained of transformers 5 writes the names that a model was loaded under; for a model that was made anew
    it takes the old prefixes, but leaves `vision_model` out of the tower's. Its config files have other keys."""
    model = tiny(id)
    weights.export(tmp_path / "ours", model, layout="hf")
    theirs = load_in_transformers(transformers, tmp_path / "ours")
    fresh = type(theirs)(theirs.config)
    fresh.load_state_dict(theirs.state_dict())
    for written, layout in ((theirs, "hf"), (fresh, "hf-v5")):
        written.save_pretrained(tmp_path / layout)
        loaded = weights.load(tmp_path / layout)
        assert loaded.layout == layout
        assert same(loaded.vlm.state_dict(), model.vlm.state_dict())
        assert loaded.config.decoder == model.config.decoder
        assert loaded.config.vision == model.config.vision
        assert loaded.config.image_token_id == model.config.image_token_id


def test_module_names_of_transformers_are_read(tmp_path: Path, transformers: Any) -> None:
    """What a program writes that takes state_dict() as it is."""
    from safetensors.torch import save_file

    model = tiny()
    folder = tmp_path / "model"
    weights.export(folder, model, layout="hf")
    state = load_in_transformers(transformers, folder).state_dict()
    (folder / "model.safetensors").unlink()
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    loaded = weights.load(folder)
    assert loaded.layout == "hf-v5-modules"
    assert same(loaded.vlm.state_dict(), model.vlm.state_dict())


def load_in_transformers(transformers: Any, folder: Path) -> Any:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def pixels(model: Model, image: Any) -> torch.Tensor:
    """The prepared patches of one picture as transformers wants them: (N, 3, H, W), with a batch axis for anyres."""
    vision = model.config.vision
    side, p = vision.side, vision.patch_size
    patches = image.patches.reshape(-1, side, side, 3, p, p).transpose(0, 3, 1, 4, 2, 5)
    tiles = torch.from_numpy(np.ascontiguousarray(patches.reshape(-1, 3, side * p, side * p)))
    return tiles[None] if model.config.resolution.kind == "anyres" else tiles
