"""Retrieval, both ways: given a picture, is one of its texts among the first K; given a text, one of its pictures?

Recall@K is the share of queries with a right candidate among the K best. Each picture may have several right texts
(five in COCO and Flickr30k), and one is enough.

Traps. Equal captions of different pictures are each right for all of those pictures: with "a dog" written for two, a
ranking cannot tell which one is asked for. Candidates that score the same count against a right one, so a model that
scores everything alike finds nothing. R@K falls as candidates are added: COCO's numbers are for 5,000 pictures with
25,000 texts (or 1,000 with 5,000), Flickr30k's for 1,000 with 5,000; the chance level beside each figure says how hard
the set is. BLIP-2's figures re-rank the best 128 by contrast with matching (`--rescore`).
"""

from collections.abc import Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray

CUTOFFS = (1, 5, 10)


def positives(captions: Sequence[Sequence[str]], texts: Sequence[str]) -> NDArray[np.bool_]:
    """(pictures, texts) whether a text is one of the picture's own; equal texts are the same text."""
    owners: dict[str, set[int]] = {}
    for index, own in enumerate(captions):
        for caption in own:
            owners.setdefault(caption, set()).add(index)
    right = np.zeros((len(captions), len(texts)), np.bool_)
    for column, text in enumerate(texts):
        right[sorted(owners.get(text, ())), column] = True
    return right


def ranks(similarity: NDArray[np.floating], right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each query (row) how many wrong candidates score as much as its best right one, or more.

    similarity, right: (queries, candidates) -> (queries,). A rank below K is a hit at K; a query without a right
    candidate ranks behind all.
    """
    best = np.where(right, similarity, -np.inf).max(axis=1, keepdims=True)
    worse = (~right & (similarity >= best)).sum(axis=1)
    return np.where(right.any(axis=1), worse, np.iinfo(np.int64).max)


def hits(rank: NDArray[np.int64]) -> NDArray[np.float64]:
    """(queries,) -> (queries, 3): whether each is a hit at 1, 5 and 10."""
    return (rank[:, None] < np.array(CUTOFFS)).astype(np.float64)


def chance(right: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Recall at 1, 5 and 10 of a random order: the mean over queries of 1 - C(wrong, K) / C(all, K)."""
    total = right.shape[1]
    shares = {
        count: [1 - comb(total - count, min(k, total)) / comb(total, min(k, total)) for k in CUTOFFS]
        for count in map(int, np.unique(right.sum(axis=1)))
    }
    return np.array([shares[int(count)] for count in right.sum(axis=1)]).mean(axis=0)
