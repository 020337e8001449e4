"""Batch: the only thing a model sees. Every index in it was computed by the encoder; nothing is read back from ids."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from opsin.nn.mask import CAUSAL, Mask, Stretch, packed


@dataclass(frozen=True, eq=False, slots=True)
class RowResample:
    """Rows made from a raster of other rows (see `spec.plan.Resample`), with indices into this batch's rows."""

    rows: Tensor
    """(h * w,) connector rows of the raster, row-major."""
    grid_in: tuple[int, int]
    grid_out: tuple[int, int]
    mode: Literal["bilinear", "max"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Token sequences with their pictures, padded on the right or packed into one row."""

    ids: Tensor
    """(B, T) int64. What stands at picture slots and in padding is never looked at."""
    positions: Tensor
    """(B, T, A) int64."""
    documents: tuple[Stretch, ...]
    """(row, start, stop) of every conversation, in order."""
    encoder_lengths: tuple[int, ...] = ()
    """For every conversation, how many of its first tokens go to an encoder; empty where none do."""
    supervised: Tensor | None = None
    """(B, T) bool: tokens that training teaches. None where nothing is taught."""
    patches: Tensor | None = None
    """(P, C * p * p) float32: the patches of all tiles of all pictures, in order of their slots."""
    grids: Tensor | None = None
    """(N, 3) int64 on the CPU: (t, h, w) of each tile."""
    slots: Tensor | None = None
    """(S,) int64: places of picture slots in the flattened (B * T) batch."""
    slot_rows: Tensor | None = None
    """(S,) int64: the row that fills each: connector rows first, then resampled ones; -1 is the newline."""
    resamples: tuple[RowResample, ...] = ()
    names: tuple[str, ...] = field(default=())
    """Names of the conversations, for messages."""

    @property
    def lengths(self) -> list[int]:
        """Tokens per row that are not padding."""
        lengths = [0] * self.ids.shape[0]
        for row, _, stop in self.documents:
            lengths[row] = max(lengths[row], stop)
        return lengths

    @property
    def mask(self) -> Mask:
        """Causal where each row is one conversation; else every conversation sees only itself."""
        if len(self.documents) == self.ids.shape[0]:
            return CAUSAL
        return packed(self.documents)

    def token_lengths(self) -> Tensor:
        """(B, T) int64: the length of the conversation that each token belongs to; 1 in padding."""
        lengths = torch.ones(self.ids.shape, dtype=torch.int64)
        for row, start, stop in self.documents:
            lengths[row, start:stop] = stop - start
        return lengths.to(self.ids.device)

    def targets(self) -> tuple[Tensor, Tensor]:
        """Where logits are needed for the loss, and what they should be.

        Returns flat places (M,) of hidden states in the (B * T) batch and the ids (M,) of the tokens after them, for
        every supervised token. The first token of a conversation has nothing before it and cannot be a target.
        """
        assert self.supervised is not None, "a batch without supervision has no targets"
        taught = self.supervised.clone()
        for row, start, _ in self.documents:
            taught[row, start] = False
        places = taught.flatten().nonzero().squeeze(1)
        return places - 1, self.ids.flatten()[places]

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device. Grids stay: they steer Python, not kernels."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if f.name != "grids" and isinstance(value := getattr(self, f.name), Tensor)
        }
        resamples = tuple(replace(r, rows=r.rows.to(device)) for r in self.resamples)
        return replace(self, resamples=resamples, **moved)
