"""Pixels resized and normalised by torch, several times faster than by Pillow and numpy (`media.prepare.Kernels`).

For the frames of a video `Pixels("torch")` gives the reference numbers: the authors' code resizes frames with torch.
For pictures, which it resizes with Pillow, `Pixels("pillow")` comes close: see `FAST_ERROR`.
"""

from typing import Literal

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from opsin.spec.resample import begins_with_columns

Floats = NDArray[np.float32]

FAST_ERROR = "at most 2 of 255 levels away from Pillow, fewer than 1 value in 100 at all"
"""Measured for `Pixels("pillow")` in tests/nn/test_pixels.py over sizes, photographs and noise. Torch keeps the weights
of the filter in 16 bits, Pillow in 22."""


class Pixels:
    """Bicubic resizing with antialiasing and normalising, on a CPU."""

    def __init__(self, order: Literal["torch", "pillow"]) -> None:
        """order: of the two passes. `torch`: always along lines first. `pillow`: as the installed Pillow does it."""
        self._pillow = int(PIL.__version__.split(".")[0]) if order == "pillow" else 0

    def resize(self, levels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        """(H, W, C) to (height, width, C), of 3 or 4 channels. size: (width, height)."""
        height, width = levels.shape[:2]
        if begins_with_columns((width, height), size, pillow=self._pillow):
            levels = _resize(levels, (width, size[1]))
        return _resize(levels, size)

    def normalise(self, levels: NDArray[np.uint8], mean: Floats, std: Floats, out: Floats) -> None:
        """Write (levels / 255 - mean) / std to `out` as one product and one sum: the last bit may differ from the exact
        order. levels: (P, 3, 1, p * p)   mean, std: (3,)   out: (P, 3, frames, p * p). Computing two equal frames in
        one pass is faster than copying the first.
        """
        # Written out for each pixel of a patch, which torch's loops are faster with.
        each = (value.repeat(levels.shape[-1]).reshape(3, 1, -1) for value in (-mean / std, 1 / (255 * std)))
        shift, factor, target = (torch.from_numpy(values) for values in (*each, out))
        values = torch.from_numpy(levels).float()
        torch.addcmul(shift, values.expand(target.shape), factor, out=target)


def _resize(levels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    width, height = size
    if levels.shape[:2] == (height, width):
        return levels
    # Channels innermost in memory: torch's kernel for that order is more than twice as fast as for planes, and is found
    # by the strides, those of the batch axis included.
    writable = levels if levels.flags.writeable else levels.copy()  # torch warns of memory that is not
    pixels = torch.from_numpy(writable)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()
