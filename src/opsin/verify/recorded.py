"""A model against the recorded outputs of its authors' code, within the tolerances recorded with them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opsin import weights
from opsin.collate import pad
from opsin.encode import Encoded
from opsin.errors import ConfigError
from opsin.families import family
from opsin.families._internvl_hub import read_tower
from opsin.families._internvl_text import read_decoder
from opsin.generate.decode import generate
from opsin.generate.sampling import Sampling
from opsin.nn.seq2seq import Seq2Seq
from opsin.nn.vlm import VLM
from opsin.spec.resolution import DynamicTiles
from opsin.verify import texts
from opsin.verify.cases import (
    Array,
    Arrays,
    Case,
    cut,
    encoded,
    llava_pictures,
    one_tile,
    read_blip2,
    read_internvl,
    read_llava,
    read_qwen2_vl,
    read_qwen_vl,
)
from opsin.verify.rungs import Ladder, Pair, as_array, compare_recorded

Pairs = Iterator[tuple[str, Pair]]
"""(rung, our numbers and the recorded ones)."""


def verify_case(folder: Path, name: str | Path | None = None, *, tokenizers: Path | None = None) -> Ladder:
    """Compare a model, or a tokenizer, with a case.

    name: the model, by default the case's own tiny one. tokenizers: folder of published tokenizers, by default the one
    beside the case. Raises ConfigError where the case cannot be read or holds nothing that is compared here, and what
    loading raises.
    """
    case = Case.load(folder, tokenizers)
    is_text = case.kind == "tokenizer" and case.family in texts.DEFAULT_TOKENIZER
    if (case.family, case.kind) not in KINDS and not is_text:
        raise ConfigError(
            f"{folder} holds nothing that `opsin verify --case` compares: its kind is {case.kind!r} of family "
            f"{case.family!r}. It compares {', '.join(f'{kind} of {family}' for family, kind in KINDS)}, and tokenizer "
            f"of {', '.join(texts.DEFAULT_TOKENIZER)}; tests/parity runs the other kinds"
        )
    if name and case.kind != "model":
        raise ConfigError(f"{folder} is of kind {case.kind!r} and takes no model; leave out {name}")
    missing = {"greedy": "recorded answers were kept from ending early"} if _kept_going(case) else {}
    try:
        if is_text:
            found = [("ids", Pair(np.array(ours), np.array(wanted))) for _, ours, wanted in texts.tokenised(case)]
        else:
            found = _of_model(case, name)
            missing |= dict.fromkeys(("pixels", "ids"), "the case's inputs")
    except KeyError as error:
        raise ConfigError(f"{folder} lacks {error}, which other cases of its kind have") from None
    if not found:
        raise ConfigError(f"{folder} holds nothing to compare: numbers of no rung are recorded")
    reference = f"{case.data.get('reference', 'the code of its authors')} (recorded)"
    return Ladder(str(name or case.name), reference, "float32", tuple(compare_recorded(found, missing)))


def _of_model(case: Case, name: str | Path | None) -> list[tuple[str, Pair]]:
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    with torch.inference_mode():
        vlm = weights.load(name, dtype="float32").vlm if name else own_model(case)
        return list(KINDS[case.family, case.kind].pairs(case, vlm, inputs, outputs))


def _kept_going(case: Case) -> bool:
    """Whether answers were kept from ending early: such an answer is not what a model says by itself."""
    return bool(case.data.get("greedy", {}).get("min_new_tokens"))


# ---- families --------------------------------------------------------------------------------------------------------


def _llava(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    samples = read_llava(vlm.config, case, inputs)
    batch = pad(samples)
    if "tower_features" in outputs or "projected_features" in outputs:
        assert batch.patches is not None
        assert batch.grids is not None
        shown = shown_tiles(samples, inputs)
        parts = (("features", "tower_features", vlm.vision), ("rows", "projected_features", vlm.rows))
        for rung, key, part_of in parts:
            if key in outputs:
                ours = part_of(batch.patches, batch.grids)
                recorded = outputs[key][shown].reshape(-1, ours.shape[-1])
                yield rung, Pair(as_array(ours), recorded, **case.allowed("features"))
    if "image_features" in outputs:
        assert batch.slots is not None
        filled = vlm.embed(batch).flatten(0, 1)[batch.slots]
        yield "rows", Pair(as_array(filled), outputs["image_features"], **case.allowed("features"))
    valid = outputs.get("expanded_attention_mask", inputs["attention_mask"]).astype(bool)
    yield from _logits(case, vlm, samples, _masked(outputs, valid))
    yield from _loss(case, vlm, samples, outputs)
    for row, sample in enumerate(samples):
        if f"greedy_ids.{row}" in outputs:  # generate on embeddings puts a BOS in front
            yield _greedy(vlm, sample, outputs[f"greedy_ids.{row}"][1:])
        elif f"generated_ids_single.{row}" in outputs:
            yield _greedy(vlm, sample, outputs[f"generated_ids_single.{row}"])


def shown_tiles(samples: Sequence[Encoded], inputs: Arrays) -> list[int]:
    """Indices into LLaVA's recorded tiles of those that belong to a picture mark; the rest are dummies of text rows."""
    counts = [1 if picture.ndim == 3 else len(picture) for picture in llava_pictures(inputs)]
    starts = np.concatenate([[0], np.cumsum(counts)])
    shown: list[int] = []
    taken = 0
    for sample in samples:
        for index in range(taken, taken + len(sample.images)):
            shown += range(starts[index], starts[index + 1])
        taken += max(len(sample.images), 1)
    return shown


def _blip2(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    samples = read_blip2(vlm.config, case, inputs)
    batch, count, allowed = pad(samples), len(samples), case.allowed("features")
    assert batch.patches is not None
    assert batch.grids is not None
    features = vlm.vision(batch.patches, batch.grids)
    if "vision_last_hidden_state" in outputs:  # their tower's last state is normed
        seen = vlm.connector.get_submodule("norm_features")(features).unflatten(0, (count, -1))
        yield "features", Pair(as_array(seen), outputs["vision_last_hidden_state"], **allowed)
    if "image_features" in outputs:
        rows = vlm.rows(batch.patches, batch.grids).unflatten(0, (count, -1))
        yield "rows", Pair(as_array(rows), outputs["image_features"], **allowed)
    is_seq2seq = isinstance(vlm.decoder, Seq2Seq)
    valid = inputs["labels"] != -100 if is_seq2seq else inputs["attention_mask"].astype(bool)
    yield from _logits(case, vlm, samples, _masked(outputs, valid))
    yield from _loss(case, vlm, samples, outputs)
    for key in (key for key in inputs if key.startswith("pixel_values_")):
        others = read_blip2(vlm.config, case, inputs | {"pixel_values": inputs[key]})
        recorded = outputs.get(f"logits_{key.removeprefix('pixel_values_')}_interp")
        yield from _logits(case, vlm, others, _masked({} if recorded is None else {"logits": recorded}, valid))
    if "greedy_ids" in outputs:
        # What was generated stands behind the decoder's start token, or behind the prompt, which OPT's sequences hold.
        begin = 1 if is_seq2seq else inputs["gen_input_ids"].shape[1]
        eos = case.json("config.json")["text_config"]["eos_token_id"]
        for sample, row in zip(read_blip2(vlm.config, case, inputs, "gen_"), outputs["greedy_ids"], strict=True):
            yield _greedy(vlm, sample, row[begin:], eos)


def _qwen2_vl(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    samples = read_qwen2_vl(vlm.config, inputs)
    valid = inputs["attention_mask"].astype(bool)
    for row, sample in enumerate(samples if "position_ids" in outputs else ()):
        yield "positions", Pair(sample.positions.T, outputs["position_ids"][:, row][:, valid[row]])
    # All pictures of the batch stand in one list, all videos in another.
    for key, is_video in (("image_embeds", False), ("video_embeds", True)):
        shown = [image for sample in samples for image in sample.images if bool(image.plan.frames) == is_video]
        if key in outputs:
            patches = torch.from_numpy(np.concatenate([image.patches for image in shown]))
            rows = vlm.rows(patches, torch.from_numpy(np.concatenate([image.grids for image in shown])))
            yield "rows", Pair(as_array(rows), outputs[key], **case.allowed("features"))
    yield from _logits(case, vlm, samples, _masked(outputs, valid))
    yield from _loss(case, vlm, samples, outputs)
    if "greedy_ids" in outputs:
        for sample, answer in zip(samples, outputs["greedy_ids"], strict=True):
            yield _greedy(vlm, sample, answer)


def _qwen_vl(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    samples = read_qwen_vl(vlm.config, case, inputs)
    if "image_features" in outputs:
        batch = pad(samples)
        assert batch.patches is not None
        assert batch.grids is not None
        rows = vlm.rows(batch.patches, batch.grids)
        wanted = outputs["image_features"].reshape(-1, rows.shape[-1])
        yield "rows", Pair(as_array(rows), wanted, **case.allowed("features"))
    # The authors pad on the left and count positions from there.
    places, width = outputs["logit_positions"], inputs["input_ids"].shape[1]
    for row, sample in enumerate(samples):
        padding = width - sample.num_tokens
        batch = pad([sample])
        hidden = vlm.hidden(replace(batch, positions=batch.positions + padding))[0]
        real = places >= padding
        ours = vlm.logits(hidden[torch.from_numpy(places[real] - padding)])
        yield "logits", Pair(as_array(ours), outputs["logits"][row][real], **case.allowed("logits"))
        if "greedy_ids" in outputs:
            yield _greedy(vlm, sample, outputs["greedy_ids"][row])
    yield from _loss(case, vlm, samples, outputs)


def _internvl(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    for run in case.data["runs"]:
        run = {"name": run} if isinstance(run, str) else run
        model = reordered(vlm, run.get("ps_version"))
        given, recorded = part(inputs, run.get("inputs_from", run["name"])), part(outputs, run["name"])
        if "image_embeds" in recorded:
            patches, grids = cut(given["pixel_values"], model.config.vision)
            rows = model.rows(torch.from_numpy(patches), torch.from_numpy(grids))
            wanted = recorded["image_embeds"].reshape(-1, rows.shape[-1])
            yield "rows", Pair(as_array(rows), wanted, **case.allowed("features"))
        if not recorded.keys() & {"logits", "generated_ids"}:
            continue
        samples = read_internvl(model.config, case, given)
        valid = given.get("attention_mask", np.ones_like(given["input_ids"])).astype(bool)
        yield from _logits(case, model, samples, _masked(recorded, valid))
        yield from _loss(case, model, samples, recorded)
        if "generated_ids" in recorded and not _kept_going(case):
            for sample, row in zip(samples, recorded["generated_ids"], strict=True):
                yield _greedy(model, sample, row, run.get("eos_token_id"))


def part(tensors: Arrays, name: str) -> Arrays:
    """The tensors of one run."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def reordered(vlm: VLM, ps_version: str | None) -> VLM:
    """InternVL with rows in the other order, where a run asks for it."""
    if ps_version is None:
        return vlm
    connector = vlm.config.connector.replace(order="columns" if ps_version == "v1" else "rows")
    other = VLM(vlm.config.replace(connector=connector)).eval()
    other.load_state_dict(vlm.state_dict())
    return other


def _internvl_model(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    """Runs of a whole model, or texts of a language model alone."""
    if "runs" in case.data and "vision_config" in case.json("config.json"):
        yield from _internvl(case, vlm, inputs, outputs)
        return
    for key, recorded in outputs.items():
        suffix = key.removeprefix("logits")
        ids = inputs[f"input_ids{suffix}"]
        valid = inputs.get(f"attention_mask{suffix}", np.ones_like(ids)).astype(bool)
        samples = [encoded(row[kept]) for row, kept in zip(ids, valid, strict=True)]
        yield from _logits(case, vlm, samples, _masked({"logits": recorded}, valid))


def _internvl_tower(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    for name, tiles in inputs.items():
        states = tower_states(vlm, tiles, name.removeprefix("pixel_values"))
        for key in states.keys() & outputs.keys():
            yield "features", Pair(as_array(states[key]), outputs[key], **case.allowed("features"))


def tower_states(vlm: VLM, tiles: Array, suffix: str) -> dict[str, torch.Tensor]:
    """What InternVL's tower gives for recorded tiles, every layer and class token, by its recorded names."""
    patches, grids = map(torch.from_numpy, cut(tiles, vlm.config.vision))
    features = vlm.vision(patches, grids).unflatten(0, (len(tiles), -1)).unflatten(-1, (-1, vlm.config.vision.dim))
    states = {f"hidden_states{suffix}.{index}": features[:, :, index] for index in range(features.shape[2])}
    return states | {f"last_hidden_state{suffix}": features[:, :, -1], f"pooler_output{suffix}": features[:, 0, -1]}


def _qwen2_vl_tower(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    patches, grids = torch.from_numpy(inputs["pixel_values"]), torch.from_numpy(inputs["grid_thw"])
    features, rows = vlm.vision(patches, grids), vlm.rows(patches, grids)
    yield "features", Pair(as_array(features), outputs["last_hidden_state"], **case.allowed("features"))
    yield "rows", Pair(as_array(rows), outputs["merged"], **case.allowed("features"))


def _qwen_vl_tower(case: Case, vlm: VLM, inputs: Arrays, outputs: Arrays) -> Pairs:
    ready = [one_tile(vlm.config, image.astype(np.float32)) for image in inputs["images"]]
    patches = torch.from_numpy(np.concatenate([image.patches for image in ready]))
    grids = torch.from_numpy(np.concatenate([image.grids for image in ready]))
    seen = vlm.vision(patches, grids).unflatten(0, (len(ready), -1))
    last = outputs["tower_last_rows"]
    yield "features", Pair(as_array(seen[:, -last.shape[1] :]), last, **case.allowed("features"))
    rows = vlm.rows(patches, grids).unflatten(0, (len(ready), -1))
    yield "rows", Pair(as_array(rows), outputs["features"], **case.allowed("features"))


def _published(case: Case) -> VLM:
    """A whole model in a published layout."""
    return weights.load(case.folder, dtype="float32").vlm


def _qwen_vl_tower_model(case: Case) -> VLM:
    """Tower and resampler are the case's, the rest is random and as small as may be."""
    hub = case.json("config.json")
    width = hub["visual"]["output_dim"]
    small = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 1, "kv_channels": width}
    whole = {"model_type": "qwen", "vocab_size": 512, "intermediate_size": 8, **small, **hub}
    vlm = weights.build(family("qwen_vl").from_hub(whole), seed=0).eval()
    weights.load_part(vlm, "vision", case.folder)
    weights.load_part(vlm, "connector", case.folder)
    return vlm


def _qwen2_vl_tower_model(case: Case) -> VLM:
    """Tower and merger are the case's, the rest is random."""
    vlm = weights.build(family("qwen2_vl").from_hub(case.json("config.json"), None), seed=0).eval()
    weights.load_part(vlm, "vision", case.folder)
    weights.load_part(vlm, "connector", case.folder)
    return vlm


def _internvl_tower_model(case: Case) -> VLM:
    """The tower is the case's, the rest is random; every layer and the class token come out."""
    vision = read_tower(case.json("config.json"), out_layer=-1)
    every = vision.replace(class_token="keep", out_layers=tuple(range(vision.num_layers + 1)))
    resolution = DynamicTiles(tile_size=vision.image_size)
    tiny = family("internvl15").tiny.config
    vlm = weights.build(tiny.replace(vision=every, resolution=resolution), seed=0).eval()
    weights.load_part(vlm, "vision", case.folder)
    return vlm


def _internvl_own(case: Case) -> VLM:
    """A whole model, or a language model alone with a random tower."""
    hub = case.json("config.json")
    if "vision_config" in hub:
        return _published(case)
    decoder = read_decoder(hub, tied=bool(hub.get("tie_word_embeddings")), where=case.name)
    tiny = family("internvl15").tiny.config
    vlm = weights.build(tiny.replace(decoder=decoder, image_token_id=None), seed=0).eval()
    weights.load_part(vlm, "decoder", case.folder)
    return vlm


@dataclass(frozen=True)
class Kind:
    """What one kind of case of one family holds."""

    pairs: Callable[[Case, VLM, Arrays, Arrays], Pairs]
    """(case, model, inputs, outputs) to our numbers and the recorded ones."""
    own_model: Callable[[Case], VLM] = _published
    """The case's own model."""


KINDS = {
    ("llava", "model"): Kind(_llava),
    ("blip2", "model"): Kind(_blip2),
    ("qwen_vl", "model"): Kind(_qwen_vl),
    ("qwen_vl", "vision_features"): Kind(_qwen_vl_tower, _qwen_vl_tower_model),
    ("qwen2_vl", "model"): Kind(_qwen2_vl),
    ("qwen2_vl", "vision_features"): Kind(_qwen2_vl_tower, _qwen2_vl_tower_model),
    ("internvl", "model"): Kind(_internvl_model, _internvl_own),
    ("internvl", "vision_features"): Kind(_internvl_tower, _internvl_tower_model),
}
"""By the family and the kind that a case names."""


def own_model(case: Case) -> VLM:
    """The model that a case holds, or the part of one, with the rest random."""
    return KINDS[case.family, case.kind].own_model(case)


# ---- what all share --------------------------------------------------------------------------------------------------


def _masked(outputs: Arrays, valid: Array) -> list[Array]:
    """Recorded logits (B, T, V) of each row's real tokens; none where none are recorded."""
    return [row[kept] for row, kept in zip(outputs["logits"], valid, strict=True)] if "logits" in outputs else []


def _logits(case: Case, vlm: VLM, samples: Sequence[Encoded], recorded: Sequence[Array]) -> Pairs:
    """Logits of one padded batch; of a T5 those that a label is taken from, which the last one is not."""
    if not recorded:
        return
    hidden = vlm.hidden(pad(samples))
    for row, (sample, wanted) in enumerate(zip(samples, recorded, strict=True)):
        stop = sample.num_tokens - bool(sample.encoder_length)
        ours = vlm.logits(hidden[row, sample.encoder_length : stop])
        yield "logits", Pair(as_array(ours), wanted, **case.allowed("logits"))


def _loss(case: Case, vlm: VLM, samples: Sequence[Encoded], outputs: Arrays) -> Pairs:
    """Mean over all taught tokens of the batch. Rotations that grow at inference only do not; nothing is dropped."""
    if "loss" not in outputs:
        return
    batch = pad(samples)
    places, targets = batch.targets()
    vlm.training = True  # of the model itself, which decides about rotations; its parts stay as they are
    try:
        logits = vlm.logits(vlm.hidden(batch, wanted=places))
    finally:
        vlm.training = False
    table = case.data.get("tolerances", case.data.get("tolerance"))
    has_own = not isinstance(table, dict) or "logits_atol" not in table or "loss_atol" in table
    allowed = case.allowed("loss" if has_own else "logits")
    loss = torch.nn.functional.cross_entropy(logits.float(), targets)
    yield "loss", Pair(as_array(loss).reshape(1), outputs["loss"].reshape(1), **allowed)


def _greedy(vlm: VLM, sample: Encoded, recorded: Iterable[Any], eos: int | None = None) -> tuple[str, Pair]:
    """As many ids as the recorded answer has; padding behind its end is none of it."""
    ids = [int(token) for token in recorded]
    wanted = ids[: ids.index(eos) + 1] if eos in ids else ids
    answer = generate(vlm, [sample], None, Sampling(max_new_tokens=len(wanted), temperature=0.0))[0]
    return "greedy", Pair(np.array(answer.ids, np.int64), np.array(wanted, np.int64))
