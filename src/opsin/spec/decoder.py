"""One causal language model: pre-norm blocks of grouped attention and an MLP."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from opsin.spec.base import Spec
from opsin.spec.vision import Norm


class DynamicScaling(Spec):
    """Sequences beyond `trained` tokens turn by a larger base (InternLM2, `rope_scaling: dynamic`):
    theta * (factor * length / trained - factor + 1)^(E / (E - 2))."""

    kind: Literal["dynamic"] = "dynamic"
    factor: float
    trained: int


class PowerScaling(Spec):
    """The same in steps, at inference only (Qwen-VL, `use_dynamic_ntk`): what is raised to the power is
    max(1, 2^ceil(log2(length / trained) + 1) - 1)."""

    kind: Literal["powers"] = "powers"
    trained: int


class LongScaling(Spec):
    """Each frequency divided by its own factor, from one list up to `trained` tokens and another beyond; sines and
    cosines scaled by sqrt(1 + ln(extended / trained) / ln(trained)) in both (Phi-3, `su` or `longrope`)."""

    kind: Literal["long"] = "long"
    short: tuple[float, ...]
    long: tuple[float, ...]
    trained: int
    extended: int


RopeScaling = Annotated[DynamicScaling | PowerScaling | LongScaling, Field(discriminator="kind")]


class RopeConfig(Spec):
    """Rotary positions (arXiv:2104.09864)."""

    theta: PositiveFloat = 10_000.0
    """Base of the frequencies."""
    sections: tuple[int, int, int] | None = None
    """How many of the E/2 frequencies read the time, row and column axis of the position (M-RoPE); None: one axis."""
    order: Literal["blocks", "interleaved"] = "blocks"
    """Which ones. `blocks`: the fastest read the time, the slowest the column (Qwen2-VL). `interleaved`: the three take
    turns, from fast to slow, and what is left over reads the time (Qwen3-VL, config.json `mrope_interleaved`)."""
    picture_span: Literal["time_and_space", "space"] = "time_and_space"
    """With three axes: by how many positions a picture or video moves what follows it. `time_and_space`: the largest of
    its rows, columns and times, the published rule (arXiv:2409.12191, transformers 4). `space`: the larger of rows and
    columns, so that the text after a long video stands among its times (transformers 5)."""
    scaling: RopeScaling | None = None
    log_n: int | None = None
    """At inference, the query at the i-th position is multiplied by log(i) / log(log_n) where i > log_n (Qwen-VL)."""

    def axes(self, num_frequencies: int) -> list[int]:
        """Which axis of the position each frequency reads, from the fastest on."""
        if self.sections is None:
            return [0] * num_frequencies
        if self.order == "blocks":
            return [axis for axis, count in enumerate(self.sections) for _ in range(count)]
        axes = [0] * num_frequencies
        for axis in (1, 2):
            for number in range(self.sections[axis]):
                axes[3 * number + axis] = axis
        return axes

    def is_same_for(self, length: int, other: int) -> bool:
        """Whether prompts of two lengths turn by the same angles, so that one may go on from the other's keys."""
        match self.scaling:
            case None:
                return True
            case DynamicScaling(trained=trained):
                return max(length, trained) == max(other, trained)
            case LongScaling(trained=trained):
                return (length > trained) == (other > trained)
            case PowerScaling(trained=trained):
                steps = [math.ceil(math.log2(max(n, trained) / trained)) for n in (length, other)]
                return steps[0] == steps[1]


class DecoderConfig(Spec):
    """A decoder. Defaults are Llama's: RMSNorm, SwiGLU, no biases, its own head."""

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
    norm: Norm = "rms"
    norm_eps: PositiveFloat = 1e-5
    attention_bias: Literal["none", "qkv", "all"] = "none"
    mlp: Literal["swiglu", "relu"] = "swiglu"
    """`relu` is OPT's: two layers with biases."""
    head: Literal["own", "tied"] = "own"
    """`tied`: logits reuse the embedding table."""
    rope: RopeConfig | None = RopeConfig()
    """None: a learned table of max_positions + 2 positions, entered at position + 2 (OPT)."""
    max_positions: PositiveInt = 4096
    """Longest sequence the model was trained for; longer prompts are refused."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}; give head_dim")
        if self.rope and self.head_width % 2:
            raise ValueError(f"heads are {self.head_width} wide; rotary positions turn pairs, so it must be even")
        if self.rope and self.rope.sections and sum(self.rope.sections) * 2 != self.head_width:
            raise ValueError(
                f"rope.sections {self.rope.sections} do not add up to half the head width {self.head_width}"
            )
        if self.rope and self.rope.sections and self.rope.order == "interleaved":
            most = (self.head_width // 2 + 1) // 3
            if max(self.rope.sections[1:]) > most:
                raise ValueError(
                    f"rope.sections {self.rope.sections} cannot take turns among {self.head_width // 2} frequencies: "
                    f"row and column may read {most} each at most"
                )
        scaling = self.rope and self.rope.scaling
        if scaling and scaling.kind == "long" and {len(scaling.short), len(scaling.long)} != {self.head_width // 2}:
            raise ValueError(f"rope.scaling needs {self.head_width // 2} factors in each list")
        return self

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def num_axes(self) -> int:
        """Axes of a position: 3 where the rotation reads time, row and column, else 1."""
        return 3 if self.rope and self.rope.sections else 1

    def kv_bytes_per_token(self, element_size: int = 2) -> int:
        """Bytes that one token adds to the key/value cache; element_size 2 is half precision."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_width * element_size
