"""The vision tower: a plain ViT (arXiv:2010.11929) with CLIP's habits, over packed patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.errors import ConfigError
from opsin.nn.attention import Attention
from opsin.nn.blocks import MLP
from opsin.nn.mask import FULL
from opsin.spec.vision import VisionConfig


class VisionLayer(nn.Module):
    """Pre-norm block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        heads = config.num_heads
        self.norm1 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.attn = Attention(config.dim, num_heads=heads, num_kv_heads=heads, head_dim=config.dim // heads, bias=True)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config.dim, config.mlp_dim, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, tokens, D) -> same shape."""
        x = x + self.attn(self.norm1(x), mask=FULL)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Patches in, features out. Layers that no output needs are kept but not run (`config.num_used_layers`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        # A convolution whose stride equals its kernel is a linear layer over flat patches: see `_embed`.
        self.patch = nn.Linear(3 * config.patch_size**2, config.dim, bias=False)
        self.class_token = nn.Parameter(torch.empty(config.dim))
        self.positions = nn.Parameter(torch.empty(1 + config.side**2, config.dim))
        self.norm_pre = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.norm_post = nn.LayerNorm(config.dim, eps=config.norm_eps)

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """patches: (P, 3 * p * p) of all tiles, flattened (channel, y, x); grids: (N, 3) patches (t, h, w) per tile.

        Returns features (N * tokens, D * len(out_layers)), tile after tile; tokens is `config.num_tokens(grid)`.
        """
        config, num_tiles = self.config, grids.shape[0]
        if (grids != torch.tensor([1, config.side, config.side])).any():
            raise ConfigError(
                f"the vision tower reads tiles of {config.side}x{config.side} patches; "
                f"got grids {grids.unique(dim=0).tolist()}"
            )
        x = self._embed(patches.to(self.patch.weight.dtype), num_tiles)
        x = torch.cat([self.class_token.expand(num_tiles, 1, -1), x], dim=1) + self.positions
        x = self.norm_pre(x)
        states = {0: x}
        for index, layer in enumerate(self.layers[: config.num_used_layers], start=1):
            x = layer(x)
            if index in config.out_indices:
                states[index] = x
        features = torch.cat([states[index] for index in config.out_indices], dim=-1)
        if config.class_token == "drop":
            features = features[:, 1:]
        return features.flatten(0, 1)

    def _embed(self, patches: Tensor, num_tiles: int) -> Tensor:
        """patches: (P, 3 * p * p) -> (N, side * side, D).

        On a CPU the patches are laid out as tiles again and convolved: the sums are those of the linear layer, but
        added in the order of the authors' kernel, so that features agree to the last bits. It takes no longer.
        """
        side, size = self.config.side, self.config.patch_size
        if patches.device.type != "cpu":
            return self.patch(patches).view(num_tiles, side**2, -1)
        tiles = patches.view(num_tiles, side, side, 3, size, size).permute(0, 3, 1, 4, 2, 5)
        tiles = tiles.reshape(num_tiles, 3, side * size, side * size)
        embedded = F.conv2d(tiles, self.patch.weight.view(-1, 3, size, size), stride=size)
        return embedded.flatten(2).transpose(1, 2)
