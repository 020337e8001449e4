"""From logits to the next token: repetition penalty, temperature, top-k, top-p, in this order, then one draw.

    logits (V,)  --penalty-->  --/ T-->  --keep the k largest-->  --keep the mass p-->  softmax  -->  one id

The order and each step's arithmetic are those of transformers' `generate`, so that the same settings mean the same.
Everything happens in float32, whatever the model's dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsin.errors import GenerationError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
"""Characters of one stop string. Both limits keep the search for stops cheap whatever a request asks for."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn and when they end. Raises GenerationError for settings that mean nothing."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token every time (greedy)."""
    top_k: int | None = None
    """Only the k likeliest tokens stay; further ones as likely as the k-th stay too."""
    top_p: float | None = None
    """Only the fewest likeliest tokens that hold this share of the probability stay (nucleus, arXiv:1904.09751)."""
    repetition_penalty: float = 1.0
    """Logits of ids that stand in the prompt's text or in the answer are divided by it where positive and multiplied
    where negative (CTRL, arXiv:1909.05858), once however often the id stands there. Picture slots are not counted."""
    seed: int | None = None
    """Same seed, same answers, whatever other prompts are in the batch. None draws a new one every time."""
    num_sequences: int = 1
    """Answers per prompt."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an answer and are cut from it, besides those of the model's chat format."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end an answer, besides the stop tokens of the model's chat format."""

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        _check(self.num_sequences >= 1, f"num_sequences is {self.num_sequences}; it must be at least 1")
        _check(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature is {self.temperature}; it must be 0 (always the likeliest token) or larger",
        )
        _check(self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}; it must be at least 1")
        _check(self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1")
        _check(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 changes nothing)",
        )
        if self.temperature == 0:
            why = "at temperature 0, which always takes the likeliest token. Set a temperature"
            _check(self.top_k is None, f"top_k has no effect {why}")
            _check(self.top_p in (None, 1), f"top_p has no effect {why}")
            _check(self.num_sequences == 1, f"num_sequences {self.num_sequences} would give the same answer {why}")
        _check(self.seed is None or 0 <= self.seed < 2**63, f"seed is {self.seed}; it must be from 0 to {2**63 - 1}")
        _check(
            len(self.stop_strings) <= MAX_STOP_STRINGS,
            f"{len(self.stop_strings)} stop strings are given; at most {MAX_STOP_STRINGS} are searched for",
        )
        for text in self.stop_strings:
            _check(
                1 <= len(text) <= MAX_STOP_LENGTH,
                f"a stop string has {len(text)} characters; it must have 1 to {MAX_STOP_LENGTH}",
            )


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise GenerationError(message)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits: (B, V); seen: (B, V) bool, ids to make less likely. Returns new logits (B, V)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def probabilities(
    logits: Tensor, *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """softmax(logits / temperature), then cut to the k likeliest and to the mass p, renormalised after each.

    logits: (B, V) -> (B, V) float32. temperature: above 0; towards 0 everything goes to the likeliest token.
    """
    x = logits.float()
    # The largest logit becomes 0 before the division, so that no temperature, however small, overflows.
    x = (x - x.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < x.shape[-1]:
        smallest_kept = x.topk(top_k, dim=-1).values[:, -1:]
        x = x.masked_fill(x < smallest_kept, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = x.sort(dim=-1, descending=True)
        shares = ordered.softmax(dim=-1)
        # A token stays while the likelier ones together hold less than p: the likeliest always does.
        keep = shares.cumsum(dim=-1) - shares < top_p
        x = x.masked_fill(~keep.scatter(-1, order, keep), -torch.inf)
    return x.softmax(dim=-1)


def draw(shares: Tensor, uniform: Tensor) -> Tensor:
    """One id per row, by inverting the cumulative distribution. shares: (B, V); uniform: (B,) float64 in [0, 1).

    Returns (B,) int64. In float64 a share of 0 is never drawn, and rounding cannot push a draw past the end.
    """
    cumulative = shares.double().cumsum(dim=-1)
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]


def sample(logits: Tensor, sampling: Sampling, *, seen: Tensor | None = None, uniform: Tensor | None = None) -> Tensor:
    """The next id of every sequence. logits: (B, V) -> (B,) int64.

    seen: (B, V) bool, needed with a repetition penalty. uniform: (B,) float64 in [0, 1), needed above temperature 0:
    all of the randomness. Greedy ties go to the smallest id.
    """
    if sampling.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs to know which ids were seen"
        logits = penalise(logits.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    assert uniform is not None, "above temperature 0 a random number per sequence is needed"
    shares = probabilities(logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return draw(shares, uniform)


class Randomness:
    """One stream of random numbers per sequence, each made of the seed and the sequence's number within its prompt.

    Batch-mates therefore have no part in it: a prompt gets the same answers alone and in company.
    """

    def __init__(self, seed: int | None, sequences: Sequence[int]) -> None:
        """sequences: for every row, its number among the answers to its prompt."""
        self._streams = [np.random.default_rng(None if seed is None else (seed, number)) for number in sequences]

    def uniform(self, rows: Sequence[int]) -> Tensor:
        """The next number in [0, 1) of each of `rows`: (len(rows),) float64."""
        return torch.tensor([self._streams[row].random() for row in rows], dtype=torch.float64)
