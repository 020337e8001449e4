"""What training minimises. Logits exist only where a token is taught, and only a chunk of them at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opsin.nn.batch import Batch
from opsin.nn.vlm import VLM

CHUNK_ELEMENTS = 2**24
"""Logits that exist at once, in float32: 64 MiB, whatever the vocabulary and the number of tokens. In half precision
twice as many."""
BLOCK_ELEMENTS = 2**24
"""Numbers of the head that exist at once in another precision than its own."""


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
    hidden = vlm.hidden(batch, rows=rows, wanted=places)
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
    later layers but one factor. Under autocast the head is converted block by block, and its gradient added up the
    same way: beside that gradient itself nothing lives that grows with the vocabulary or with the number of tokens.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        want_hidden, want_weight, _ = ctx.needs_input_grad
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        size, dim = weight.shape
        rows = size if low == weight.dtype else max(1, BLOCK_ELEMENTS // dim)
        blocks = [slice(start, min(start + rows, size)) for start in range(0, size, rows)]
        chunk = max(1, CHUNK_ELEMENTS * 4 // low.itemsize // size)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk):
                place = slice(start, start + chunk)
                part, ids = hidden[place].to(low), targets[place, None]
                logits = part.new_empty(len(part), size)
                for block in blocks:
                    torch.mm(part, weight[block].to(low).T, out=logits[:, block])
                wanted = _log_likelihoods_(logits, ids, blocks, want_gradient=want_hidden or want_weight)
                total -= wanted.sum()
                if not (want_hidden or want_weight):
                    continue
                for block in blocks:
                    grad = logits[:, block]
                    if grad_hidden is not None:
                        grad_hidden[place] += grad @ weight[block].to(low)
                    if grad_weight is not None and low == weight.dtype:
                        torch.addmm(grad_weight, grad.T, part, out=grad_weight)  # without a second (V, D) tensor
                    elif grad_weight is not None:
                        grad_weight[block] += grad.T @ part
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


def _log_likelihoods_(logits: Tensor, ids: Tensor, blocks: list[slice], *, want_gradient: bool) -> Tensor:
    """(M, V) logits -> (M, 1) log softmax at the ids (M, 1), in float32; logits become softmax - onehot, if wanted.

    Block by block of the vocabulary, so that no more than one of them is ever held in float32.
    """
    if len(blocks) == 1:  # torch's kernel makes half as many passes over memory
        logs = torch.log_softmax(logits.float(), 1)
        wanted = logs.gather(1, ids)
        if want_gradient:
            logits.copy_(logs.exp_())
    else:
        norms = torch.cat([logits[:, block].float().logsumexp(1, keepdim=True) for block in blocks], dim=1)
        norm = norms.logsumexp(1, keepdim=True)
        wanted = logits.gather(1, ids).float() - norm
        if want_gradient:
            for block in blocks:
                logits[:, block] = logits[:, block].float().sub_(norm).exp_()
    if want_gradient:
        logits.scatter_(1, ids, (wanted.exp() - 1).to(logits.dtype))
    return wanted
