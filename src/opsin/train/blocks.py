"""The blocks of a model: what is split, computed again and compiled one by one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from opsin.nn.blocks import LayerScale
from opsin.nn.decoder import DecoderLayer
from opsin.nn.qformer import QFormerLayer
from opsin.nn.seq2seq import EncoderLayer
from opsin.nn.vision import VisionLayer

BLOCKS = (VisionLayer, QFormerLayer, DecoderLayer, EncoderLayer)
"""Modules whose parameters are used inside their own `forward` alone. T5's decoder layers are not among them: keys and
values of the encoder's states are made for all of them at once, before they run."""


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """All blocks, in the order in which they run."""
    return [each for each in module.modules() if isinstance(each, BLOCKS)]


def elementwise(block: nn.Module) -> list[nn.Module]:
    """Norms and scales of a block, which autocast runs in float32 where matrix products are in half precision."""
    return [each for each in block.modules() if isinstance(each, nn.LayerNorm | nn.RMSNorm | LayerScale)]


@contextmanager
def prepared_blocks(module: nn.Module, *, recompute: bool, compiled: bool) -> Iterator[None]:
    """Inside, blocks run as the settings `activations` and `compile` say. The names of tensors stay as they are.

    recompute: what a block computes is forgotten, and computed again when its gradient is due, to the same bits.
    """
    chosen = blocks_of(module) if recompute or compiled else []
    try:
        for block in chosen:
            forward = block.forward
            if recompute:
                forward = partial(checkpoint, forward, use_reentrant=False)
            if compiled:
                forward = torch.compile(forward)
            block.forward = forward
        yield
    finally:
        for block in chosen:
            block.__dict__.pop("forward", None)
