"""Whole models against recorded outputs: features, rows, expansion, logits, loss and greedy ids."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from opsin import weights
from opsin.collate import pad
from opsin.encode import Encoded
from opsin.media.prepare import PreparedImage
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.vlm import VLM
from opsin.spec.model import VLMConfig
from opsin.spec.plan import Size
from parity.case import Case

Array = NDArray[np.generic]


def run_model(case: Case) -> None:
    """A folder with config and weights as published, ids, pixel values, and what the authors' code made of them."""
    vlm = weights.load(str(case.folder)).vlm
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    samples = (
        read_original(vlm.config, case, inputs) if "images" in " ".join(inputs) else read_hf(vlm.config, case, inputs)
    )
    with torch.inference_mode():
        check_features(vlm, case, samples, inputs, outputs)
        check_expansion(samples, outputs)
        check_logits_and_loss(vlm, case, samples, inputs, outputs)
        check_greedy(vlm, case, samples, outputs)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_original(config: VLMConfig, case: Case, inputs: dict[str, Array]) -> list[Encoded]:
    """Right-padded ids with one mark per picture. A row without a mark still consumes one entry of the picture list."""
    mark = case.data["image_token_index"]
    if "images" in inputs:
        pixels = list(inputs["images"])
    else:
        pixels = [inputs[f"images.{i}"] for i in range(sum(name.startswith("images.") for name in inputs))]
    sizes = inputs.get("image_sizes_wh")
    samples, taken = [], 0
    for row, (ids, valid) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].astype(bool), strict=True)):
        ids, labels = ids[valid], inputs["labels"][row][valid]
        count = int((ids == mark).sum())
        images = [
            prepared(config, pixels[i], tuple(sizes[i].tolist()) if sizes is not None else None)
            for i in range(taken, taken + count)
        ]
        taken += max(count, 1)
        entries = np.ones(len(ids), np.int64)
        entries[ids == mark] = [image.plan.num_slots for image in images]
        slots = np.flatnonzero(np.repeat(ids == mark, entries))
        taught = np.repeat(labels != -100, entries)
        samples.append(encoded(np.repeat(np.where(ids == mark, 0, ids), entries), slots, taught, images, row))
    return samples


def read_hf(config: VLMConfig, case: Case, inputs: dict[str, Array]) -> list[Encoded]:
    """Left-padded ids in which every picture slot already holds the image token; the last three tokens are taught."""
    samples, taken = [], 0
    specs = case.data["rows"]
    for row, (ids, valid) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].astype(bool), strict=True)):
        ids = ids[valid]
        images = []
        for index in range(taken, taken + specs[row]["images"]):
            sizes = inputs.get("image_sizes")
            height_width = tuple(sizes[index].tolist()) if sizes is not None else None
            images.append(prepared(config, inputs["pixel_values"][index], height_width and height_width[::-1]))
        taken += specs[row]["images"]
        slots = np.flatnonzero(ids == config.image_token_id)
        assert len(slots) == sum(image.plan.num_slots for image in images), "recorded slots and planned slots"
        taught = np.arange(len(ids)) >= len(ids) - 3
        samples.append(encoded(ids, slots, taught, images, row))
    return samples


def prepared(config: VLMConfig, pixels: Array, size: Size | None) -> PreparedImage:
    """Recorded pixel values (3, H, W) or (N, 3, H, W, padded to the largest N) as patches of the planned tiles."""
    side, patch = config.vision.image_size, config.vision.patch_size
    plan = config.plan(size or (side, side))
    tiles = (pixels if pixels.ndim == 4 else pixels[None])[: plan.num_tiles].astype(np.float32)
    grid = side // patch
    patches = tiles[:, :, : grid * patch, : grid * patch].reshape(-1, 3, grid, patch, grid, patch)
    return PreparedImage(
        patches=np.ascontiguousarray(patches.transpose(0, 2, 4, 1, 3, 5)).reshape(-1, 3 * patch * patch),
        grids=np.array([tile.grid for tile in plan.tiles], np.int64),
        plan=plan,
        name="recorded",
    )


def encoded(ids: Array, slots: Array, taught: Array, images: list[PreparedImage], row: int) -> Encoded:
    order = [image.plan.layout.order for image in images]
    return Encoded(
        ids=ids.astype(np.int64),
        supervised=taught,
        positions=np.arange(len(ids), dtype=np.int64)[:, None],
        slots=slots,
        slot_rows=np.concatenate(order).astype(np.int64) if order else np.zeros(0, np.int64),
        images=tuple(images),
        token_spans=np.zeros(len(ids), np.int64),
        spans=(),
        name=f"row {row}",
    )


# ---- comparing -------------------------------------------------------------------------------------------------------


def close(case: Case, what: str, ours: torch.Tensor, recorded: Array) -> None:
    """Within the recorded absolute tolerance, and the recorded relative one where there is one."""
    tolerances = case.data["tolerances"]
    torch.testing.assert_close(
        ours,
        torch.from_numpy(np.asarray(recorded)),
        atol=tolerances[f"{what}_atol"],
        rtol=tolerances.get(f"{what}_rtol", 0.0),
        msg=lambda text: f"{case.name}: {what}: {text}",
    )


def check_features(
    vlm: VLM, case: Case, samples: list[Encoded], inputs: dict[str, Array], outputs: dict[str, Array]
) -> None:
    """Tower features and connector rows of the pictures that are shown (the original also ran dummies of text rows)."""
    batch = pad(samples)
    assert batch.patches is not None
    assert batch.grids is not None
    if "tower_features" in outputs or "projected_features" in outputs:
        shown = shown_tiles(case, samples, inputs)
        for key, ours in (
            ("tower_features", vlm.vision(batch.patches, batch.grids)),
            ("projected_features", vlm.rows(batch.patches, batch.grids)),
        ):
            if key in outputs:
                close(case, "features", ours, outputs[key][shown].reshape(-1, ours.shape[-1]))
    if "image_features" in outputs:
        # What fills the slots, picture after picture, newlines and unpadding included.
        assert batch.slots is not None
        filled = vlm.embed(batch).flatten(0, 1)[batch.slots]
        close(case, "features", filled, outputs["image_features"])
        lengths = [image.plan.num_slots for sample in samples for image in sample.images]
        assert lengths == outputs["image_feature_lengths"].tolist()


def shown_tiles(case: Case, samples: list[Encoded], inputs: dict[str, Array]) -> list[int]:
    """Indices into the recorded tiles of those that belong to a picture mark."""
    single = "images" in inputs
    counts = [1] * len(inputs["images"]) if single else [
        len(inputs[f"images.{i}"]) for i in range(sum(name.startswith("images.") for name in inputs))
    ]  # fmt: skip
    starts = np.concatenate([[0], np.cumsum(counts)])
    shown: list[int] = []
    taken = 0
    for sample in samples:
        for index in range(taken, taken + len(sample.images)):
            shown += range(starts[index], starts[index + 1])
        taken += max(len(sample.images), 1)
    return shown


def check_expansion(samples: list[Encoded], outputs: dict[str, Array]) -> None:
    """The original's expanded mask, lengths and labels, exactly."""
    if "expanded_lengths" not in outputs:
        return
    assert [sample.num_tokens for sample in samples] == outputs["expanded_lengths"].tolist()
    for sample, valid, labels in zip(
        samples, outputs["expanded_attention_mask"].astype(bool), outputs["expanded_labels"], strict=True
    ):
        assert valid.sum() == sample.num_tokens
        np.testing.assert_array_equal(np.where(sample.supervised, sample.ids, -100), labels[valid])


def check_logits_and_loss(
    vlm: VLM, case: Case, samples: list[Encoded], inputs: dict[str, Array], outputs: dict[str, Array]
) -> None:
    """Every recorded logit of a real token, from one ragged batch; the loss over supervised tokens."""
    valid = outputs.get("expanded_attention_mask", inputs["attention_mask"]).astype(bool)
    batch = pad(samples)
    hidden = vlm.hidden(batch)
    for row, sample in enumerate(samples):
        logits = vlm.logits(hidden[row, : sample.num_tokens])
        close(case, "logits", logits, outputs["logits"][row][valid[row]])
    if "expanded_inputs_embeds" in outputs:
        embedded = vlm.embed(batch)
        for row, sample in enumerate(samples):
            recorded = outputs["expanded_inputs_embeds"][row][valid[row]]
            close(case, "features", embedded[row, : sample.num_tokens], recorded)
    if "loss" in outputs:
        places, targets = batch.targets()
        loss = F.cross_entropy(vlm.logits(hidden.flatten(0, 1)[places]), targets)
        close(case, "loss", loss, outputs["loss"])


def check_greedy(vlm: VLM, case: Case, samples: list[Encoded], outputs: dict[str, Array]) -> None:
    """Greedy ids of every row alone, and of all rows as one ragged batch."""
    recorded = []
    for row in range(len(samples)):
        if f"greedy_ids.{row}" in outputs:
            recorded.append(outputs[f"greedy_ids.{row}"][1:].tolist())  # generate on embeddings puts a BOS in front
        elif f"generated_ids_single.{row}" in outputs:
            recorded.append(outputs[f"generated_ids_single.{row}"].tolist())
    if not recorded:
        return
    alone = [greedy(vlm, [sample], len(ids))[0] for sample, ids in zip(samples, recorded, strict=True)]
    together = greedy(vlm, samples, max(len(ids) for ids in recorded))
    assert alone == recorded
    assert [ids[: len(wanted)] for ids, wanted in zip(together, recorded, strict=True)] == recorded


def greedy(vlm: VLM, samples: list[Encoded], steps: int) -> list[list[int]]:
    """The largest logit, `steps` times, with a cache."""
    config = vlm.config.decoder
    cache = KVCache(config, batch_size=len(samples), capacity=64, dtype=torch.float32)
    batch = pad(samples)
    hidden = vlm.hidden(batch, cache)
    last = hidden[torch.arange(len(samples)), torch.tensor(batch.lengths) - 1]
    ids: list[list[int]] = [[] for _ in samples]
    for _ in range(steps):
        chosen = vlm.logits(last).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            ids[row].append(token)
        step = Batch(
            ids=chosen[:, None],
            positions=torch.tensor(cache.lengths)[:, None, None],
            documents=tuple((row, 0, 1) for row in range(len(samples))),
        )
        last = vlm.hidden(step, cache)[:, 0]
    return ids


RUNNERS: dict[str, Callable[[Case], None]] = {"model": run_model}

pytest.register_assert_rewrite("parity.case")
