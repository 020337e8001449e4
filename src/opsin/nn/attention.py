"""The one attention call of the project, and the layer around it."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.nn.blocks import RMSNorm
from opsin.nn.cache import KVCache
from opsin.nn.mask import Mask
from opsin.nn.rope import Rotation, rotate


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention with grouped keys: softmax(q k^T / sqrt(E)) v.

    q: (B, T, H, E)   k, v: (B, S, K, E), K divides H   mask: which of the S keys each of the T queries may see.
    bias: (1, H, T, S), added to the scores (T5's relative positions). scale: instead of 1 / sqrt(E). dropout: share of
    the weights that is dropped, at training.
    Returns (B, T, H, E). The kernels accumulate scores in float32 for half-precision inputs, which overflow otherwise.
    """
    if mask.form == "stretches":
        assert bias is None, "stretches have no common matrix that a bias could be added to"
        return _attend_apart(q, k, v, mask=mask, scale=scale, dropout=dropout)
    allowed, causal = mask.allowed, mask.form == "causal"
    if bias is not None:
        assert not causal, "write a causal mask out where there is a bias"
        allowed = bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
    return _sdpa(q, k, v, causal=causal, allowed=allowed, scale=scale, dropout=dropout)


def _attend_apart(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, scale: float | None, dropout: float) -> Tensor:
    """Each stretch by itself, or all of one length as one batch.

    Tensors are split once and joined once: a slice for each stretch would get a gradient as large as the whole each.
    """
    settings: dict[str, Any] = {"causal": mask.within == "causal", "allowed": None, "scale": scale, "dropout": dropout}
    pieces = mask.pieces(*q.shape[:2])
    lengths = [length for length, _ in pieces]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    if len(set(pieces)) == 1 and pieces[0][1]:
        return _sdpa(*(x.unflatten(0, (-1, lengths[0])) for x in flat), **settings).reshape(q.shape)
    parts = zip(*(x[None].split(lengths, dim=1) for x in flat), pieces, strict=True)
    found = [_sdpa(*part, **settings) if seen else torch.zeros_like(part[0]) for *part, (_, seen) in parts]
    return torch.cat(found, dim=1).view(q.shape)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, allowed: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    # SDPA wants heads before tokens; the transposes are views.
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        is_causal=causal and q.shape[1] > 1,
        enable_gqa=q.shape[2] != k.shape[2],
        scale=scale,
        dropout_p=dropout,
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with optional rotary positions, grouped keys, and norms on queries and keys."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: Literal["none", "qkv", "out", "all"],
        qk_norm_eps: float | None = None,
    ) -> None:
        """qk_norm_eps: RMSNorm over all heads of queries and of keys together (InternViT-6B); None: no norm."""
        super().__init__()
        self.head_dim = head_dim
        inner, inner_kv = num_heads * head_dim, num_kv_heads * head_dim
        self.widths = [inner, inner_kv, inner_kv]
        qkv_bias, out_bias = bias in ("qkv", "all"), bias in ("out", "all")
        self.q = nn.Linear(dim, inner, bias=qkv_bias)
        self.k = nn.Linear(dim, inner_kv, bias=qkv_bias)
        self.v = nn.Linear(dim, inner_kv, bias=qkv_bias)
        self.qkv: nn.Module | None = None
        """One layer in place of the three, where `packed.pack` has joined them."""
        self.out = nn.Linear(inner, dim, bias=out_bias)
        self.norm_q = None if qk_norm_eps is None else RMSNorm(inner, eps=qk_norm_eps)
        self.norm_k = None if qk_norm_eps is None else RMSNorm(inner_kv, eps=qk_norm_eps)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, D) -> (B, T, D). With a cache, new keys and values are stored under `layer` first.

        wanted: (M,) places in (B * T) whose results are needed, when the other tokens are only looked at; then (M, D).
        Keys are stored rotated, so that a cached step rotates only its new tokens. Queries are not stored: a past query
        has done its work and nothing later reads it.
        """
        q, k, v = self._project(x)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = q.view(split), k.view(split), v.view(split)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
            if rotation.query_scale is not None:
                q = q * rotation.query_scale
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # A cache may store another dtype than the model's; attention then works in the cache's.
        return self.out(pick(attend(q.to(k.dtype), k, v, mask=mask).flatten(2), wanted).to(x.dtype))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is None:
            return self.q(x), self.k(x), self.v(x)
        return self.qkv(x).split(self.widths, dim=-1)


def pick(x: Tensor, wanted: Tensor | None) -> Tensor:
    """x: (B, T, D) -> (M, D), the tokens at the places (M,) in (B * T); all of x where None."""
    return x if wanted is None else x.flatten(0, 1).index_select(0, wanted)
