"""The one attention call of the project, and the layer around it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.nn.cache import KVCache
from opsin.nn.mask import Mask
from opsin.nn.rope import Rotation, rotate


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask) -> Tensor:
    """Softmax attention with grouped keys: softmax(q k^T / sqrt(E)) v.

    q: (B, T, H, E)   k, v: (B, S, K, E), K divides H   mask: which of the S keys each of the T queries may see.
    Returns (B, T, H, E). The kernels accumulate scores in float32 for half-precision inputs, which overflow otherwise.
    """
    grouped = q.shape[2] != k.shape[2]
    if mask.form == "documents":
        out = torch.zeros_like(q)
        for row, start, stop in mask.documents:
            part = (slice(row, row + 1), slice(start, stop))
            out[part] = _sdpa(q[part], k[part], v[part], causal=True, allowed=None, grouped=grouped)
        return out
    return _sdpa(q, k, v, causal=mask.form == "causal", allowed=mask.allowed, grouped=grouped)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, allowed: Tensor | None, grouped: bool) -> Tensor:
    # SDPA wants heads before tokens; the transposes are views.
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        is_causal=causal and q.shape[1] > 1,
        enable_gqa=grouped,
    )
    return out.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with optional rotary positions and grouped keys."""

    def __init__(self, dim: int, *, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.k = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask,
        rotation: Rotation | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x: (B, T, D) -> (B, T, D). With a cache, new keys and values are stored under `layer` first.

        Keys are stored rotated, so that a cached step rotates only its new tokens. Queries are not stored: a past query
        has done its work and nothing later reads it.
        """
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q(x).view(split), self.k(x).view(split), self.v(x).view(split)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        # A cache may store another dtype than the model's; attention then works in the cache's.
        return self.out(attend(q.to(k.dtype), k, v, mask=mask).flatten(2).to(x.dtype))
