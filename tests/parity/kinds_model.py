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
from opsin.nn.batch import Batch
from opsin.nn.cache import KVCache
from opsin.nn.vlm import VLM
from opsin.verify.cases import read_llava
from opsin.verify.recorded import shown_tiles
from parity.case import Case, check_close

Array = NDArray[np.generic]


def run_model(case: Case) -> None:
    """A folder with config and weights as published, ids, pixel values, and what the authors' code made of them."""
    vlm = weights.load(str(case.folder)).vlm
    inputs, outputs = case.tensors("inputs.safetensors"), case.tensors("outputs.safetensors")
    samples = read_llava(vlm.config, case, inputs)
    with torch.inference_mode():
        check_features(vlm, case, samples, inputs, outputs)
        check_expansion(samples, outputs)
        check_logits_and_loss(vlm, case, samples, inputs, outputs)
        check_greedy(vlm, case, samples, outputs)


def close(case: Case, what: str, ours: torch.Tensor, recorded: Array) -> None:
    """Within the recorded tolerance."""
    check_close(ours.numpy(), np.asarray(recorded), f"{case.name}: {what}", **case.allowed(what))


def check_features(
    vlm: VLM, case: Case, samples: list[Encoded], inputs: dict[str, Array], outputs: dict[str, Array]
) -> None:
    """Tower features and connector rows of the pictures that are shown (the original also ran dummies of text rows)."""
    batch = pad(samples)
    assert batch.patches is not None
    assert batch.grids is not None
    if "tower_features" in outputs or "projected_features" in outputs:
        shown = shown_tiles(samples, inputs)
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
