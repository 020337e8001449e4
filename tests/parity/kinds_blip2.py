"""BLIP-2 against recorded outputs: pixels, cleaned texts, whole models, scores, and the losses of stage 1.

Everything comes from case.json, the published config files and the tensors; no name of a case says anything.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from opsin import families, weights
from opsin.collate import pad
from opsin.encode import Encoded
from opsin.families.blip2 import BLIP2
from opsin.generate.beam import Beams, beam_search
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.media.image import open_image
from opsin.media.prepare import pixels, prepare
from opsin.nn.batch import Batch
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import Squash
from opsin.spec.seq2seq import Seq2SeqConfig
from opsin.text.cleaning import clean_caption, clean_question
from opsin.verify.cases import encoded, one_tile, read_blip2
from opsin.verify.theirs import to_patches
from opsin.weights.exporter import to_layout
from parity import stage1_blip2
from parity.case import Case, check_close, check_equal

Array = NDArray[Any]


def check(case: Case, ours: torch.Tensor, recorded: Array, what: str, *, kind: str = "logits") -> None:
    """Within the recorded tolerance."""
    check_close(ours.detach().numpy(), recorded, f"{case.name} {what}", **case.allowed(kind))


# ---- pixels and texts ------------------------------------------------------------------------------------------------


def run_image_pixels(case: Case) -> None:
    """Recorded 8-bit pixels, stretched and normalised; the patches hold the same numbers."""
    preprocessor, inputs, outputs = (
        case.json("preprocessor_config.json"),
        case.tensors("inputs.safetensors"),
        case.tensors("outputs.safetensors"),
    )
    side = preprocessor["size"]["height"]
    patch = next(size for size in (14, 16, 8, 7, side) if side % size == 0)
    preset = families.preset("blip2-opt-2.7b").config
    tower = {"patch_size": patch, "image_size": side}
    config = BLIP2.from_hub({"model_type": "blip-2", "vision_config": tower}, preprocessor)
    assert config.resolution == Squash(tile_size=side)
    assert (config.vision.mean, config.vision.std) == (preset.vision.mean, preset.vision.std)
    atol = float(re.findall(r"atol ([\d.e-]+)", case.data["tolerances"])[0])
    for name, recorded in outputs.items():
        picture = Image.fromarray(inputs[name.replace("pixel_values", "image")])
        plan = config.plan(picture.size)
        tile = pixels(picture, plan, config.vision)[0]
        check_close(tile, recorded, f"{case.name} {name}", atol=atol)
        patches = prepare(open_image(picture, mode="reference"), plan, config.vision).patches
        check_equal(patches, to_patches(tile[None], config.vision), f"{case.name} {name} patches")


def run_text_processing(case: Case) -> None:
    """String in, string out."""
    data = case.json("pairs.json")
    for pair in data["caption"]:
        assert clean_caption(pair["inp"]) == pair["out"]
        for key, recorded in pair.items():
            if key == "out_prompt":
                assert clean_caption(pair["inp"], prompt=data["prompt"]) == recorded
            elif found := re.fullmatch(r"out_max(\d+)", key):
                assert clean_caption(pair["inp"], max_words=int(found[1])) == recorded
            else:
                assert key in ("inp", "out"), f"{case.name}: nobody knows how to check {key!r}"
    for pair in data["question"]:
        assert clean_question(pair["inp"]) == pair["out"]


# ---- models ----------------------------------------------------------------------------------------------------------


def run_model(case: Case) -> None:
    """A generative model: features, rows, logits, loss, gradients, other sizes of pictures, and answers."""
    model = weights.load(str(case.folder))
    vlm, hub = model.vlm, case.json("config.json")
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    checked = set()

    samples = read_blip2(vlm.config, case, inputs)
    batch = pad(samples)
    assert batch.patches is not None
    assert batch.grids is not None
    with torch.no_grad():
        count, connector = len(samples), vlm.connector
        features = vlm.vision(batch.patches, batch.grids)
        seen = connector.norm_features(features).unflatten(0, (count, -1))  # their tower's last state is normed
        check(case, seen, outputs["vision_last_hidden_state"], "tower")
        rows = vlm.rows(batch.patches, batch.grids).unflatten(0, (count, -1))
        check(case, rows, outputs["image_features"], "rows")
        states = hidden_of(connector.qformer, lambda: connector(features, batch.grids))
        check(case, states, outputs["qformer_last_hidden_state"], "queries")
    checked |= {"vision_last_hidden_state", "image_features", "qformer_last_hidden_state"}

    hidden = vlm.hidden(batch)
    check_logits(case, vlm, samples, hidden, inputs, outputs["logits"], "logits")
    places, targets = batch.targets()
    loss = F.cross_entropy(vlm.logits(hidden.flatten(0, 1)[places]), targets)
    check(case, loss, outputs["loss"], "loss", kind="loss")
    loss.backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in vlm.named_parameters()}
    layout = next(each for each in BLIP2.layouts(vlm.config) if each.name == model.layout)
    by_theirs = to_layout(gradients, layout)
    checked |= {"logits", "loss"}
    for name in (name for name in outputs if name.startswith("grad.")):
        check(case, by_theirs[name.removeprefix("grad.")], outputs[name], name, kind="grads")
        checked.add(name)

    with torch.no_grad():
        for name in (name for name in inputs if name.startswith("pixel_values_")):
            other = pad(read_blip2(vlm.config, case, inputs | {"pixel_values": inputs[name]}))
            key = f"logits_{name.removeprefix('pixel_values_')}_interp"
            check_logits(case, vlm, samples, vlm.hidden(other), inputs, outputs[key], key)
            checked.add(key)
        checked |= check_answers(case, vlm, hub, inputs, outputs)
    unread = outputs.keys() - checked
    assert not unread, f"{case.name}: recorded, but nobody knows how to check it: {sorted(unread)}"


def hidden_of(module: torch.nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """What a module gives while something else is run."""
    kept: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: kept.append(output[0]))
    run()
    handle.remove()
    return kept[0]


def check_logits(
    case: Case,
    vlm: VLM,
    samples: list[Encoded],
    hidden: torch.Tensor,
    inputs: dict[str, Array],
    recorded: Array,
    what: str,
) -> None:
    """Every logit of a token that is not padding; of a T5, those of the decoder where there is a label."""
    for row, sample in enumerate(samples):
        logits = vlm.logits(hidden[row, sample.encoder_length : sample.num_tokens])
        if sample.encoder_length:
            labelled = inputs["labels"][row] != -100
            check(case, logits[:-1], recorded[row][labelled], f"{what} of row {row}")
        else:
            valid = inputs["attention_mask"][row].astype(bool)
            check(case, logits, recorded[row][valid], f"{what} of row {row}")


def check_answers(
    case: Case, vlm: VLM, hub: dict[str, Any], inputs: dict[str, Array], outputs: dict[str, Array]
) -> set[str]:
    """Greedy ids and the logits behind them, alone and side by side; beams where no near tie decides."""
    text, checked = hub["text_config"], set()
    eos = text["eos_token_id"]
    assert isinstance(eos, int), f"{case.name}: several stop tokens, {eos}"
    prompts = read_blip2(vlm.config, case, inputs, "gen_")
    bare = read_blip2(vlm.config, case, without_prompt(hub, inputs), "gen_")
    for name, samples in (("greedy_ids", prompts), ("greedy_ids_no_prompt", bare)):
        if name not in outputs:
            continue
        recorded = [new_ids(vlm.config, row, inputs if name == "greedy_ids" else {}, hub) for row in outputs[name]]
        settings = Sampling(max_new_tokens=max(map(len, recorded)), stop_ids=(eos,))
        together = [list(answer.ids) for answer in generate(vlm, samples, None, settings)]
        alone = [list(generate(vlm, [sample], None, settings)[0].ids) for sample in samples]
        for row, ids in enumerate(recorded):
            wanted = ids[: ids.index(eos) + 1] if eos in ids else ids
            assert together[row] == alone[row] == wanted, f"{case.name} {name} row {row}"
            if name == "greedy_ids" and "greedy_step_logits" in outputs:
                logits = step_logits(vlm, samples[row], wanted)
                check(case, logits, outputs["greedy_step_logits"][row][: len(wanted)], f"greedy steps of row {row}")
        checked |= {name}
    checked |= {"greedy_step_logits"}
    for name in (name for name in outputs if re.fullmatch(r"beam\d+_ids", name)):
        # Advisory: near ties are possible. A row may differ only where ours is at least as likely as theirs.
        width = int(re.findall(r"\d+", name)[0])
        limit = max(len(new_ids(vlm.config, row, inputs, hub)) for row in outputs["greedy_ids"])
        found = beam_search(vlm, prompts, None, Beams(num_beams=width, max_new_tokens=limit, stop_ids=(eos,)))
        for row, answer in enumerate(found):
            ids = new_ids(vlm.config, outputs[name][row], inputs, hub)
            wanted = ids[: ids.index(eos) + 1] if eos in ids else ids
            if list(answer.ids) != wanted:
                ours, theirs = (mean_likelihood(vlm, prompts[row], each) for each in (list(answer.ids), wanted))
                assert ours >= theirs - 1e-5, f"{case.name} {name} row {row}: {ours} is less likely than {theirs}"
        checked.add(name)
    return checked


def without_prompt(hub: dict[str, Any], inputs: dict[str, Array]) -> dict[str, Array]:
    """The ids that transformers makes for a picture alone: its slots and the begin-of-sequence token."""
    count = len(inputs["pixel_values"])
    token = hub.get("image_token_index", hub.get("image_token_id"))
    row = [token] * hub.get("num_query_tokens", 32) + [hub["text_config"]["bos_token_id"]]
    ids = np.array([row] * count, np.int64)
    return {**inputs, "gen_input_ids": ids, "gen_attention_mask": np.ones_like(ids)}


def new_ids(config: VLMConfig, row: Array, inputs: dict[str, Array], hub: dict[str, Any]) -> list[int]:
    """What was generated: behind the prompt, which OPT's sequences hold, or behind the decoder's start token."""
    if isinstance(config.decoder, Seq2SeqConfig):
        return row[1:].tolist()
    length = inputs["gen_input_ids"].shape[1] if inputs else hub.get("num_query_tokens", 32) + 1
    return row[length:].tolist()


def continued(sample: Encoded, ids: list[int]) -> Batch:
    """A prompt with an answer behind it."""
    everything = np.concatenate([sample.ids, np.array(ids, np.int64)])
    return pad([encoded(everything, sample.slots, sample.images, encoder_length=sample.encoder_length)])


def step_logits(vlm: VLM, sample: Encoded, ids: list[int]) -> torch.Tensor:
    """The logits that each id of an answer was taken from, by one pass without a cache."""
    hidden = vlm.hidden(continued(sample, ids[:-1]))[0]
    return vlm.logits(hidden[sample.num_tokens - 1 :])


def mean_likelihood(vlm: VLM, sample: Encoded, ids: list[int]) -> float:
    logs = step_logits(vlm, sample, ids).log_softmax(-1)
    return float(logs[range(len(ids)), ids].sum()) / len(ids)


# ---- scores ----------------------------------------------------------------------------------------------------------


def run_retrieval_scores(case: Case) -> None:
    """Matching and contrastive scores of a converted model, with and without placeholders before its texts."""
    model = weights.load_retriever(case.folder)
    retriever, config = model.retriever, model.config
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    strip = config.qformer.num_queries if config.image_token_id is not None else 0
    assert (inputs["input_ids"][:, :strip] == config.image_token_id).all() if strip else True
    ids = torch.from_numpy(inputs["input_ids"][:, strip:])
    valid = torch.from_numpy(inputs["attention_mask"][:, strip:]).bool()
    pictures = [one_tile(config, tile) for tile in inputs["pixel_values"]]
    patches = torch.from_numpy(np.concatenate([picture.patches for picture in pictures]))
    grids = torch.from_numpy(np.concatenate([picture.grids for picture in pictures]))
    with torch.no_grad():
        features = retriever.features(patches, grids)
        states = retriever.match_states(features, ids, valid)
        text = retriever.read(ids, valid)
        images = retriever.picture_vectors(retriever.see(features).states)
        texts = retriever.text_vectors(text)
        logits = retriever.match(features, ids, valid)
    per_image = torch.einsum("iqd,td->itq", images, texts).amax(-1)
    kept = torch.cat([torch.ones(len(ids), config.qformer.num_queries, dtype=torch.bool), valid], dim=1)
    ours = {
        "vision_last_hidden_state": features.values,
        "itm_hidden": states,
        "text_hidden": text,
        "itm_logits": logits,
        "image_embeds": images,
        "text_embeds": texts,
        "itc_logits_per_image": per_image,
        "itc_logits_per_text": per_image.T,
    }
    places = {"itm_hidden": kept, "text_hidden": valid}  # states of padding mean nothing
    for name, recorded in outputs.items():
        assert name in ours, f"{case.name}: recorded, but nobody knows how to check {name!r}"
        where = places.get(name)
        value = ours[name] if where is None else ours[name][where]
        check(case, value, recorded if where is None else recorded[where.numpy()], name)


RUNNERS: dict[tuple[str, str], Callable[[Case], None]] = {
    ("blip2", "image_pixels"): run_image_pixels,
    ("blip2", "text_processing"): run_text_processing,
    ("blip2", "model"): run_model,
    ("blip2", "retrieval_scores"): run_retrieval_scores,
    ("blip2", "stage1_losses"): stage1_blip2.run_stage1_losses,
}
