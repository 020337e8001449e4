"""The vision tower: a plain ViT (arXiv:2010.11929) over packed patches, with the published variations as data."""

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.errors import ConfigError
from opsin.nn.attention import Attention
from opsin.nn.blocks import MLP, LayerScale, make_norm
from opsin.nn.mask import FULL, Mask, separate
from opsin.nn.positions import patch_places, patch_rotation, resize_table, spread_table
from opsin.nn.rope import Rotation
from opsin.spec.vision import VisionConfig


class VisionLayer(nn.Module):
    """Pre-norm block: x + attn(norm1(x)), then x + mlp(norm2(x)), each scaled where the model scales."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        heads = config.num_heads
        self.norm1 = make_norm(config.norm, config.dim, config.norm_eps)
        self.attn = Attention(
            config.dim,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=config.dim // heads,
            bias="all" if config.qkv_bias == "all" else "out",
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.norm2 = make_norm(config.norm, config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.mlp_dim, config.activation)
        self.scale1 = LayerScale(config.dim) if config.layer_scale else nn.Identity()
        self.scale2 = LayerScale(config.dim) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor, *, mask: Mask, rotation: Rotation | None, drop: float = 0.0) -> Tensor:
        """x: (N, tokens, D) -> same shape. drop: how likely a half-block is left out of a row."""
        x = x + drop_rows(self.scale1(self.attn(self.norm1(x), mask=mask, rotation=rotation)), drop)
        return x + drop_rows(self.scale2(self.mlp(self.norm2(x))), drop)


def drop_rows(x: Tensor, share: float) -> Tensor:
    """x: (N, ...) with about `share` of its rows set to 0, the others scaled up (stochastic depth,
    arXiv:1603.09382)."""
    if not share:
        return x
    kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - share)
    return x * (kept / (1 - share))


class VisionTower(nn.Module):
    """Patches in, features out. Layers that no output needs are kept but not run (`config.num_used_layers`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.drop_path = 0.0
        """While training: how likely the last block leaves a tile as it is; earlier blocks less, the first never."""
        # A convolution whose stride equals its kernel is a linear layer over flat patches: see `_embed`.
        self.patch = nn.Linear(config.patch_dim, config.dim, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.empty(config.dim)) if config.has_class_token else None
        learned = config.positions != "rotary"
        num_positions = config.has_class_token + config.side**2
        self.positions = nn.Parameter(torch.empty(num_positions, config.dim)) if learned else None
        self.norm_pre = make_norm(config.norm, config.dim, config.norm_eps) if config.first_norm else nn.Identity()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.norm_post = make_norm(config.norm, config.dim, config.norm_eps) if config.last_norm else None

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """patches: (P, C * t * p * p) of all tiles, flattened (channel, frame, y, x); grids: (N, 3) patches (t, h, w).

        Returns features (N * tokens, D * len(out_layers)), tile after tile; tokens is `config.num_tokens(grid)`.
        Every frame of a tile is a picture of its own to the tower.
        """
        config = self.config
        frames = [(h, w) for t, h, w in grids.tolist() for _ in range(t)]
        x = self._embed(patches.to(self.patch.weight.dtype), frames)
        if len(set(frames)) == 1:  # equal frames run as one plain batch
            x, mask = x.view(len(frames), -1, config.dim), FULL
        elif config.has_class_token:
            raise ConfigError(f"a tower with a class token reads tiles of one grid; got {sorted(set(frames))}")
        else:
            ends = list(accumulate((h * w for h, w in frames), initial=0))
            x, mask = x[None], separate(tuple((0, start, stop) for start, stop in pairwise(ends)))
        x, rotation = self._place(x, frames)
        x = self.norm_pre(x)
        states = {0: x}
        for index, layer in enumerate(self.layers[: config.num_used_layers], start=1):
            drop = self.drop_path * (index - 1) / max(1, config.num_layers - 1) if self.training else 0.0
            x = layer(x, mask=mask, rotation=rotation, drop=drop)
            if index in config.out_indices:
                states[index] = x
        features = torch.cat([states[index] for index in config.out_indices], dim=-1)
        if config.class_token == "drop":
            features = features[:, 1:]
        return features.flatten(0, 1)

    def _embed(self, patches: Tensor, frames: list[tuple[int, int]]) -> Tensor:
        """patches: (P, C * t * p * p) -> (P, D).

        On a CPU patches in plain order are laid out as tiles again and convolved: the sums are those of the linear
        layer, but added in the order of the authors' kernel, so that features agree to the last bits, in the same time.
        """
        (h, w), size = frames[0], self.config.patch_size
        if patches.device.type != "cpu" or len(set(frames)) > 1 or self.config.patch_block > 1:
            return self.patch(patches)
        tiles = patches.view(len(frames), h, w, -1, size, size).permute(0, 3, 1, 4, 2, 5)
        tiles = tiles.reshape(len(frames), -1, h * size, w * size)
        kernel = self.patch.weight.view(self.config.dim, -1, size, size)
        embedded = F.conv2d(tiles, kernel, self.patch.bias, stride=size)
        return embedded.flatten(2).transpose(1, 2).flatten(0, 1)

    def _place(self, x: Tensor, frames: list[tuple[int, int]]) -> tuple[Tensor, Rotation | None]:
        """Tell patches where they are: x (batch, tokens, D) with learned positions added, or the rotation to use."""
        config = self.config
        equal = len(x) == len(frames)
        if config.turns:
            grids = frames[:1] if equal else frames
            cached = {grid: patch_places(grid, block=config.patch_block, device=x.device) for grid in set(grids)}
            if self.positions is not None:
                tables = {grid: spread_table(self.positions, grid, places) for grid, places in cached.items()}
                x = x + torch.cat([tables[grid] for grid in grids])
            places = torch.cat([cached[grid] for grid in grids])[None]
            return x, patch_rotation(places, head_dim=config.dim // config.num_heads, dtype=x.dtype)
        assert self.positions is not None
        own = (config.side, config.side)
        if config.positions == "learned" and set(frames) != {own}:
            raise ConfigError(
                f"the vision tower reads tiles of {config.side}x{config.side} patches; got grids {sorted(set(frames))}"
            )
        first = int(config.has_class_token)
        corners = config.positions == "learned_bicubic_corners"
        tables = {grid: resize_table(self.positions[first:], grid, align_corners=corners) for grid in set(frames)}
        x = x + (tables[frames[0]] if equal else torch.cat([tables[grid] for grid in frames]))
        if self.class_token is not None:
            token = (self.class_token + self.positions[0]).expand(len(x), 1, -1)
            x = torch.cat([token, x], dim=1)
        return x, None
