"""Who may attend to whom: one rule, and the cheapest form that says it.

The rule: token i sees token j iff `segment[i] == segment[j]` and `order[j] <= order[i]`. Causal, packed and cached
decoding are rows of integers under it; where all orders are equal, everything inside a segment sees everything. Most
rules never need a matrix: a whole row in order is SDPA's own causal form, and packed documents are independent
stretches of it, so the dense form is left to what remains.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Stretch = tuple[int, int, int]
"""(row, start, stop): the tokens start..stop-1 of one row of a batch."""


@dataclass(frozen=True, eq=False, slots=True)
class Mask:
    """A mask in its cheapest form. Build it with one of the functions below."""

    form: Literal["full", "causal", "stretches", "dense"]
    stretches: tuple[Stretch, ...] = ()
    """For `stretches`: each sees only itself. Tokens outside every stretch get zeros."""
    within: Literal["causal", "full"] = "causal"
    """For `stretches`: what a token sees of its own stretch."""
    allowed: Tensor | None = None
    """For `dense`: (B, 1, T, S) bool, true where query t may see key s."""

    def pieces(self, num_rows: int, length: int) -> list[tuple[int, bool]]:
        """For `stretches`: how rows of that length, one after the other, fall into them and the gaps between them.

        Returns (tokens, whether it is a stretch) of each piece.
        """
        found, place = [], 0
        for start, stop in sorted((row * length + start, row * length + stop) for row, start, stop in self.stretches):
            found += [(start - place, False)] * (start > place) + [(stop - start, True)]
            place = stop
        end = num_rows * length
        return found + [(end - place, False)] * (end > place)


FULL = Mask("full")
"""Every query sees every key: inside one tile of the vision tower, or one new token after a cache of equal lengths."""
CAUSAL = Mask("causal")
"""Query t sees keys 0..t of its own row. Padding on the right is harmless: no real token comes after it."""


def packed(documents: tuple[Stretch, ...]) -> Mask:
    """Documents side by side in a row, each causal, none of which sees another."""
    return Mask("stretches", stretches=documents)


def separate(pictures: tuple[Stretch, ...]) -> Mask:
    """Pictures side by side in a row, each of which sees all of itself and nothing else."""
    return Mask("stretches", stretches=pictures, within="full")


def dense(segment_q: Tensor, order_q: Tensor, segment_k: Tensor, order_k: Tensor) -> Mask:
    """The rule written out. segment_q, order_q: (B, T); segment_k, order_k: (B, S); integers."""
    same = segment_q[:, :, None] == segment_k[:, None, :]
    earlier = order_k[:, None, :] <= order_q[:, :, None]
    return Mask("dense", allowed=(same & earlier)[:, None])


def without_padding(valid_q: Tensor, valid_k: Tensor) -> Mask:
    """Whatever is not padding sees all that is not padding. valid_q: (B, T), valid_k: (B, S); bool."""
    orders = (torch.zeros_like(valid, dtype=torch.int64) for valid in (valid_q, valid_k))
    order_q, order_k = orders
    # Padding is a segment of its own, which sees itself: a query that sees nothing would become NaN.
    return dense(~valid_q, order_q, ~valid_k, order_k)
