"""Connectors: features of the tower in, rows of the language model's width out."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.nn.attention import attend
from opsin.nn.mask import FULL
from opsin.nn.positions import resize_table
from opsin.nn.qformer import QFormerRows
from opsin.spec.connector import (
    ConnectorConfig,
    LinearConnector,
    MLPConnector,
    PatchMerger,
    PixelShuffleConnector,
    Resampler,
)
from opsin.spec.qformer import QFormerConfig


def make_connector(config: ConnectorConfig, *, in_dim: int, out_dim: int) -> nn.Module:
    """The module for a description. All take features (F, in_dim) and grids (N, 3), and give rows (R, out_dim)."""
    match config:
        case LinearConnector() | MLPConnector():
            return MLPRows(config, in_dim=in_dim, out_dim=out_dim)
        case PixelShuffleConnector():
            return PixelShuffleRows(config, in_dim=in_dim, out_dim=out_dim)
        case PatchMerger():
            return MergedRows(config, in_dim=in_dim, out_dim=out_dim)
        case Resampler():
            return ResampledRows(config, in_dim=in_dim, out_dim=out_dim)
        case QFormerConfig():
            return QFormerRows(config, in_dim=in_dim, out_dim=out_dim)


class _MLP(nn.Module):
    """Linear layers with exact GELU between them."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def project(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(F.gelu(x))
        return x


class MLPRows(_MLP):
    """One row per feature; one layer is LLaVA's, two are LLaVA-1.5's."""

    def __init__(self, config: LinearConnector | MLPConnector, *, in_dim: int, out_dim: int) -> None:
        num_layers = 1 if config.kind == "linear" else config.num_layers
        super().__init__([in_dim] + [out_dim] * num_layers)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """features: (F, in_dim) -> rows (F, out_dim)."""
        return self.project(features)


class PixelShuffleRows(_MLP):
    """Two by two neighbours of a tile become one row (InternVL-1.5)."""

    def __init__(self, config: PixelShuffleConnector, *, in_dim: int, out_dim: int) -> None:
        super().__init__([4 * in_dim, out_dim, out_dim])
        self.order = config.order
        self.norm = nn.LayerNorm(4 * in_dim)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """features: (F, in_dim) of tiles of one grid -> rows (F / 4, out_dim)."""
        _, h, w = grids[0].tolist()
        assert (grids == grids[0]).all(), "tiles of one grid"
        x = features.view(-1, h // 2, 2, w // 2, 2, features.shape[-1])
        # Channels of a row: top-left, top-right, bottom-left, bottom-right.
        x = x.permute(0, 1, 3, 2, 4, 5) if self.order == "rows" else x.permute(0, 3, 1, 2, 4, 5)
        return self.project(self.norm(x.reshape(-1, 4 * features.shape[-1])))


class MergedRows(_MLP):
    """Four patches of a block become one row (Qwen2-VL); blocks are consecutive, so that joining is a view."""

    def __init__(self, config: PatchMerger, *, in_dim: int, out_dim: int) -> None:
        super().__init__([4 * in_dim, 4 * in_dim, out_dim])
        self.norm = nn.LayerNorm(in_dim, eps=config.norm_eps)

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """features: (F, in_dim) -> rows (F / 4, out_dim)."""
        return self.project(self.norm(features).view(-1, 4 * features.shape[-1]))


class ResampledRows(nn.Module):
    """A fixed number of learned queries look at a tile once (Qwen-VL)."""

    def __init__(self, config: Resampler, *, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        num_queries = config.side**2
        self.queries = nn.Parameter(torch.empty(num_queries, out_dim))
        self.positions = nn.Parameter(torch.empty(num_queries, out_dim))
        """Fixed 2-D sines in published files; stored there, so stored here."""
        self.kv = nn.Linear(in_dim, out_dim, bias=False) if in_dim != out_dim else nn.Identity()
        self.norm_q = nn.LayerNorm(out_dim, eps=config.norm_eps)
        self.norm_kv = nn.LayerNorm(out_dim, eps=config.norm_eps)
        self.q = nn.Linear(out_dim, out_dim)
        self.k = nn.Linear(out_dim, out_dim)
        self.v = nn.Linear(out_dim, out_dim)
        self.out = nn.Linear(out_dim, out_dim)
        self.norm_post = nn.LayerNorm(out_dim, eps=config.norm_eps)
        self.proj = nn.Parameter(torch.empty(out_dim, out_dim))

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """features: (F, in_dim) of tiles of one grid -> rows (N * num_queries, out_dim)."""
        _, h, w = grids[0].tolist()
        num_tiles = grids.shape[0]
        x = self.norm_kv(self.kv(features)).view(num_tiles, h * w, -1)
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        # Positions tell where to look: they are added to queries and keys, not to what is read there.
        q = self.q(self.norm_q(self.queries) + self.positions).unflatten(-1, heads).expand(num_tiles, -1, -1, -1)
        k = self.k(x + resize_table(self.positions, (h, w))).unflatten(-1, heads)
        v = self.v(x).unflatten(-1, heads)
        read = self.out(attend(q, k, v, mask=FULL).flatten(2))
        return (self.norm_post(read) @ self.proj).flatten(0, 1)
