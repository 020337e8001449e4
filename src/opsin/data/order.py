"""The order of samples: pure functions of lengths and seeds, whatever the machine and the number of threads."""

import hashlib
import heapq
from collections.abc import Sequence

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose, unrelated to those of other purposes. 63 bits."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A random stream of its own for one purpose."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def permutation(count: int, seed: int, *purpose: str | int) -> list[int]:
    """A random order of 0..count-1."""
    return _shuffled(count, generator(seed, *purpose))


def length_grouped(
    lengths: Sequence[int], *, batch_size: int, world_size: int, random: torch.Generator | None
) -> list[int]:
    """A random order in which samples of similar length come together.

    A random permutation is cut into megabatches of world_size * batch_size; inside each, samples are dealt out from
    long to short so that the `world_size` batches take about equally long
    (llava/train/llava_trainer.py, get_length_grouped_indices). random: None uses torch's own stream.
    """
    order = _shuffled(len(lengths), random)
    dealt = []
    for megabatch in _cut(order, batch_size * world_size):
        longest_first = sorted(megabatch, key=lambda index: -lengths[index])  # stable: equal lengths stay shuffled
        dealt += _deal(longest_first, [lengths[index] for index in longest_first], world_size)
    return dealt


def modality_grouped(
    lengths: Sequence[int],
    *,
    batch_size: int,
    world_size: int,
    random: torch.Generator | None,
    outer_random: torch.Generator | None = None,
) -> list[int]:
    """Length-grouped order in which every megabatch has pictures throughout or not at all.

    lengths: negative for samples without a picture. The last megabatch of each kind, which may be short, is kept out of
    the shuffle; both come last, together, by number (get_modality_length_grouped_indices).
    outer_random: the stream that orders megabatches, where it is not `random`.
    """
    sizes = {"batch_size": batch_size, "world_size": world_size}
    outer = random if outer_random is None else outer_random
    kinds = [[i for i, n in enumerate(lengths) if n > 0], [i for i, n in enumerate(lengths) if n < 0]]
    assert len(kinds[0]) + len(kinds[1]) == len(lengths), "a length of 0 has no sign"
    if not all(kinds):
        return length_grouped(lengths, random=outer, **sizes)
    shuffled, last = [], []
    for members in kinds:
        order = length_grouped([abs(lengths[i]) for i in members], random=random, **sizes)
        megabatches = _cut([members[place] for place in order], batch_size * world_size)
        shuffled += megabatches[:-1]
        last += megabatches[-1]
    chosen = [shuffled[place] for place in _shuffled(len(shuffled), outer)]
    return [index for megabatch in chosen for index in megabatch] + sorted(last)


def _shuffled(count: int, random: torch.Generator | None) -> list[int]:
    return torch.randperm(count, generator=random).tolist()


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _deal(items: list[int], lengths: list[int], hands: int) -> list[int]:
    """Deal items, longest first, into equal hands: each to the hand with the least so far. Returns hand by hand."""
    if len(items) % hands:
        return [item for hand in range(hands) for item in items[hand::hands]]
    room = len(items) // hands
    dealt: list[list[int]] = [[] for _ in range(hands)]
    open_hands = [(0, hand) for hand in range(hands)]
    for item, length in zip(items, lengths, strict=True):
        total, hand = heapq.heappop(open_hands)
        dealt[hand].append(item)
        if len(dealt[hand]) < room:
            heapq.heappush(open_hands, (total + length, hand))
    return [item for hand in dealt for item in hand]
