"""What both libraries are given: one picture, and requests that name files and token ids. Imports neither of them."""

import hashlib
from typing import Any, Protocol

import numpy as np
from PIL import Image

PICTURE_SIZE = (1024, 768)
"""(width, height): a photo of usual shape, which padding, cropping and tiling treat differently."""

Reply = dict[str, Any]


class Side(Protocol):
    """One library, driven by its worker process. Every method is a request; it returns what goes back as JSON."""

    def load(self, folder: str, dtype: str) -> Reply:
        """`seconds` until the model is ready to answer. What was loaded before is freed first."""

    def prompt(self, ids: list[int]) -> Reply:
        """Prepare the picture, and hold the prompt `ids` for the requests that follow."""

    def prefill(self, room: int) -> Reply:
        """`seconds` from ids and pixels to the first of `ids`; keys and values stay, with room for as many tokens."""

    def decode(self, rows: int, steps: int) -> Reply:
        """`seconds` per step (the median) and `ids`, row by row. Row r is the prompt with r in place of its last id."""

    def logits(self, row: int, answer: list[int], of: list[int]) -> Reply:
        """`values` of the logits of some ids after that row's prompt and answer, and the `spread` of all logits."""

    def prepare(self, folder: str, repeats: int) -> Reply:
        """`seconds` (the median) from the opened picture to the tower's input, and the `digest` of its pixels."""


def picture() -> Image.Image:
    """A smooth picture with some noise."""
    width, height = PICTURE_SIZE
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(np.clip(smooth + random.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8))


def digest(pixels: np.ndarray) -> str:
    """Of float32 pixels (tiles, 3, H, W): equal digests mean equal bits."""
    assert pixels.dtype == np.float32
    return f"{'x'.join(map(str, pixels.shape))}:{hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()}"
