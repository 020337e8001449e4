"""Positions of tokens for the language model: along one axis, or along time, row and column (M-RoPE)."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from opsin.spec.decoder import DecoderConfig
from opsin.spec.plan import Grid
from opsin.spec.seq2seq import Seq2SeqConfig


def token_positions(
    num_tokens: int, rasters: Iterable[tuple[int, Grid]], decoder: DecoderConfig | Seq2SeqConfig
) -> NDArray[np.int64]:
    """(num_tokens, A) positions of a conversation.

    rasters: (token, row grid) for every picture or video whose slots, from that token on, are one raster (t, h, w).

    With one axis tokens are counted. With three, text is counted on all of them alike, and a raster that begins at
    position s has (s + its time, s + its row, s + its column). Text after it goes on one past the largest of these
    (`RopeConfig.picture_span` "time_and_space", the published rule): fewer positions are used than there are tokens.
    """
    positions = np.arange(num_tokens, dtype=np.int64)[:, None].repeat(decoder.num_axes, axis=1)
    if decoder.num_axes == 1:
        return positions
    assert decoder.rope is not None
    for start, grid in rasters:
        places = np.indices(grid).reshape(3, -1).T
        stop, first = start + len(places), positions[start, 0]
        span = max(grid if decoder.rope.picture_span == "time_and_space" else grid[1:])
        positions[start:stop] = first + places
        positions[stop:] += first + span - positions[stop : stop + 1]
    return positions
