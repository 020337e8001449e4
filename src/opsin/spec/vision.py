"""One vision transformer: its sizes, which layers and tokens come out, and the pixel statistics it was trained with."""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from opsin.spec.base import Spec

Activation = Literal["quick_gelu", "gelu"]
"""quick_gelu is x * sigmoid(1.702 x) (OpenAI CLIP); gelu is the exact erf form."""
Norm = Literal["layer", "rms"]
"""LayerNorm with bias, or RMSNorm without."""


class VisionConfig(Spec):
    """A ViT. Defaults are CLIP's habits: learned positions, a class token, a LayerNorm before the blocks."""

    image_size: PositiveInt
    """Side in pixels of the square tile that the learned positions cover; with rotary positions it says nothing."""
    patch_size: PositiveInt
    dim: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    mlp_dim: PositiveInt
    activation: Activation = "quick_gelu"
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    out_layers: tuple[int, ...] = (-2,)
    """Hidden states that come out, concatenated on the channel. 0 is after the first norm, i the output of block i,
    negative counts from the end: -2 is the output of the last block but one (LLaVA's choice)."""
    class_token: Literal["drop", "keep", "none"] = "drop"
    """`drop`: the class token stays behind (`patch`, `default`); `keep`: it leaves the tower in front of the patches
    (`cls_patch`, HF `full`); `none`: the tower has none."""
    positions: Literal["learned", "learned_bicubic", "learned_bicubic_corners", "rotary", "rotary_and_table"] = (
        "learned"
    )
    """`learned` fits tiles of `image_size` only; the bicubic forms resize the table to the tile's grid at each call,
    without or with aligned corners; `rotary` turns queries and keys by patch row and column (Qwen2-VL), which tells how
    far apart patches are and not where; `rotary_and_table` does that and adds a learned table, resized bilinearly with
    aligned corners (Qwen3-VL, config.json num_position_embeddings)."""
    first_norm: bool = True
    """Whether a norm stands before the first block."""
    last_norm: bool = True
    """Whether the checkpoint holds a norm after the last block. It is loaded and saved; no model here reads it."""
    patch_bias: bool = False
    qkv_bias: Literal["all", "none"] = "all"
    qk_norm: bool = False
    """RMSNorm over the full width of queries and of keys, before they are split into heads (InternViT-6B)."""
    layer_scale: bool = False
    """A learned factor per channel on what each half-block adds (InternViT)."""
    frames: PositiveInt = 1
    """Frames that one patch spans (Qwen2-VL's temporal_patch_size: 2)."""
    patch_block: PositiveInt = 1
    """Patches arrive in blocks of this many by this many, so that a connector can join a block by a reshape."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Pixel mean per channel, of pixels in 0..1 (OpenAI CLIP preprocessor_config.json)."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.26862954, 0.26130258, 0.27577711)
    """Its standard deviation per channel."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than one patch of {self.patch_size} px")
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.turns and (self.class_token != "none" or self.dim // self.num_heads % 4):
            raise ValueError("rotary positions need heads whose width is a multiple of 4, and no class token")
        if not self.out_layers:
            raise ValueError("out_layers is empty: name at least one hidden state, such as -2")
        for layer in self.out_layers:
            if not -self.num_layers - 1 <= layer <= self.num_layers:
                raise ValueError(
                    f"out_layers names hidden state {layer}; there are {self.num_layers + 1} (0 to {self.num_layers})"
                )
        return self

    @property
    def turns(self) -> bool:
        """Whether queries and keys are turned by patch row and column."""
        return self.positions in ("rotary", "rotary_and_table")

    @property
    def side(self) -> int:
        """Patches along one side of a square tile. A remainder of pixels is ignored, as a strided convolution does."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch (channel, frame, y, x)."""
        return 3 * self.frames * self.patch_size**2

    @property
    def has_class_token(self) -> bool:
        """Whether a class token goes through the blocks."""
        return self.class_token != "none"

    @property
    def out_dim(self) -> int:
        """Channels of the features."""
        return self.dim * len(self.out_layers)

    @property
    def out_indices(self) -> tuple[int, ...]:
        """`out_layers` as indices 0..num_layers."""
        return tuple(layer % (self.num_layers + 1) for layer in self.out_layers)

    @property
    def num_used_layers(self) -> int:
        """Blocks that are run. Later ones are loaded and saved, so that checkpoints stay whole, but not computed."""
        return max(self.out_indices)

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Features that leave the tower for one tile."""
        t, h, w = grid
        return t * h * w + (self.class_token == "keep")
