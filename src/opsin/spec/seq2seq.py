"""An encoder-decoder language model, T5-shaped (arXiv:1910.10683, with the gated feed-forward of T5 v1.1)."""

from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from opsin.spec.base import Spec


class Seq2SeqConfig(Spec):
    """T5: pre-norm blocks of unscaled attention with relative positions, RMSNorm, no biases, its own head.

    What the encoder reads stands first in a sequence, what the decoder writes behind it (`Encoded.encoder_length`).
    """

    kind: Literal["seq2seq"] = "seq2seq"
    vocab_size: PositiveInt
    """Rows of the embedding, which both stacks share, and of the head."""
    dim: PositiveInt
    num_encoder_layers: PositiveInt
    num_layers: PositiveInt
    """Of the decoder."""
    num_heads: PositiveInt
    head_dim: PositiveInt
    """Width of one head; all together need not be `dim` wide."""
    mlp_dim: PositiveInt
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Of the feed-forward's gate: exact, as BLIP-2 runs FlanT5, or the tanh form that FlanT5 was trained with."""
    norm_eps: PositiveFloat = 1e-6
    num_buckets: PositiveInt = 32
    """Relative positions that are told apart: near ones each, far ones in groups."""
    max_distance: PositiveInt = 128
    """Distance from which on all are one."""
    max_positions: PositiveInt = 512
    """Longest sequence the model was trained for; longer prompts are refused."""

    # What `DecoderConfig` lets one choose and T5 does not.
    norm: ClassVar[Literal["rms"]] = "rms"
    attention_bias: ClassVar[Literal["none"]] = "none"
    mlp: ClassVar[Literal["gated_gelu"]] = "gated_gelu"
    head: ClassVar[Literal["own"]] = "own"
    rope: ClassVar[None] = None
    num_axes: ClassVar[int] = 1

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of the decoder's self-attention, as many as query heads."""
        return self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Bytes that one token adds to the cache, on whichever side; element_size 2 is half precision."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * element_size
