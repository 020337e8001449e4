"""Captions by the model of stage 1 itself: the Q-Former's text side, from left to right over the queries' keys."""

import torch
from torch import Tensor

from opsin.generate.beam import Beams, Hypothesis, search
from opsin.nn.qformer import Features
from opsin.nn.retriever import Retriever, Seen

LAVIS_CAPTIONS = Beams(num_beams=3, min_new_tokens=9, max_new_tokens=29)
"""LAVIS Blip2Qformer.generate: lengths 10 to 30, of which `[DEC]` is one."""


@torch.inference_mode()
def caption(
    model: Retriever, features: Features, *, caption_id: int, stop_id: int, beams: Beams = LAVIS_CAPTIONS
) -> list[list[Hypothesis]]:
    """The best captions of each picture, best first, as ids without the control token that begins them.

    features: of `Retriever.features`. caption_id, stop_id: ids of `[DEC]` and `[SEP]`.
    """
    seen = model.see(features)
    count = len(seen.states)
    begin = torch.full((count, 1), caption_id, device=seen.states.device)
    states, past = model.read_caption(seen, begin, torch.ones_like(begin, dtype=torch.bool))
    room = model.config.max_positions - 1
    limits = [min(beams.max_new_tokens, room)] * count

    def step(rows: list[int], ids: list[int]) -> Tensor:
        nonlocal past
        index = torch.tensor(rows, device=begin.device)
        past = [(k[index], v[index]) for k, v in past]
        tokens = torch.tensor(ids, device=begin.device)[:, None]
        # What the queries saw is in `past`; the mask of one new token needs no padding.
        states, past = model.read_caption(Seen(tokens, []), tokens, tokens.bool(), past=past)
        return model.caption_logits(states[:, 0])

    stops = frozenset((stop_id, *beams.stop_ids))
    return search(model.caption_logits(states[:, 0]), step, beams, stop_ids=stops, limits=limits)
