"""The key/value cache: owned by the caller, passed in, never kept inside a module."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from opsin.nn.mask import CAUSAL, FULL, Mask, dense
from opsin.spec.decoder import DecoderConfig


class KVCache:
    """Keys and values of every layer for a batch of sequences, each with its own length.

    Rows are ragged: a row's tokens stand at 0..length-1 whatever the other rows hold, so that no sequence is ever
    padded on the left and each answer equals the one computed alone.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """capacity: tokens per row that are allocated at once; `reserve` adds more."""
        shape = (batch_size, capacity, config.num_kv_heads, config.head_width)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lengths: list[int] = [0] * batch_size

    @property
    def capacity(self) -> int:
        """Tokens per row that fit without a new allocation."""
        return self.keys[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """Allocated size."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def _uniform(self) -> bool:
        return min(self.lengths) == max(self.lengths)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, keeping what is stored."""
        if capacity <= self.capacity:
            return
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_empty((old.shape[0], capacity, *old.shape[2:]))
                new[:, : old.shape[1]] = old
                tensors[layer] = new

    def mask(self, num_new: int) -> Mask:
        """What `num_new` tokens appended to every row may see: all that their row holds, and each other causally."""
        if self._uniform:
            if num_new == 1:
                return FULL
            if self.lengths[0] == 0:
                return CAUSAL
        device = self.keys[0].device
        lengths = torch.tensor(self.lengths, device=device)[:, None]
        order_q = lengths + torch.arange(num_new, device=device)
        order_k = torch.arange(max(self.lengths) + num_new, device=device).expand(len(self.lengths), -1)
        # One sequence per row, so one segment: what lies past a row's own tokens is later in order and stays unseen.
        return dense(torch.zeros_like(order_q), order_q, torch.zeros_like(order_k), order_k)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, E) behind each row's tokens; return all keys and values (B, S, K, E) as views.

        `advance` moves the lengths once, after the last layer.
        """
        num_new = k.shape[1]
        end = max(self.lengths) + num_new
        keys, values = self.keys[layer], self.values[layer]
        if self._uniform:
            keys[:, self.lengths[0] : end] = k
            values[:, self.lengths[0] : end] = v
        else:
            rows = torch.arange(len(self.lengths), device=k.device)[:, None]
            columns = torch.tensor(self.lengths, device=k.device)[:, None] + torch.arange(num_new, device=k.device)
            keys[rows, columns] = k
            values[rows, columns] = v
        return keys[:, :end], values[:, :end]

    def advance(self, counts: Sequence[int]) -> None:
        """Count `counts[row]` of the appended tokens as stored; the rest was padding and is overwritten next time."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def select(self, rows: Sequence[int]) -> Self:
        """Keep `rows`, in that order, in place. Naming a row twice forks it; leaving one out frees it."""
        index = torch.tensor(list(rows), device=self.keys[0].device)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]
        return self

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of each row beyond `lengths[row]`."""
        assert all(new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)
