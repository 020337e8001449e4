"""One causal language model: pre-norm blocks of rotary grouped attention and a gated MLP."""

from typing import Self

from pydantic import model_validator

from opsin.spec.base import Spec


class RopeConfig(Spec):
    """Rotary positions."""

    theta: float = 10_000.0
    """Base of the frequencies."""


class DecoderConfig(Spec):
    """A Llama-shaped decoder: RMSNorm, SwiGLU, no biases."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    head_dim: int | None = None
    """Width of one head; dim / num_heads when not given."""
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    max_positions: int = 4096
    """Longest sequence the model was trained for; longer prompts are refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; give head_dim")
        return self

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Bytes that one token adds to the key/value cache; element_size 2 is half precision."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_width * element_size
