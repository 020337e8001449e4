"""The Q-Former (BLIP-2, arXiv:2301.12597 figure 2): one BERT-like stack for two kinds of tokens.

    layer i          queries (B, Q, D)                text (B, T, D)
                        |                                |
                     self-attention, one for both: [queries ; text], who sees whom is the mask's choice
                        |                                |
                     cross-attention to the features     |            (layers 0, n, 2n, ...)
                        |                                |
                     feed-forward of queries          feed-forward of text

Every step is `norm(x + step(x))`. Without text the stack is BLIP-2's connector.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from opsin.nn.attention import attend
from opsin.nn.blocks import MLP
from opsin.nn.mask import FULL, Mask, dense, without_padding
from opsin.spec.qformer import QFormerConfig

KeysValues = tuple[Tensor, Tensor]
"""(B, S, H, E) keys and values of one layer."""


class Features(NamedTuple):
    """What queries look at: one picture per row."""

    values: Tensor
    """(B, F, D) features, normed."""
    mask: Mask = FULL
    """Which of them a row has, where pictures have different numbers."""


class QFormerAttention(nn.Module):
    """One attention step: x looks at a memory, which may be itself."""

    def __init__(self, dim: int, memory_dim: int, *, num_heads: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(memory_dim, dim)
        self.v = nn.Linear(memory_dim, dim)
        self.kv: nn.Module | None = None
        """One layer in place of the two, where `packed.pack` has joined them."""
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """memory: (B, S, D) -> keys and values (B, S, H, E)."""
        heads = (self.num_heads, -1)
        k, v = (self.k(memory), self.v(memory)) if self.kv is None else self.kv(memory).chunk(2, dim=-1)
        return k.unflatten(-1, heads), v.unflatten(-1, heads)

    def forward(self, x: Tensor, memory: KeysValues, *, mask: Mask) -> Tensor:
        """x: (B, T, D) -> same shape."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        share = self.dropout.p if self.training else 0.0
        read = attend(q, *memory, mask=mask, dropout=share)
        return self.norm(x + self.dropout(self.out(read.flatten(2))))


class QFormerMLP(nn.Module):
    """One feed-forward step."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.mlp = MLP(config.dim, config.mlp_dim, "gelu")
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D) -> same shape."""
        return self.norm(x + self.dropout(self.mlp(x)))


class QFormerLayer(nn.Module):
    """Shared self-attention, the queries' cross-attention, and a feed-forward for each kind of token."""

    def __init__(self, config: QFormerConfig, *, feature_dim: int, crosses: bool, with_text: bool) -> None:
        super().__init__()

        def attention(memory_dim: int) -> QFormerAttention:
            return QFormerAttention(
                config.dim,
                memory_dim,
                num_heads=config.num_heads,
                norm_eps=config.norm_eps,
                dropout=config.dropout,
            )

        self.attn = attention(config.dim)
        self.cross = attention(feature_dim) if crosses else None
        self.query = QFormerMLP(config)
        self.text = QFormerMLP(config) if with_text else None

    def forward(
        self, x: Tensor, *, num_queries: int, features: Features | None, mask: Mask, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """x: (B, Q + T, D), queries first. past: keys and values that stand before x. Returns x and all of them."""
        k, v = self.attn.keys_values(x)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        x = self.attn(x, (k, v), mask=mask)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        parts = []
        if num_queries:
            if self.cross is not None:
                assert features is not None, "queries have something to look at"
                queries = self.cross(queries, self.cross.keys_values(features.values), mask=features.mask)
            parts.append(self.query(queries))
        if text.shape[1]:
            assert self.text is not None, "this Q-Former was built without its text side"
            parts.append(self.text(text))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], (k, v)


class QFormer(nn.Module):
    """The stack, and the norm that its inputs share."""

    def __init__(self, config: QFormerConfig, *, feature_dim: int, with_text: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(config, feature_dim=feature_dim, crosses=index % config.cross_every == 0, with_text=with_text)
            for index in range(config.num_layers)
        )

    def forward(
        self,
        x: Tensor,
        *,
        num_queries: int,
        features: Features | None = None,
        mask: Mask = FULL,
        past: Sequence[KeysValues] | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """x: (B, Q + T, D) queries, then embedded text; either may be missing.

        features: needed where there are queries. mask: of x against what stands in `past` and x. past: keys and values
        of an earlier call, which x stands behind. Returns states (B, Q + T, D) and all keys and values so far.
        """
        x = self.dropout(self.norm(x))
        kept = []
        for index, layer in enumerate(self.layers):
            x, keys_values = layer(
                x, num_queries=num_queries, features=features, mask=mask, past=past[index] if past else None
            )
            kept.append(keys_values)
        return x, kept


class QFormerRows(nn.Module):
    """The connector: each tile's features become `num_queries` rows.

    The stack may stay in float32 while the rest is in half precision, as transformers keeps it.
    """

    def __init__(self, config: QFormerConfig, *, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm_features = nn.LayerNorm(in_dim, eps=config.feature_norm_eps)
        self.queries = nn.Parameter(torch.empty(config.num_queries, config.dim))
        self.qformer = QFormer(config, feature_dim=in_dim, with_text=False)
        self.proj = nn.Linear(config.dim, out_dim)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """features: (F, in_dim) tile after tile, grids: (N, 3) -> rows (N * num_queries, out_dim)."""
        seen = tile_features(self.norm_features(features).to(self.queries.dtype), grids)
        queries = self.queries.expand(len(seen.values), -1, -1)
        states, _ = self.qformer(queries, num_queries=len(self.queries), features=seen)
        return self.proj(states.to(self.proj.weight.dtype)).flatten(0, 1)


def tile_features(features: Tensor, grids: Tensor) -> Features:
    """Packed features (F, D) as one row per tile, (N, longest, D); tiles of different grids get a mask.

    The tower may have put a class token in front of each tile, but only where all tiles have one grid.
    """
    if bool((grids == grids[0]).all()):
        return Features(features.unflatten(0, (len(grids), -1)))
    counts = grids.prod(dim=1)
    values = nn.utils.rnn.pad_sequence(features.split(counts.tolist()), batch_first=True)
    valid = (torch.arange(values.shape[1]) < counts[:, None]).to(features.device)
    return Features(values, without_padding(torch.ones_like(valid[:, :1]), valid))


def text_mask(valid: Tensor, *, num_queries: int, form: Literal["both", "causal"]) -> Mask:
    """Who sees whom in [queries ; text], by the one rule over (segment, order). valid: (B, T) bool, false in padding.

    `both` (matching): queries and text see each other. `causal` (captions): queries see queries, text sees queries and
    the text up to itself. Padding is a segment of its own.
    """
    batch_size, num_text = valid.shape
    segment = torch.cat([valid.new_zeros(batch_size, num_queries), ~valid], dim=1)
    order = torch.zeros_like(segment, dtype=torch.int64)
    if form == "causal":
        order[:, num_queries:] = torch.arange(1, num_text + 1, device=valid.device)
    return dense(segment, order, segment, order)


def behind(mask: Mask, start: int) -> Mask:
    """The same mask for the tokens from `start` on alone: what stands before them is in `past`."""
    assert mask.allowed is not None
    return Mask("dense", allowed=mask.allowed[:, :, start:])
