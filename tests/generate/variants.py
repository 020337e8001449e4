"""Variants of a tiny model with the same weights."""

import copy

from opsin.nn.vlm import VLM


def sharpened_copy(toy, *, max_positions=None, stop_tokens=None) -> VLM:
    """The toy's model again, with some of its description changed."""
    config = toy.config
    if max_positions is not None:
        config = config.replace(decoder=config.decoder.replace(max_positions=max_positions))
    if stop_tokens is not None:
        config = config.replace(chat=config.chat.replace(stop_tokens=stop_tokens))
    vlm = copy.deepcopy(toy.vlm)
    vlm.config = config
    return vlm
