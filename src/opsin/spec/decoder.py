"""One causal language model: pre-norm blocks of rotary grouped attention and a gated MLP."""

from typing import Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from opsin.spec.base import Spec


class RopeConfig(Spec):
    """Rotary positions (arXiv:2104.09864)."""

    theta: PositiveFloat = 10_000.0
    """Base of the frequencies."""


class DecoderConfig(Spec):
    """A Llama-shaped decoder: RMSNorm, SwiGLU, no biases, head and embedding untied."""

    vocab_size: PositiveInt
    """Rows of the embedding and of the head; a tokenizer may use fewer."""
    dim: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    """Key and value heads; each serves num_heads / num_kv_heads query heads (arXiv:2305.13245)."""
    mlp_dim: PositiveInt
    head_dim: PositiveInt | None = None
    """Width of one head; dim / num_heads when not given."""
    norm_eps: PositiveFloat = 1e-5
    rope: RopeConfig = RopeConfig()
    max_positions: PositiveInt = 4096
    """Longest sequence the model was trained for; longer prompts are refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; give head_dim")
        if self.head_width % 2:
            raise ValueError(f"heads are {self.head_width} wide; rotary positions turn pairs, so it must be even")
        return self

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Bytes that one token adds to the key/value cache; element_size 2 is half precision."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_width * element_size
