"""BLIP-2's stage 1 (arXiv:2301.12597 section 3.2): three losses on pairs of a picture and a text, of equal weight.

    contrastive   which text of the batch belongs to a picture, and which picture to a text
    matching      whether a picture and a text belong together, asked of the pairs and of hard negatives
    captions      each token of the text, from the picture's queries and what stands before it

Pictures and texts of all processes are compared. What is gathered carries no gradient, but for the pictures that the
matching loss shows: every process then has a part in the gradient of all others' features, and the mean over processes,
which data parallelism takes, is the gradient of the mean of their losses.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from opsin.data.augment import picture_name
from opsin.data.source import Source
from opsin.encode import Encoded
from opsin.errors import ConfigError, DataError, TrainError
from opsin.match import PairEncoder
from opsin.nn.batch import Batch
from opsin.nn.qformer import Features
from opsin.nn.retriever import Retriever
from opsin.nn.vlm import VLM
from opsin.spec.recipe import BatchSize
from opsin.text.messages import Conversation
from opsin.train.objectives import Loss, Objective

SMOOTHING = 0.1
"""Share of each target that is spread over all choices, in the contrastive and the caption loss."""


class Pairs(NamedTuple):
    """Pictures and texts of one process, pair by pair."""

    patches: Tensor
    """(P, C * p * p)."""
    grids: Tensor
    """(B, 3)."""
    ids: Tensor
    """(B, T), begun and ended by BERT's control tokens."""
    valid: Tensor
    """(B, T) bool, false in padding."""
    image_ids: Tensor | None = None
    """(B,) which picture each is: pairs of one picture are no negatives of each other. None: all are different."""
    text_ids: Tensor | None = None
    """(B,) the same of texts, where equal ones fit each other's pictures. None: all are different."""


class Negatives(NamedTuple):
    """Indices among the pairs of all processes."""

    images: Tensor
    """(B,) a wrong picture for each text."""
    texts: Tensor
    """(B,) a wrong text for each picture."""


@dataclass(frozen=True, eq=False)
class Stage1:
    """The three losses, means over the pairs (matching: over three times as many) or tokens of one process."""

    contrastive: Tensor
    matching: Tensor
    captions: Tensor
    negatives: Negatives
    steps: dict[str, Tensor]
    """What was computed on the way, by name, for comparisons."""

    @property
    def total(self) -> Tensor:
        """Their sum, of equal weights."""
        return self.contrastive + self.matching + self.captions


def stage1_losses(
    model: Retriever,
    pairs: Pairs,
    *,
    caption_id: int,
    negatives: Negatives | None = None,
    generator: torch.Generator | None = None,
) -> Stage1:
    """All three losses of one batch; in a process group, of this process' share of it.

    caption_id: the control token that begins a caption. negatives: instead of drawing them. generator: to draw with.
    Raises TrainError where a pair has no negative, as when there is one pair.
    """
    steps: dict[str, Tensor] = {}
    features = model.features(pairs.patches, pairs.grids)
    seen = model.see(features)
    text = model.read(pairs.ids, pairs.valid)
    steps |= {"image_embeds": features.values, "query_hidden": seen.states, "text_hidden": text}

    images, texts = model.picture_vectors(seen.states), model.text_vectors(text)
    sim_i2t, sim_t2i = similarities(model, images, texts)
    same = same_pair(pairs)
    soft = pairs.image_ids is not None or pairs.text_ids is not None
    contrastive = contrastive_loss(sim_i2t, sim_t2i, same, soft=soft)

    weights_i2t, weights_t2i = (_negative_weights(sims.detach(), same) for sims in (sim_i2t, sim_t2i))
    steps |= {"neg_weights_i2t": weights_i2t, "neg_weights_t2i": weights_t2i}
    if negatives is None:
        negatives = _draw_negatives(weights_i2t, weights_t2i, generator)
    matching = _matching_loss(model, features, pairs, negatives, steps)

    ids = pairs.ids.clone()
    ids[:, 0] = caption_id
    states, _ = model.read_caption(seen, ids, pairs.valid)
    logits = model.caption_logits(states)
    targets = pairs.ids.masked_fill(~pairs.valid, -100)[:, 1:]
    captions = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), label_smoothing=SMOOTHING)
    steps |= {"lm_hidden": states, "lm_logits": logits}
    return Stage1(contrastive, matching, captions, negatives, steps)


def similarities(model: Retriever, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures (B, Q, E) with all texts, texts (B, E) with all pictures: the largest over the queries / temperature.

    Both (B, N). The side that is compared carries a gradient, the gathered side carries none.
    """
    assert model.temperature is not None, "config.heads 'matching' has no temperature to learn"
    all_images, all_texts = gather(images), gather(texts)
    sim_i2t = torch.einsum("bqe,ne->bnq", images, all_texts).amax(-1) / model.temperature
    sim_t2i = torch.einsum("be,nqe->bnq", texts, all_images).amax(-1) / model.temperature
    return sim_i2t, sim_t2i


def same_pair(pairs: Pairs) -> Tensor:
    """(B, N) bool: which of all pairs have the picture of each pair here, or its text; itself alone where neither is
    told apart."""
    same = _same(pairs, pairs.image_ids)
    return same if pairs.text_ids is None else same | _same(pairs, pairs.text_ids)


def _same(pairs: Pairs, mine: Tensor | None) -> Tensor:
    if mine is None:
        before = sum(_counts(pairs.ids)[: _rank()])
        mine = torch.arange(len(pairs.ids), device=pairs.ids.device) + before
    return mine[:, None] == gather(mine)[None]


def contrastive_loss(sim_i2t: Tensor, sim_t2i: Tensor, same: Tensor, *, soft: bool) -> Tensor:
    """Mean of both directions. soft: a picture's pairs share its target evenly; the smoothing is the same."""
    count = same.shape[1]
    if soft:
        target = same / same.sum(dim=1, keepdim=True)
        target = (1 - SMOOTHING) * target + SMOOTHING / count
        losses = [-(sims.log_softmax(dim=1) * target).sum(dim=1).mean() for sims in (sim_i2t, sim_t2i)]
    else:
        own = same.long().argmax(dim=1)
        losses = [F.cross_entropy(sims, own, label_smoothing=SMOOTHING) for sims in (sim_i2t, sim_t2i)]
    return (losses[0] + losses[1]) / 2


def _negative_weights(sims: Tensor, same: Tensor) -> Tensor:
    """How likely each of all pairs is drawn as a negative: the more similar the likelier; never of the same picture."""
    if bool(same.all(dim=1).any()):
        raise TrainError(
            f"a pair has no negative among the {same.shape[1]} of its batch, which are all of its own picture or text. "
            "Take larger batches, or shuffle the data"
        )
    return sims.masked_fill(same, -10_000.0).softmax(dim=1)


def _draw_negatives(weights_i2t: Tensor, weights_t2i: Tensor, generator: torch.Generator | None) -> Negatives:
    """Draw from weights (B, N). Each pair of the step has its own random numbers, the first process', and meets the
    others in the step's order: what is drawn does not depend on how many processes share the step."""
    counts = _counts(weights_t2i)
    # Process r of n has every n-th pair of the step, from the r-th (`World.share`).
    places = [rank + len(counts) * number for rank, count in enumerate(counts) for number in range(count)]
    device, start = weights_t2i.device, sum(counts[: _rank()])
    numbers = torch.rand(2, len(places), generator=generator, dtype=torch.float64).to(device)
    if len(counts) > 1:
        dist.broadcast(numbers, 0)
    numbers = numbers[:, torch.tensor(places[start : start + counts[_rank()]], device=device)]
    order = torch.tensor(places, device=device).argsort()
    chosen = []
    for number, weights in zip(numbers, (weights_t2i, weights_i2t), strict=True):
        ends = weights[:, order].double().cumsum(dim=1)
        # The first end beyond a number: never that of a weight of 0, which adds nothing.
        chosen.append(order[torch.searchsorted(ends, number[:, None] * ends[:, -1:], right=True)[:, 0]])
    return Negatives(*chosen)


def _matching_loss(
    model: Retriever, features: Features, pairs: Pairs, negatives: Negatives, steps: dict[str, Tensor]
) -> Tensor:
    """Right pairs, then each text with a wrong picture, then each picture with a wrong text."""
    if features.mask.form != "full":
        raise TrainError("pictures of one batch must have one size: their features are exchanged between processes")
    values = features.values
    wrong_images = gather_with_gradient(values)[negatives.images]
    ids, valid = gather_texts(pairs.ids, pairs.valid)
    wrong_ids, wrong_valid = ids[negatives.texts], valid[negatives.texts]
    width = ids.shape[1]
    own_ids, own_valid = _widened(pairs.ids, width), _widened(pairs.valid, width)
    states = model.match_states(
        Features(torch.cat([values, wrong_images, values])),
        torch.cat([own_ids, own_ids, wrong_ids]),
        torch.cat([own_valid, own_valid, wrong_valid]),
    )
    per_query = model.match_logits(states)
    logits = per_query.mean(dim=1)
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels[: len(pairs.ids)] = 1
    steps |= {"itm_hidden": states, "itm_logits_per_query": per_query, "itm_logits": logits}
    return F.cross_entropy(logits, labels)


# ---- processes -------------------------------------------------------------------------------------------------------


def gather(x: Tensor) -> Tensor:
    """x (B, ...) of all processes, in order of their ranks (N, ...), without gradient. B may differ between them."""
    x = x.detach()
    if _num_processes() == 1:
        return x
    counts = _counts(x)
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_with_gradient(x: Tensor) -> Tensor:
    """The same with gradient: that of each process' x is the sum of what all processes want of it."""
    return x if _num_processes() == 1 else _Gather.apply(x)


def gather_texts(ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Texts of all processes, padded to the longest of all."""
    if _num_processes() > 1:
        width = torch.tensor(ids.shape[1], device=ids.device)
        dist.all_reduce(width, dist.ReduceOp.MAX)
        ids, valid = _widened(ids, int(width)), _widened(valid, int(width))
    return gather(ids), gather(valid.to(torch.uint8)).bool()


def _widened(x: Tensor, width: int) -> Tensor:
    """(B, T) padded with zeros to (B, width)."""
    return F.pad(x, (0, width - x.shape[1]))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        start = sum(_counts(x)[: _rank()])
        ctx.own = slice(start, start + len(x))
        return gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        return grad[ctx.own]


def _counts(x: Tensor) -> list[int]:
    """How long x is in each process."""
    if _num_processes() == 1:
        return [len(x)]
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(_num_processes())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    return [int(count) for count in counts]


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# ---- training --------------------------------------------------------------------------------------------------------


def stage1(
    caption_id: int,
    *,
    image_ids: Callable[[Batch], Tensor] | None = None,
    text_ids: Callable[[Batch], Tensor] | None = None,
) -> Objective:
    """The objective for `train_stage` on a `Retriever`, whose samples come from `CaptionPairs`.

    caption_id: id of `[DEC]`. image_ids: (B,) which picture each sample shows, where pictures repeat in a batch; use
    `pictures_by_name` where samples are named by their pictures. text_ids: the same of texts, where equal ones are no
    negatives of each other's pictures; use `texts_by_words`.
    """

    def objective(model: Retriever, batch: Batch) -> Loss:
        assert batch.patches is not None
        assert batch.grids is not None
        valid = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        valid = valid < torch.tensor(batch.lengths, device=batch.ids.device)[:, None]
        pictures, texts = (each and each(batch).to(batch.ids.device) for each in (image_ids, text_ids))
        pairs = Pairs(batch.patches, batch.grids, batch.ids, valid, pictures, texts)
        losses = stage1_losses(model, pairs, caption_id=caption_id)
        # The authors' caption loss is a mean over each process' own tokens. Here it is one over those of all, so that
        # how texts fall to processes changes nothing.
        own = valid[:, 1:].sum()
        all_pairs, all_tokens = gather(torch.tensor([len(valid)], device=own.device)).sum(), gather(own[None]).sum()
        compared = (losses.contrastive + losses.matching) * len(valid)
        return Loss(compared + losses.captions * own * all_pairs / all_tokens, len(valid))

    objective.compares_samples = True  # type: ignore[attr-defined] # no process may stand in with a sample of another
    return objective


def pictures_by_name(batch: Batch) -> Tensor:
    """Samples of one name show one picture. Names must be the same on all processes."""
    return _digests([name.encode() for name in batch.names])


def texts_by_words(batch: Batch) -> Tensor:
    """Samples whose texts have the same ids have one text."""
    texts = [row[:length] for row, length in zip(batch.ids.tolist(), batch.lengths, strict=True)]
    return _digests([repr(text).encode() for text in texts])


def _digests(contents: list[bytes]) -> Tensor:
    digests = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])


def caption_pair(conversation: Conversation, encoder: PairEncoder) -> Encoded:
    """Picture and last answer of a conversation as stage 1 reads them. Raises DataError where they are not a pair.

    The sample is named by its picture, so that `pictures_by_name` can tell which are the same.
    """
    where, last = conversation.id or "a sample", conversation.messages[-1]
    if len(conversation.images) != 1 or last.role != "assistant" or not last.text:
        raise DataError(f"{where}: a pair is one picture and an answer, its caption")
    image = conversation.images[0]
    return encoder.pair(image, last.text, name=picture_name(image) or where)


class CaptionPairs:
    """Another source's pictures and captions, as pairs."""

    def __init__(self, source: Source, encoder: PairEncoder) -> None:
        self.source = source
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.source)

    def sample(self, index: int, epoch: int) -> Encoded:
        """One pair. Raises DataError for a conversation that is not one picture and its caption."""
        conversation = self.source.sample(index, epoch)
        if not isinstance(conversation, Conversation):
            raise DataError("pairs are made of conversations; this source encodes for itself")
        return caption_pair(replace(conversation, id=conversation.id or f"sample {index}"), self.encoder)


def check_pairs(num_samples: int, batch: BatchSize) -> None:
    """Raise ConfigError where some pass of each epoch would hold one pair, which has nothing to be compared with."""
    per_pass = batch.micro_samples or batch.samples
    for count in (min(num_samples, batch.samples), num_samples % batch.samples):
        if count and (count % per_pass == 1 or per_pass == 1):
            raise ConfigError(
                f"{num_samples} pairs in steps of {batch.samples} and passes of {per_pass} leave a pair alone, which "
                "has no negative. Take another batch.samples, or limit the data"
            )


@torch.no_grad()
def begin_stage2(vlm: VLM, model: Retriever) -> None:
    """Give a model's connector what stage 1 has learned; its text side and heads are left behind."""
    own = vlm.connector.state_dict()
    learned = model.state_dict()
    shared = [name for name in own if name.startswith(("norm_features.", "queries", "qformer."))]
    if not shared or any(name not in learned or learned[name].shape != own[name].shape for name in shared):
        raise TrainError("the model of stage 1 and the connector differ: stage 2 goes on with the same Q-Former")
    for name in shared:
        own[name].copy_(learned[name])
