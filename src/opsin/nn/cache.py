"""The key/value cache: owned by the caller, passed in, never kept inside a module."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from opsin.nn.mask import CAUSAL, FULL, Mask, dense, without_padding
from opsin.spec.decoder import DecoderConfig
from opsin.spec.seq2seq import Seq2SeqConfig


def decode_dtype(model_dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype of keys and values that decodes fastest for a model of `model_dtype`.

    On a CPU that is float32 for half-precision models: attention would convert all keys again at every step, which
    takes two to five times as long as reading twice the bytes, and is less exact.
    """
    is_half = model_dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and torch.device(device).type == "cpu" else model_dtype


@dataclass
class EncoderMemory:
    """What the decoder of an encoder-decoder looks across at. It is fixed once the encoder has read the prompt."""

    keys: list[Tensor]
    """Of every layer of the decoder, (B, S, H, E)."""
    values: list[Tensor]
    lengths: list[int]
    """Tokens of each row that the encoder has read."""

    def mask(self, device: torch.device) -> Mask:
        """Every token of the decoder sees all that the encoder has read of its row."""
        if min(self.lengths) == max(self.lengths):
            return FULL
        width = torch.arange(max(self.lengths), device=device)
        valid = width < torch.tensor(self.lengths, device=device)[:, None]
        return without_padding(torch.ones_like(valid[:, :1]), valid)

    def select(self, index: Tensor, rows: Sequence[int]) -> None:
        """Keep `rows`, in that order, and of their padding no more than the longest needs."""
        self.lengths = [self.lengths[row] for row in rows]
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old[:, : max(self.lengths)].index_select(0, index)

    def join(self, other: "EncoderMemory") -> None:
        """Add the rows of another memory behind these."""
        width = max(*self.lengths, *other.lengths)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, (old, more) in enumerate(zip(mine, theirs, strict=True)):
                mine[layer] = new = old.new_zeros((len(old) + len(more), width, *old.shape[2:]))
                new[: len(old), : old.shape[1]] = old[:, :width]
                new[len(old) :, : more.shape[1]] = more
        self.lengths = [*self.lengths, *other.lengths]


class KVCache:
    """Keys and values of every layer for a batch of sequences, each with its own length.

    Rows are ragged: a row's tokens stand at 0..length-1 whatever the other rows hold, so that no sequence is ever
    padded on the left and each answer equals the one computed alone.
    """

    def __init__(
        self,
        config: DecoderConfig | Seq2SeqConfig,
        *,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        """capacity: tokens per row that are allocated at once; `reserve` adds more.

        dtype: that of the keys and values as stored. `decode_dtype` says which is fastest to decode with.
        """
        # Heads before tokens: a step reads each head's keys as one stretch of memory (about twice as fast as the other
        # order from 600 tokens on). Zeros, because a ragged row is read past its end: a masked NaN is still a NaN.
        shape = (batch_size, config.num_kv_heads, capacity, config.head_width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lengths: list[int] = [0] * batch_size
        self.prompt_lengths: list[int] = [0] * batch_size
        """Tokens of each row's first call. A rotation that depends on the sequence's length is chosen by it and kept:
        keys are stored rotated, so that choosing again would mix two rotations."""
        self.memory: EncoderMemory | None = None
        """Of a model with an encoder, once it has read. Its tokens count in `lengths` but take no room here."""
        self._places: tuple[int, Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values as stored."""
        return self.keys[0].dtype

    @property
    def stored(self) -> list[int]:
        """Tokens per row whose keys and values are stored: all but those that an encoder has read."""
        if self.memory is None:
            return self.lengths
        return [length - read for length, read in zip(self.lengths, self.memory.lengths, strict=True)]

    @property
    def capacity(self) -> int:
        """Tokens per row that fit without a new allocation."""
        return self.keys[0].shape[2]

    @property
    def num_bytes(self) -> int:
        """Allocated size."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    @property
    def _uniform(self) -> bool:
        return min(self.stored) == max(self.stored)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens per row, keeping what is stored."""
        if capacity <= self.capacity:
            return
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                new[:, :, : old.shape[2]] = old
                tensors[layer] = new

    def rows(self, rows: slice) -> "KVCache":
        """Some neighbouring rows as a cache of their own in the same memory, to be filled apart from the others.

        Its lengths are its own: `advance` this one too. It must not grow, and has no encoder's memory.
        """
        assert self.memory is None, "what an encoder has read belongs to all rows together"
        part = copy(self)
        part.keys = [keys[rows] for keys in self.keys]
        part.values = [values[rows] for values in self.values]
        part.prompt_lengths = self.prompt_lengths[rows]
        part._set_lengths(self.lengths[rows])
        return part

    def mask(self, num_new: int) -> Mask:
        """What `num_new` tokens appended to every row may see: all that their row holds, and each other causally."""
        if self._uniform:
            if num_new == 1:
                return FULL
            if self.stored[0] == 0:
                return CAUSAL
        device = self.keys[0].device
        lengths = torch.tensor(self.stored, device=device)[:, None]
        order_q = lengths + torch.arange(num_new, device=device)
        order_k = torch.arange(max(self.stored) + num_new, device=device).expand(len(self.lengths), -1)
        # One sequence per row, so one segment: what lies past a row's own tokens is later in order and stays unseen.
        return dense(torch.zeros_like(order_q), order_q, torch.zeros_like(order_k), order_k)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, E) behind each row's tokens; return all keys and values (B, S, K, E) as views.

        `advance` moves the lengths once, after the last layer.
        """
        num_new = k.shape[1]
        end = max(self.stored) + num_new
        keys, values = self.keys[layer], self.values[layer]
        if self._uniform:
            keys[:, :, self.stored[0] : end] = k.transpose(1, 2)
            values[:, :, self.stored[0] : end] = v.transpose(1, 2)
        else:
            rows, columns = self._ragged_places(num_new)
            keys[rows, :, columns] = k.to(keys.dtype)
            values[rows, :, columns] = v.to(values.dtype)
        return keys[:, :, :end].transpose(1, 2), values[:, :, :end].transpose(1, 2)

    def _ragged_places(self, num_new: int) -> tuple[Tensor, Tensor]:
        """Indices (B, 1) and (B, num_new) of the next tokens of every row; all layers of one step share them."""
        if self._places is None or self._places[0] != num_new:
            device = self.keys[0].device
            rows = torch.arange(len(self.lengths), device=device)[:, None]
            starts = torch.tensor(self.stored, device=device)[:, None]
            self._places = (num_new, rows, starts + torch.arange(num_new, device=device))
        return self._places[1:]

    def advance(self, counts: Sequence[int]) -> None:
        """Count `counts[row]` of the appended tokens as stored; the rest was padding and is overwritten next time."""
        self._set_lengths([length + count for length, count in zip(self.lengths, counts, strict=True)])
        self.prompt_lengths = [
            prompt or length for prompt, length in zip(self.prompt_lengths, self.lengths, strict=True)
        ]

    def select(self, rows: Sequence[int]) -> Self:
        """Keep `rows`, in that order, in place. Naming a row twice forks it; leaving one out frees it."""
        index, used = torch.tensor(list(rows), device=self.keys[0].device), max(self.lengths)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = new = old.new_zeros((len(rows), *old.shape[1:]))
                new[:, :, :used] = old[:, :, :used].index_select(0, index)
        if self.memory is not None:
            self.memory.select(index, rows)
        self._set_lengths([self.lengths[row] for row in rows])
        self.prompt_lengths = [self.prompt_lengths[row] for row in rows]
        return self

    def join(self, other: "KVCache") -> Self:
        """Add the rows of another cache of the same model behind these, in place: prompts that come later."""
        rows, capacity, used = len(self.lengths), max(self.capacity, other.capacity), max(self.stored)
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, (old, more) in enumerate(zip(mine, theirs, strict=True)):
                mine[layer] = new = old.new_zeros((rows + len(more), old.shape[1], capacity, old.shape[3]))
                new[:rows, :, :used] = old[:, :, :used]
                new[rows:, :, : other.capacity] = more
        if self.memory is not None:
            assert other.memory is not None, "one model either has an encoder or has none"
            self.memory.join(other.memory)
        self._set_lengths([*self.lengths, *other.lengths])
        self.prompt_lengths = [*self.prompt_lengths, *other.prompt_lengths]
        return self

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of each row beyond `lengths[row]`.

        What an encoder has read can only be kept as a whole: its states depend on all of it. Where a row would lose
        some, every row forgets everything.
        """
        assert all(new <= old for new, old in zip(lengths, self.lengths, strict=True))
        if self.memory is not None and any(new < read for new, read in zip(lengths, self.memory.lengths, strict=True)):
            self.memory, lengths = None, [0] * len(lengths)
        self._set_lengths(list(lengths))
        # A row that begins anew chooses its rotation anew.
        self.prompt_lengths = [begun if kept else 0 for begun, kept in zip(self.prompt_lengths, lengths, strict=True)]

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self._places = None
