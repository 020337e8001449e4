"""What training minimises. Logits exist only where a token is taught, and only a chunk of them at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.nn.batch import Batch
from opsin.nn.vlm import VLM

CHUNK_ELEMENTS = 2**24
"""Logits that exist at once: 64 MiB in float32, whatever the vocabulary and the number of tokens."""


@dataclass(frozen=True, eq=False, slots=True)
class Loss:
    """What one pass adds to the loss of its step. Sums and counts, so that passes of different sizes weigh rightly."""

    total: Tensor
    """Scalar: the sum over taught tokens, in nats."""
    count: int
    """Taught tokens."""


Objective = Callable[[Any, Batch], Loss]
"""(module, batch) -> Loss. The module is a VLM unless the caller trains something else."""


def next_token(vlm: VLM, batch: Batch) -> Loss:
    """Cross-entropy of every taught token, given what stands before it in its conversation."""
    return next_token_from(vlm, batch, rows=None)


def next_token_from(vlm: VLM, batch: Batch, *, rows: Tensor | None) -> Loss:
    """`next_token` with connector rows that the caller has already: a frozen tower's need computing only once."""
    places, targets = batch.targets()
    hidden = vlm.hidden(batch, rows=rows).flatten(0, 1).index_select(0, places)
    head = vlm.decoder.head if vlm.decoder.head is not None else vlm.decoder.embed
    return Loss(linear_cross_entropy(hidden, head, targets), len(targets))


def linear_cross_entropy(hidden: Tensor, head: nn.Linear | nn.Embedding, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(head(hidden))[target], as a scalar; softmax in float32.

    hidden: (M, D)   head: D -> V without bias, or the embedding that stands for one   targets: (M,) ids.
    """
    assert getattr(head, "bias", None) is None
    return _LinearCrossEntropy.apply(hidden, head.weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is made right after its logits, which are then dropped: no (M, V) tensor ever lives.

    That is possible because the gradient of a sum with respect to each logit, softmax - onehot, needs nothing from
    later layers but one factor.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        want_hidden, want_weight, _ = ctx.needs_input_grad
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = None
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        with torch.autocast(device, enabled=False):
            matrix = weight.to(low)
            for start in range(0, len(targets), chunk):
                part, ids = hidden[start : start + chunk].to(low), targets[start : start + chunk, None]
                logits = F.linear(part, matrix).float()
                norm = logits.logsumexp(1, keepdim=True)
                total += (norm - logits.gather(1, ids)).sum()
                if not (want_hidden or want_weight):
                    continue
                grad = logits.sub_(norm).exp_()  # softmax, in the memory of the logits
                grad.scatter_add_(1, ids, grad.new_full(ids.shape, -1.0))
                grad = grad.to(low)
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk] = grad @ matrix
                if not want_weight:
                    continue
                if grad_weight is None:
                    grad_weight = (grad.T @ part).to(weight.dtype)
                elif low == weight.dtype:
                    grad_weight.addmm_(grad.T, part)  # without a second (V, D) tensor
                else:
                    grad_weight += grad.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (factor,) = grads
        if factor.device.type != "cpu" or factor != 1:  # on a GPU, asking would cost more than multiplying
            for grad in (grad_hidden, grad_weight):
                if grad is not None:
                    grad.mul_(factor)  # in place: it exists for this one use
        return grad_hidden, grad_weight, None
