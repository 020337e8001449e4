"""The causal language model, Llama-shaped (arXiv:2302.13971) with the published variations as data."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opsin.nn.attention import Attention, pick
from opsin.nn.blocks import GatedMLP, ReluMLP, make_norm
from opsin.nn.cache import KVCache
from opsin.nn.mask import Mask
from opsin.nn.rope import Rotation, rotation
from opsin.spec.decoder import DecoderConfig

OPT_POSITION_OFFSET = 2
"""OPT enters its table of learned positions two rows down (transformers, OPTLearnedPositionalEmbedding)."""


class DecoderLayer(nn.Module):
    """Pre-norm block: x + attn(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config.norm, config.dim, config.norm_eps)
        self.attn = Attention(
            config.dim,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_width,
            bias=config.attention_bias,
        )
        self.norm2 = make_norm(config.norm, config.dim, config.norm_eps)
        self.mlp = (
            GatedMLP(config.dim, config.mlp_dim) if config.mlp == "swiglu" else ReluMLP(config.dim, config.mlp_dim)
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Mask,
        rotation: Rotation | None,
        cache: KVCache | None,
        layer: int,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, D) -> same shape; (M, D) where only some places are `wanted`, see `Attention.forward`."""
        attended = self.attn(self.norm1(x), mask=mask, rotation=rotation, cache=cache, layer=layer, wanted=wanted)
        x = pick(x, wanted) + attended
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Embedding, blocks, final norm, head. `forward` stops before the head: logits are made only where needed."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # Numbers come from a checkpoint or from `weights.init`. nn.Embedding(...) would draw its own, which on the meta
        # device loads torch's compiler: a second on every start.
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        learned = config.rope is None
        self.positions = nn.Embedding(config.max_positions + OPT_POSITION_OFFSET, config.dim) if learned else None
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = make_norm(config.norm, config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False) if config.head == "own" else None

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor,
        mask: Mask,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, D) embeddings; positions: (B, T, A). Returns normed hidden states (B, T, D).

        wanted: (M,) places in (B * T) whose states are needed: the result is then (M, D). The last layer computes
        keys and values of all tokens, since these look at them, but its MLP for these alone.
        lengths: see `rope.rotation`; only a rotation that depends on the sequence's length reads it.
        """
        angles = None
        if self.config.rope is not None:
            angles = rotation(
                positions, head_dim=self.config.head_width, config=self.config.rope, dtype=x.dtype, lengths=lengths
            )
        elif self.positions is not None:
            x = x + self.positions(positions[..., 0] + OPT_POSITION_OFFSET)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            only = wanted if index == last else None
            x = layer(x, mask=mask, rotation=angles, cache=cache, layer=index, wanted=only)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., D) -> (..., V)."""
        return F.linear(hidden, self.embed.weight) if self.head is None else self.head(hidden)
