"""Connectors: features of the tower in, rows of the language model's width out."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from opsin.spec.connector import ConnectorConfig


class Connector(nn.Module):
    """Linear layers with exact GELU between them; one layer is LLaVA's, two are LLaVA-1.5's."""

    def __init__(self, config: ConnectorConfig, *, in_dim: int, out_dim: int) -> None:
        super().__init__()
        num_layers = 1 if config.kind == "linear" else config.num_layers
        widths = [in_dim] + [out_dim] * num_layers
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, features: Tensor, grids: Tensor) -> Tensor:
        """features: (F, in_dim) of all tiles; grids: (N, 3) patches per tile, for connectors that change the grid.

        Returns (R, out_dim).
        """
        x = self.layers[0](features)
        for layer in self.layers[1:]:
            x = layer(F.gelu(x))
        return x
