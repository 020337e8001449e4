"""InternVL against recorded outputs: tiles, pixels, towers, language models and whole models.

Everything comes from case.json, the published config files and the tensors; no name of a case says anything.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from opsin import families, weights
from opsin.collate import pack, pad
from opsin.encode import Encoded
from opsin.families._parts import IMAGENET_MEAN, IMAGENET_STD
from opsin.generate import Sampling, generate
from opsin.media.image import open_image
from opsin.media.prepare import pixels
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.positions import resize_table
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.spec.resolution import DynamicTiles, Pad, ResolutionConfig, Squash
from opsin.verify.cases import cut, encoded, read_internvl
from opsin.verify.recorded import own_model, part, reordered, tower_states
from parity.case import Case, check_close, check_equal

Array = NDArray[Any]
TINY = families.preset("internvl-1.5-tiny").config
STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": ((0.4814546, 0.4578275, 0.40821073), (0.2686295, 0.2613025, 0.2757711)),  # CLIP's own have a digit more
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Pixel statistics by `normalize_type`."""


# ---- sizes and pixels ------------------------------------------------------------------------------------------------


def sized(resolution: ResolutionConfig, patch_size: int = 14, **changes: Any) -> VLMConfig:
    """A model with this resolution; only the sizes of its tower matter to these kinds."""
    tower = TINY.vision.replace(image_size=resolution.tile_size, patch_size=patch_size, **changes)
    return TINY.replace(resolution=resolution, vision=tower)


def run_size_table(case: Case) -> None:
    """Grid, tiles and tokens of every recorded size and pair of limits."""
    table, side = case.json("table.json"), case.data["image_size"]
    thumbnail = "last" if case.data["use_thumbnail"] else "none"
    per_tile = int((side // 14) ** 2 / 4)
    assert case.data["tokens_per_tile"] == per_tile
    configs: dict[tuple[int, int], VLMConfig] = {}
    for values in table["rows"]:
        row = dict(zip(table["columns"], values, strict=True))
        limits = (row["min_num"], row["max_num"])
        if limits not in configs:
            rule = {"tile_size": side, "min_tiles": limits[0], "max_tiles": limits[1], "thumbnail": thumbnail}
            configs[limits] = sized(DynamicTiles.parse(rule, where=case.name))
        plan, what = configs[limits].plan((row["width"], row["height"])), f"{case.name} {row}"
        assert plan.mosaic == (row["cols"], row["rows"]), what
        assert plan.num_tiles == row["tiles_with_thumbnail"], what
        assert plan.num_slots == row["visual_tokens"], what


def run_image_pixels(case: Case) -> None:
    """Pictures opened as the authors do: 8-bit tiles, thumbnail last, and their normalised values."""
    outputs, checked = case.tensors("outputs.safetensors"), set()
    for item in case.data["items"]:
        picture, what = open_image(case.folder / item["file"], mode="reference"), f"{case.name} {item['file']}"
        assert list(picture.size) == item["size"], what
        mean, std = STATISTICS[item["normalize_type"]]
        config = sized(_resolution(item, mean), mean=mean, std=std)
        plan = config.plan(picture.size)
        assert plan.num_tiles == item["tiles"], what
        if item["dynamic"]:
            assert list(plan.mosaic) == item["grid_cols_rows"], what
            assert list(plan.canvases[0].size) == item["resized"], what
        values = pixels(picture.pixels, plan, config.vision)
        scale = np.array(std, np.float32)[:, None, None], np.array(mean, np.float32)[:, None, None]
        levels = np.rint((values * scale[0] + scale[1]) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        # Pillow 13 moved some values of stretched pictures by one of 256 levels.
        moved = (int(case.data["versions"]["pillow"].split(".")[0]) < 13) != (int(PIL.__version__.split(".")[0]) < 13)
        found = outputs.keys() & {f"{item['id']}.tiles_u8", f"{item['id']}.pixel_values"}
        assert found, f"{what}: nothing is recorded for it"
        if f"{item['id']}.tiles_u8" in found:
            check_close(levels, outputs[f"{item['id']}.tiles_u8"], f"{what} tiles", atol=float(moved))
        if f"{item['id']}.pixel_values" in found:
            allowed = case.data["tolerance"]["pixel_values"]
            atol = 1.01 / 255 / min(std) if moved else allowed["atol"]
            check_close(values, outputs[f"{item['id']}.pixel_values"], what, atol=atol, rtol=allowed["rtol"])
        checked |= found
    assert outputs.keys() == checked, f"{case.name}: nobody checks {sorted(outputs.keys() - checked)}"


def _resolution(item: dict[str, Any], mean: tuple[float, float, float]) -> ResolutionConfig:
    if item["dynamic"]:
        return DynamicTiles(
            tile_size=item["image_size"],
            min_tiles=item["min_num"],
            max_tiles=item["max_num"],
            thumbnail="last" if item["use_thumbnail"] else "none",
        )
    if item["pad2square"]:
        red, green, blue = (int(255 * value) for value in mean)
        return Pad(tile_size=item["image_size"], fill=(red, green, blue))
    return Squash(tile_size=item["image_size"])


# ---- parts -----------------------------------------------------------------------------------------------------------


def run_vision_features(case: Case) -> None:
    """A tower alone: every hidden state, its class token, other grids than its own."""
    vlm = own_model(case)
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    checked = set()
    for name, tiles in inputs.items():
        with torch.inference_mode():
            states = tower_states(vlm, tiles, name.removeprefix("pixel_values"))
        for key in states.keys() & outputs.keys():
            check_close(states[key].numpy(), outputs[key], f"{case.name} {key}", **case.allowed("logits"))
            checked.add(key)
    positions = vlm.vision.positions
    assert positions is not None
    for key in outputs:
        if match := re.fullmatch(r"position_embedding_resized_(\d+)", key):
            side = int(match[1]) // vlm.config.vision.patch_size
            table = torch.cat([positions[:1], resize_table(positions[1:], (side, side))])[None]
            check_close(table.detach().numpy(), outputs[key], f"{case.name} {key}", **case.allowed("logits"))
            checked.add(key)
    assert outputs.keys() == checked, f"{case.name}: nobody checks {sorted(outputs.keys() - checked)}"


def run_language_model(case: Case) -> None:
    """A language model alone: logits of every recorded text."""
    vlm = own_model(case)
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    for key, recorded in outputs.items():
        suffix = key.removeprefix("logits")
        ids = inputs[f"input_ids{suffix}"]
        mask = inputs.get(f"attention_mask{suffix}", np.ones_like(ids)).astype(bool)
        samples = [encoded(row[valid]) for row, valid in zip(ids, mask, strict=True)]
        check_logits(case, vlm, samples, recorded, mask, key)


# ---- whole models ----------------------------------------------------------------------------------------------------


def run_model(case: Case) -> None:
    """A folder as published: rows, logits, loss and greedy answers of every run; or a language model alone."""
    hub = case.json("config.json")
    if "vision_config" not in hub:
        run_language_model(case)
        return
    model = weights.load(case.folder)
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    image_id = case.data.get("img_context_token_id", case.data.get("image_token_id", model.config.image_token_id))
    assert model.config.image_token_id == image_id
    checked: set[str] = set()
    for run in case.data["runs"]:
        run = {"name": run} if isinstance(run, str) else run
        given = part(inputs, run.get("inputs_from", run["name"]))
        recorded = part(outputs, run["name"])
        checked |= {f"{run['name']}.{key}" for key in recorded}
        check_run(case, reordered(model.vlm, run.get("ps_version")), run, given, recorded)
    assert outputs.keys() == checked, f"{case.name}: nobody checks {sorted(outputs.keys() - checked)}"


def check_run(case: Case, vlm: VLM, run: dict[str, Any], given: dict[str, Array], recorded: dict[str, Array]) -> None:
    what = f"{case.name} {run['name']}"
    if "image_embeds" in recorded:
        patches, grids = map(torch.from_numpy, cut(given["pixel_values"], vlm.config.vision))
        with torch.inference_mode():
            rows = vlm.rows(patches, grids).unflatten(0, (len(given["pixel_values"]), -1))
        check_close(rows.numpy(), recorded["image_embeds"], f"{what} rows", **case.allowed("logits"))
    if not recorded.keys() - {"image_embeds"}:
        return
    mask = given.get("attention_mask", np.ones_like(given["input_ids"])).astype(bool)
    samples = read_internvl(vlm.config, case, given)
    for row, sample in enumerate(samples if "position_ids" in given else ()):
        check_equal(given["position_ids"][row][mask[row]], sample.positions[:, 0], f"{what} row {row} positions")
    if "logits" in recorded:
        check_logits(case, vlm, samples, recorded["logits"], mask, what)
    if "loss" in recorded:
        batch = pad(samples)
        places, targets = batch.targets()
        with torch.inference_mode():
            loss = F.cross_entropy(vlm.logits(vlm.hidden(batch).flatten(0, 1)[places]), targets)
        check_close(loss.reshape(1).numpy(), recorded["loss"].reshape(1), f"{what} loss", **case.allowed("logits"))
    if "generated_ids" in recorded:
        check_answers(case, vlm, run, samples, recorded, what)


def check_logits(case: Case, vlm: VLM, samples: Sequence[Encoded], recorded: Array, mask: Array, what: str) -> None:
    """Logits of every real token, from a padded batch and from a packed one."""
    for form, batch in (("padded", pad(samples)), ("packed", pack(samples))):
        with torch.inference_mode():
            hidden = vlm.hidden(batch)
            for row, (place, start, stop) in enumerate(batch.documents):
                logits = vlm.logits(hidden[place, start:stop]).numpy()
                check_close(logits, recorded[row][mask[row]], f"{what}, {form} row {row}", **case.allowed("logits"))


def check_answers(
    case: Case, vlm: VLM, run: dict[str, Any], samples: Sequence[Encoded], recorded: dict[str, Array], what: str
) -> None:
    """Greedy answers as users get them, all rows at once and each alone, and the logits behind every choice."""
    eos = run.get("eos_token_id")
    answers = []
    for row in recorded["generated_ids"].tolist():
        answers.append(row[: row.index(eos) + 1] if eos in row else row)  # padding follows
    length = max(run.get("max_new_tokens", 0), *(len(answer) for answer in answers))
    suppressed = never_chosen(case)
    if not suppressed:
        sampling = Sampling(max_new_tokens=length, stop_ids=() if eos is None else (eos,))
        together = generate(vlm, samples, None, sampling)
        alone = [generate(vlm, [sample], None, sampling)[0] for sample in samples]
        for found in (together, alone):
            assert [list(answer.ids) for answer in found] == answers, what
    for row, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        logits = steps(vlm, sample, answer)
        if "step_logits" in recorded:
            steps_recorded = recorded["step_logits"][row][: len(answer)]
            check_close(logits, steps_recorded, f"{what} steps of row {row}", **case.allowed("logits"))
        logits[:, suppressed] = -np.inf
        assert logits.argmax(-1).tolist() == answer, f"{what} row {row}"


def never_chosen(case: Case) -> list[int]:
    """Ids that `min_new_tokens` kept from being chosen: the end of an answer, as the notes or the config name it."""
    if not case.data.get("greedy", {}).get("min_new_tokens"):
        return []
    named = [int(number) for note in case.data.get("notes", ()) for number in re.findall(r"eos id (\d+)", note)]
    return named or [case.json("config.json")["text_config"]["eos_token_id"]]


def steps(vlm: VLM, sample: Encoded, answer: Sequence[int]) -> Array:
    """(len(answer), V) logits that each token of an answer was chosen by, one cached step at a time."""
    cache = KVCache(vlm.config.decoder, batch_size=1, capacity=8, dtype=torch.float32)
    logits = []
    with torch.inference_mode():
        hidden = vlm.hidden(pad([sample]), cache)[:, -1]
        for token in answer:
            logits.append(vlm.logits(hidden)[0])
            position = torch.tensor([[[cache.lengths[0]]]])
            hidden = vlm.hidden(Batch(torch.tensor([[token]]), position, documents=((0, 0, 1),)), cache)[:, -1]
    return torch.stack(logits).numpy()


RUNNERS: dict[tuple[str, str], Callable[[Case], None]] = {
    ("internvl", "size_table"): run_size_table,
    ("internvl", "image_pixels"): run_image_pixels,
    ("internvl", "vision_features"): run_vision_features,
    ("internvl", "model"): run_model,
}
