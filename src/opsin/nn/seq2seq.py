"""The encoder-decoder language model, T5-shaped (arXiv:1910.10683): FlanT5 for BLIP-2.

    one sequence     [pictures and prompt </s>] [start, answer ...]
                       |                          |
                     encoder: all see all       decoder: causal, and looks across at what the encoder made of its part

Who is where is said by `Batch.encoder_lengths`. Sequences that stand padded or packed in the batch are pulled apart
into rows of their own, and the states put back where the tokens were: so a state means the same as in a causal model,
the one at token t is what token t + 1 is predicted from.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.nn.attention import attend
from opsin.nn.batch import Batch
from opsin.nn.blocks import RMSNorm
from opsin.nn.cache import EncoderMemory, KVCache
from opsin.nn.mask import Mask, dense, without_padding
from opsin.spec.seq2seq import Seq2SeqConfig


class GatedGelu(nn.Module):
    """down(gelu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.gate = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.up = nn.Linear(config.dim, config.mlp_dim, bias=False)
        self.down = nn.Linear(config.mlp_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D)."""
        return self.down(F.gelu(self.gate(x), approximate=self.approximate) * self.up(x))


class T5Attention(nn.Module):
    """Attention without biases and without the scale 1 / sqrt(E), which T5's initialisation takes over."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.head_dim)
        inner = config.num_heads * config.head_dim
        self.q = nn.Linear(config.dim, inner, bias=False)
        self.k = nn.Linear(config.dim, inner, bias=False)
        self.v = nn.Linear(config.dim, inner, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """memory: (B, S, D) -> keys and values (B, S, H, E)."""
        return self.k(memory).unflatten(-1, self.heads), self.v(memory).unflatten(-1, self.heads)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, *, mask: Mask, bias: Tensor | None = None) -> Tensor:
        """x: (B, T, D), k, v: (B, S, H, E) -> (B, T, D)."""
        q = self.q(x).unflatten(-1, self.heads).to(k.dtype)
        bias = None if bias is None else bias.to(k.dtype)
        return self.out(attend(q, k, v, mask=mask, bias=bias, scale=1.0).flatten(2).to(x.dtype))


class RelativePositions(nn.Module):
    """One number per head for each distance between a query and a key, added to their score in every layer."""

    def __init__(self, config: Seq2SeqConfig, *, both_ways: bool) -> None:
        super().__init__()
        self.both_ways = both_ways
        self.max_distance = config.max_distance
        self.table = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Places queries (B, T), keys (B, S) -> bias (B, H, T, S)."""
        return self.table(self.buckets(keys[:, None] - queries[:, :, None])).permute(0, 3, 1, 2)

    def buckets(self, distance: Tensor) -> Tensor:
        """distance: key minus query, integers of any shape -> rows of the table.

        Half of the rows stand for single distances, the other half for stretches that grow with the logarithm up to
        `max_distance`. An encoder has one such half for each direction; a decoder looks back only.
        """
        count = self.table.num_embeddings
        first = torch.zeros_like(distance)
        if self.both_ways:
            count //= 2
            first = torch.where(distance > 0, count, 0)
            distance = distance.abs()
        else:
            distance = (-distance).clamp_min(0)
        single = count // 2
        growth = (distance.clamp_min(1).float() / single).log() / math.log(self.max_distance / single)
        grouped = single + (growth * (count - single)).long()
        return first + torch.where(distance < single, distance, grouped.clamp_max(count - 1))


class EncoderLayer(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = T5Attention(config)
        self.norm2 = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = GatedGelu(config)

    def forward(self, x: Tensor, *, mask: Mask, bias: Tensor) -> Tensor:
        """x: (B, S, D) -> same shape."""
        y = self.norm1(x)
        x = x + self.attn(y, *self.attn.keys_values(y), mask=mask, bias=bias)
        return x + self.mlp(self.norm2(x))


class DecoderLayer(nn.Module):
    """Self-attention, a look across at the encoder's states, feed-forward; each x + step(norm(x))."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = T5Attention(config)
        self.norm_cross = RMSNorm(config.dim, eps=config.norm_eps)
        self.cross = T5Attention(config)
        self.norm2 = RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = GatedGelu(config)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask,
        bias: Tensor,
        memory: tuple[Tensor, Tensor],
        memory_mask: Mask,
        cache: KVCache | None,
        layer: int,
    ) -> Tensor:
        """x: (B, T, D) -> same shape. memory: keys and values of the encoder's states for this layer."""
        y = self.norm1(x)
        k, v = self.attn.keys_values(y)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        x = x + self.attn(y, k, v, mask=mask, bias=bias)
        x = x + self.cross(self.norm_cross(x), *memory, mask=memory_mask)
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """The stack that reads the prompt."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.relative = RelativePositions(config, both_ways=True)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x: (B, S, D) embeddings; valid: (B, S), false in padding. Returns states (B, S, D)."""
        places = torch.arange(x.shape[1], device=x.device)[None]
        bias, mask = self.relative(places, places), without_padding(valid, valid)
        for layer in self.layers:
            x = layer(x, mask=mask, bias=bias)
        return self.norm(x)


class Seq2Seq(nn.Module):
    """Both stacks behind the methods of `nn.decoder.Decoder`, except that `forward` takes the batch."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = Encoder(config)
        self.relative = RelativePositions(config, both_ways=False)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, x: Tensor, *, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """x: (B, T, D) embeddings -> states (B, T, D): the encoder's where it reads, the decoder's behind.

        With a cache, the first call runs the encoder and keeps what the decoder sees of it; later calls hold tokens of
        the decoder alone.
        """
        flat = x.flatten(0, 1)
        out = torch.zeros_like(flat)
        lengths = batch.encoder_lengths or (0,) * len(batch.documents)
        pieces = list(zip(batch.documents, lengths, strict=True))
        if any(lengths):
            read = _pieces([(row, start, start + length) for (row, start, _), length in pieces], x)
            states = self.encoder(flat[read.places], read.valid)
            out = out.index_copy(0, read.places[read.valid], states[read.valid])
            memory = self._remember(states, lengths, cache)
        else:
            assert cache is not None, "without an encoder's part there must be a cache that holds it"
            assert cache.memory is not None, "the first call with a cache holds the encoder's part"
            memory = cache.memory
        written = _pieces([(row, start + length, stop) for (row, start, stop), length in pieces], x)
        if written.places.shape[1]:
            states = self._decode(flat[written.places], memory, cache)
            out = out.index_copy(0, written.places[written.valid], states[written.valid])
        if cache is not None:
            cache.advance([stop - start - length for (_, start, stop), length in pieces])
        return out.view_as(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., D) -> (..., V)."""
        return self.head(hidden)

    def _remember(self, states: Tensor, lengths: tuple[int, ...], cache: KVCache | None) -> EncoderMemory:
        """Keys and values of the encoder's states for every layer of the decoder."""
        pairs = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            pairs.append(layer.cross.keys_values(states))
        if cache is not None:
            assert not any(cache.lengths), "an encoder reads its whole part at once, into an empty cache"
            pairs = [(k.to(cache.dtype), v.to(cache.dtype)) for k, v in pairs]
        memory = EncoderMemory([k for k, _ in pairs], [v for _, v in pairs], list(lengths))
        if cache is not None:
            cache.memory = memory
            cache.advance(lengths)
        return memory

    def _decode(self, x: Tensor, memory: EncoderMemory, cache: KVCache | None) -> Tensor:
        """x: (documents, T, D) embeddings of what the decoder has or is to continue -> states of the same shape."""
        num_new = x.shape[1]
        begin = [0] * len(x) if cache is None else cache.stored
        if cache is not None and max(begin) + num_new > cache.capacity:
            cache.reserve(max(max(begin) + num_new, 2 * cache.capacity))
        queries = torch.tensor(begin, device=x.device)[:, None] + torch.arange(num_new, device=x.device)
        keys = torch.arange(max(begin) + num_new, device=x.device).expand(len(x), -1)
        if min(begin) == max(begin):  # one matrix for all rows
            bias = self.relative(queries[:1], keys[:1])
        else:
            bias = self.relative(queries, keys)
        mask = dense(torch.zeros_like(queries), queries, torch.zeros_like(keys), keys)
        memory_mask = memory.mask(x.device)
        for index, layer in enumerate(self.layers):
            x = layer(
                x,
                mask=mask,
                bias=bias,
                memory=(memory.keys[index], memory.values[index]),
                memory_mask=memory_mask,
                cache=cache,
                layer=index,
            )
        return self.norm(x)


class _Pieces(NamedTuple):
    """Stretches of a batch, each in a row of its own."""

    places: Tensor
    """(pieces, longest) in the flattened (B * T) batch; 0 in padding."""
    valid: Tensor
    """(pieces, longest) bool."""


def _pieces(stretches: list[tuple[int, int, int]], x: Tensor) -> _Pieces:
    rows, starts, stops = torch.tensor(stretches).T
    counts = stops - starts
    steps = torch.arange(int(counts.max()))
    valid = steps < counts[:, None]
    places = torch.where(valid, (rows * x.shape[1] + starts)[:, None] + steps, 0)
    return _Pieces(places.to(x.device), valid.to(x.device))
