"""BLIP-2's files: what they mean, leave out, refuse; checkpoints in parts."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import toys
from families.published_blip2 import CONFIGS, FLAN_T5, HF, LAVIS_VIT_L, OPT
from opsin import families, weights
from opsin.encode import Encoder
from opsin.errors import ConfigError, UnknownNameError, WeightError
from opsin.families.blip2 import BLIP2, RETRIEVERS, TINY, TINY_RETRIEVER, TINY_T5
from opsin.generate import Sampling, generate
from opsin.nn.retriever import Retriever
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import Squash
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.text.messages import ask

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def read(hub: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> VLMConfig:
    return BLIP2.from_hub(hub, preprocessor)


# ---- config files ----------------------------------------------------------------------------------------------------


def test_a_missing_value_means_the_default_of_its_class() -> None:
    whole = HF["vision_config"] | {"hidden_size": 1408, "num_hidden_layers": 39, "layer_norm_eps": 1e-6}
    stack = {"num_attention_heads": 12, "cross_attention_frequency": 2, "layer_norm_eps": 1e-12}
    hub = CONFIGS["blip2-opt-2.7b"]
    assert read(hub) == read(hub | {"vision_config": whole, "qformer_config": stack})
    assert read({"model_type": "blip-2"}).decoder.dim == 768  # OPT's own default is the smallest


def test_the_size_of_pictures_is_that_of_the_preprocessor() -> None:
    hub = CONFIGS["blip2-opt-2.7b"]
    assert read(hub, {"size": {"height": 364, "width": 364}}).resolution == Squash(tile_size=364)
    assert read(hub, {"size": 364}).resolution == Squash(tile_size=364)
    with pytest.raises(ConfigError, match=r"size .* must be a square"):
        read(hub, {"size": {"height": 364, "width": 224}})
    with pytest.raises(ConfigError, match="do_center_crop is not served"):
        read(hub, {"do_center_crop": True})


def test_dense_act_fn_is_read_before_feed_forward_proj() -> None:
    """BLIP-2 runs FlanT5 with the exact GELU; a file that does not say so means T5's own."""
    assert read(CONFIGS["blip2-flan-t5-xl"]).decoder.activation == "gelu"  # type: ignore[union-attr]
    silent = {key: value for key, value in FLAN_T5.items() if key != "dense_act_fn"}
    assert read(HF | {"text_config": silent}).decoder.activation == "gelu_tanh"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="feed_forward_proj 'relu' is not served"):
        read(HF | {"text_config": {"model_type": "t5"}})
    with pytest.raises(ConfigError, match="tie_word_embeddings must be false"):
        read(HF | {"text_config": FLAN_T5 | {"tie_word_embeddings": True}})
    resaved = FLAN_T5 | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert read(HF | {"text_config": resaved}) == read(HF | {"text_config": FLAN_T5})
    with pytest.raises(ConfigError, match="dense_act_fn 'swish' is not served"):
        read(HF | {"text_config": FLAN_T5 | {"dense_act_fn": "swish"}})


def test_old_files_without_an_image_token_are_read() -> None:
    assert read(HF | {"text_config": OPT}).image_token_id is None
    assert read(HF | {"text_config": OPT, "image_token_id": 50265}).image_token_id == 50265


def test_the_norm_of_the_features_has_the_eps_of_its_files() -> None:
    """LAVIS' is torch's default, transformers takes the tower's."""
    assert read(CONFIGS["blip2-opt-2.7b"]).connector.feature_norm_eps == 1e-6  # type: ignore[union-attr]
    assert read(LAVIS_VIT_L).connector.feature_norm_eps == 1e-5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"model_type": "llama"}}, "language model of type 'llama' is not served"),
        ({"text_config": OPT | {"do_layer_norm_before": False}}, "do_layer_norm_before False changes"),
        ({"text_config": OPT | {"word_embed_proj_dim": 512}}, "only OPT-350m has that"),
        ({"vision_config": {"qkv_bias": False}}, "qkv_bias False changes"),
        ({"qformer_config": {"position_embedding_type": "relative_key"}}, "position_embedding_type"),
        ({"qformer_config": {"attention_probs_dropout_prob": 0.2}}, "one number is served"),
        ({"vision_temperature": 2}, "'vision_temperature'.* is not known"),
    ],
)
def test_what_would_change_the_numbers_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(CONFIGS["blip2-opt-2.7b"] | change)


def test_an_unknown_language_model_of_lavis_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'google/flan-t5-base' is not known.*flan-t5-xl"):
        read(LAVIS_VIT_L | {"t5_model": "google/flan-t5-base"})
    with pytest.raises(ConfigError, match="vit_model 'swin' is not served"):
        read(LAVIS_VIT_L | {"vit_model": "swin"})


def test_a_model_of_retrieval_is_sent_to_match() -> None:
    hub = {"model_type": "blip-2", "architectures": ["Blip2ForImageTextRetrieval"]}
    with pytest.raises(ConfigError, match="opsin match"):
        families.family_for_hub(hub).from_hub(hub)
    with pytest.raises(UnknownNameError, match="did you mean 'blip2-itm-vit-g'"):
        families.retriever_preset("blip2-itm-vitg")


# ---- models that compare ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", RETRIEVERS, ids=lambda preset: preset.id)
def test_models_of_stage_1_have_the_published_number_of_parameters(preset: families.RetrieverPreset) -> None:
    with torch.device("meta"):
        model = Retriever(preset.config)
    assert sum(p.numel() for p in model.parameters()) == preset.parameters
    assert bool(preset.hub) != bool(preset.access)
    data = json.loads(json.dumps(preset.model_dump(mode="json")))
    assert families.RetrieverPreset.parse(data, where="json") == preset


def test_parts_have_the_sizes_that_the_papers_numbers_round() -> None:
    with torch.device("meta"):
        model = Retriever(families.retriever_preset("blip2-stage1-vit-g").config)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    everything = sum(p.numel() for p in model.parameters())
    assert count["vision"] + count["norm_features"] == 985_952_256
    assert count["qformer"] == 161_825_280
    assert count["words"] + count["positions"] == 23_834_880
    assert everything - count["vision"] == 186_705_470  # the paper: 188M


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_models_that_compare_survive_both_layouts(tmp_path: Path, layout: str) -> None:
    config = TINY_RETRIEVER
    if layout == "hf":
        config = config.replace(heads="matching", qformer=config.qformer.replace(feature_norm_eps=1e-6))
    retriever = weights.build_retriever(config, seed=1)
    report = weights.export_retriever(tmp_path / "model", retriever, layout=layout)
    assert report.changed == ()
    loaded = weights.load_retriever(tmp_path / "model")
    assert (loaded.config, loaded.layout) == (config, layout)
    for name, tensor in retriever.state_dict().items():
        assert torch.equal(loaded.retriever.state_dict()[name], tensor), name


def test_transformers_cannot_keep_the_heads_of_stage_1(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither the head that writes captions nor the temperature"):
        weights.export_retriever(tmp_path / "model", weights.build_retriever(TINY_RETRIEVER), layout="hf")


def test_copies_of_tied_tensors_in_lavis_files_are_left_alone(tmp_path: Path) -> None:
    retriever = weights.build_retriever(TINY_RETRIEVER, seed=1)
    weights.export_retriever(tmp_path / "model", retriever)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["Qformer.cls.predictions.decoder.weight"] = tensors[
        "Qformer.bert.embeddings.word_embeddings.weight"
    ].clone()
    tensors["Qformer.cls.predictions.decoder.bias"] = tensors["Qformer.cls.predictions.bias"].clone()
    tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, file)
    assert weights.load_retriever(tmp_path / "model").layout == "original"


# ---- checkpoints in parts --------------------------------------------------------------------------------------------


def without(folder: Path, *prefixes: str) -> dict[str, torch.Tensor]:
    """Take tensors out of an exported model; returns them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    taken = {name: tensors.pop(name) for name in list(tensors) if name.startswith(prefixes)}
    assert taken
    save_file(tensors, file)
    return taken


@pytest.fixture
def lavis(tmp_path: Path) -> Path:
    """A tiny model as LAVIS names it."""
    vlm = weights.build(TINY.config, seed=1)
    weights.save_native(tmp_path / "native", vlm, TINY.config)
    weights.export(tmp_path / "lavis", weights.load(tmp_path / "native"), layout="original")
    return tmp_path / "lavis"


def test_tower_and_language_model_come_from_elsewhere(lavis: Path, tmp_path: Path) -> None:
    """LAVIS writes what was trained; the tower stands in EVA's own file with a block more, OPT in transformers'."""
    whole = weights.load(lavis).vlm.state_dict()
    tower = {n.removeprefix("visual_encoder."): t for n, t in without(lavis, "visual_encoder.").items()}
    last = {n.replace("blocks.0.", "blocks.2."): t for n, t in tower.items() if n.startswith("blocks.0.")}
    extra = {"norm.weight": torch.ones(32), "head.bias": torch.ones(10)}
    save_file({n: t.clone() for n, t in (tower | last | extra).items()}, tmp_path / "eva.safetensors")
    language = {n.removeprefix("opt_model."): t for n, t in without(lavis, "opt_model.").items()}
    language["lm_head.weight"] = language["model.decoder.embed_tokens.weight"].clone()
    save_file(language, tmp_path / "opt.safetensors")
    parts = {"tower": tmp_path / "eva.safetensors", "language": tmp_path / "opt.safetensors"}
    loaded = weights.load(lavis, **parts).vlm.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(loaded[name], tensor), name
    with pytest.raises(WeightError, match=r"holds no vision tower.*tower="):
        weights.load(lavis, language=parts["language"])
    with pytest.raises(WeightError, match=r"holds no language model.*language="):
        weights.load(lavis, tower=parts["tower"])


def test_another_blip2_may_lend_its_tower(lavis: Path, tmp_path: Path) -> None:
    weights.export(tmp_path / "hf", weights.load(lavis), layout="hf")
    tower = weights.load(lavis).vlm.vision.state_dict()
    retriever = weights.build_retriever(TINY_RETRIEVER, seed=2)
    weights.export_retriever(tmp_path / "stage1", retriever)
    without(tmp_path / "stage1", "visual_encoder.")
    for lender in (lavis, tmp_path / "hf"):
        found = weights.load_retriever(tmp_path / "stage1", tower=lender).retriever.vision.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in tower.items())


def test_a_whole_model_takes_no_parts(lavis: Path) -> None:
    with pytest.raises(WeightError, match="holds its own vision tower; tower= is for checkpoints without one"):
        weights.load(lavis, tower=lavis)
    with pytest.raises(WeightError, match="holds its own language model; language= is for"):
        weights.load(lavis, language=lavis)


def test_a_missing_query_is_missed_even_where_parts_may_lack(lavis: Path) -> None:
    without(lavis, "query_tokens", "visual_encoder.")
    with pytest.raises(WeightError, match=r"missing\s+connector.queries <- query_tokens"):
        weights.load(lavis)


def test_pickles_are_refused_with_a_command_that_looks_under_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LAVIS_VIT_L))
    (tmp_path / "blip2_pretrained_flant5xl_vitL.pth").write_bytes(b"\x80")
    with pytest.raises(WeightError, match=r"(?s)pickles only .*d.get\('model', d\)"):
        weights.load(tmp_path)


def test_a_key_bias_that_lavis_has_no_room_for_is_not_dropped_silently(tmp_path: Path) -> None:
    vlm = weights.build(TINY.config, seed=1)
    with torch.no_grad():
        vlm.vision.layers[0].attn.k.bias.fill_(1.0)  # type: ignore[union-attr]
    model = weights.Model(vlm, TINY.config, "changed")
    with pytest.raises(WeightError, match=r"does not store 'vision.layers.0.attn.k.bias'"):
        weights.export(tmp_path / "model", model, layout="original")
    weights.export(tmp_path / "hf", model, layout="hf")


def test_the_qformer_stays_in_float32_where_the_rest_is_half(lavis: Path) -> None:
    vlm = weights.load(lavis, dtype="bfloat16").vlm
    kinds = {name: tensor.dtype for name, tensor in vlm.state_dict().items()}
    exact = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert exact == {n for n in kinds if n.startswith(("connector.queries", "connector.qformer."))}
    encoder = Encoder(TINY.config, toys.byte_tokenizer(lavis))
    prompt = encoder.encode(ask("What?", toys.picture((40, 40))))
    assert generate(vlm, [prompt], None, Sampling(max_new_tokens=3))[0].usage.new_tokens == 3


# ---- descriptions --------------------------------------------------------------------------------------------------


def test_a_picture_alone_is_described() -> None:
    """Without a question the prompt is the picture and the begin-of-sequence token, as transformers' is."""
    from opsin.spec.chat import ChatFormat
    from opsin.text.render import ControlSpan, ImageSpan, render

    def written(chat: ChatFormat) -> list[Any]:
        return render(chat, ask("", "photo.jpg").messages, mode="prompt")

    picture = ImageSpan(0)
    assert written(families.chat("blip2_opt")) == [picture, ControlSpan("</s>", False, "begin")]
    end, start = ControlSpan("</s>", False), ControlSpan("<pad>", False, "decoder")
    assert written(families.chat("blip2_t5")) == [picture, end, start]


def test_a_language_model_of_either_kind_is_described_in_a_file() -> None:
    data = json.loads(json.dumps(TINY_T5.model_dump(mode="json")))
    assert isinstance(VLMConfig.parse(data, where="json").decoder, Seq2SeqConfig)
    data["decoder"]["dimm"] = 3
    with pytest.raises(ConfigError, match=r"unknown key 'decoder.dimm' \(did you mean 'dim'"):
        VLMConfig.parse(data, where="json")
    data = json.loads(json.dumps(TINY.config.model_dump(mode="json")))
    data["decoder"]["vocab_sise"] = 3
    with pytest.raises(ConfigError, match=r"unknown key 'decoder.vocab_sise' \(did you mean 'vocab_size'"):
        VLMConfig.parse(data, where="json")


def test_parameters_of_the_tiny_ones_are_what_is_said() -> None:
    assert sum(prod(p.shape) for p in weights.build(TINY.config).parameters()) == TINY.parameters
