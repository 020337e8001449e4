"""Conversations side by side: padded on the right, or packed into one row. Nothing is derived again, only shifted."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opsin.encode import Encoded
from opsin.nn.batch import Batch, RowResample
from opsin.spec.model import VLMConfig
from opsin.spec.plan import NEWLINE

BLANK_SIDE = 56
"""Pixels of a blank picture, before it is resized for the model: where sizes are free, two blocks of two patches."""


def pad(samples: Sequence[Encoded]) -> Batch:
    """One conversation per row, (B, longest)."""
    longest = max(sample.num_tokens for sample in samples)
    starts = [row * longest for row in range(len(samples))]
    return _batch(samples, starts, rows=len(samples), width=longest)


def pack(samples: Sequence[Encoded]) -> Batch:
    """All conversations in one row without padding, (1, sum of lengths); none sees another."""
    lengths = [sample.num_tokens for sample in samples]
    starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    return _batch(samples, starts, rows=1, width=sum(lengths))


def with_blank_picture(batch: Batch, config: VLMConfig) -> Batch:
    """The same tokens beside one blank tile that fills no slot: tower and connector run, and nothing depends on it.

    Processes that train together must all run the same modules, also where only some have pictures.
    """
    plan = config.plan((BLANK_SIDE, BLANK_SIDE))
    grids = torch.tensor([plan.tiles[0].grid])
    none = torch.empty(0, dtype=torch.int64)
    patches = torch.zeros(int(grids.prod()), config.vision.patch_dim)
    return replace(batch, patches=patches, grids=grids, slots=none, slot_rows=none)


def _batch(samples: Sequence[Encoded], starts: Sequence[int], *, rows: int, width: int) -> Batch:
    """starts: where each conversation begins in the flattened (rows * width) batch."""
    num_axes = samples[0].positions.shape[1]
    ids = np.zeros(rows * width, np.int64)
    supervised = np.zeros(rows * width, np.bool_)
    positions = np.zeros((rows * width, num_axes), np.int64)
    for sample, start in zip(samples, starts, strict=True):
        place = slice(start, start + sample.num_tokens)
        ids[place], supervised[place], positions[place] = sample.ids, sample.supervised, sample.positions
    documents = tuple(
        (start // width, start % width, start % width + sample.num_tokens)
        for sample, start in zip(samples, starts, strict=True)
    )
    lengths = [sample.encoder_length for sample in samples]
    patches = grids = slots = slot_rows = None
    resamples: tuple[RowResample, ...] = ()
    images = [image for sample in samples for image in sample.images]
    if images:
        patches = torch.from_numpy(_join([image.patches for image in images]))
        grids = torch.from_numpy(np.concatenate([image.grids for image in images]))
        slots = torch.from_numpy(np.concatenate([s.slots + start for s, start in zip(samples, starts, strict=True)]))
        slot_rows, resamples = _shift_rows(samples)
    return Batch(
        ids=torch.from_numpy(ids).view(rows, width),
        positions=torch.from_numpy(positions).view(rows, width, num_axes),
        documents=documents,
        encoder_lengths=tuple(lengths) if any(lengths) else (),
        supervised=torch.from_numpy(supervised).view(rows, width),
        patches=patches,
        grids=grids,
        slots=slots,
        slot_rows=slot_rows,
        resamples=resamples,
        names=tuple(sample.name for sample in samples),
    )


def _join(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Concatenate, without a copy where there is only one."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _shift_rows(samples: Sequence[Encoded]) -> tuple[Tensor, tuple[RowResample, ...]]:
    """Picture-local row numbers to numbers in the batch's row table: all connector rows, then all resampled rows."""
    images = [image for sample in samples for image in sample.images]
    total = sum(image.plan.num_rows for image in images)
    shifted: list[NDArray[np.int64]] = []
    resamples: list[RowResample] = []
    base, resampled_base = 0, total
    rows = np.concatenate([sample.slot_rows for sample in samples])
    parts = np.split(rows, np.cumsum([image.plan.num_slots for image in images])[:-1])
    for image, local in zip(images, parts, strict=True):
        plan = image.plan
        number = np.where(local < plan.num_rows, local + base, local - plan.num_rows + resampled_base)
        shifted.append(np.where(local == NEWLINE, NEWLINE, number))
        resample = plan.layout.resample
        if resample is not None:
            raster = torch.from_numpy(resample.rows.astype(np.int64) + base)
            resamples.append(RowResample(raster, resample.grid_in, resample.grid_out, resample.mode))
            resampled_base += resample.grid_out[0] * resample.grid_out[1]
        base += plan.num_rows
    return torch.from_numpy(np.concatenate(shifted)), tuple(resamples)
