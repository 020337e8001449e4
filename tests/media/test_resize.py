"""Resizing in bands, held to the installed Pillow bit by bit."""

import numpy as np
import pytest
from PIL import Image

from opsin.media import resize as resize_module
from opsin.media.resize import resize


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_bands_on_threads_equal_the_whole_picture(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random sides up to 160 cover both orders of passes; noise shows any other order or filter."""
    monkeypatch.setattr(resize_module, "num_threads", lambda: threads)
    monkeypatch.setattr(resize_module, "MIN_PIXELS", 1)
    random = np.random.default_rng(threads)
    for width, height, new_width, new_height in random.integers(1, 160, (400, 4)).tolist():
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        whole = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        sizes = (width, height), (new_width, new_height)
        assert np.array_equal(resize(image, (new_width, new_height)), whole), sizes


def test_large_pictures_equal_too() -> None:
    random = np.random.default_rng(0)
    for size, new_size in (((1024, 768), (1036, 756)), ((1500, 900), (700, 420)), ((640, 480), (644, 476))):
        image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        assert np.array_equal(resize(image, new_size), image.resize(new_size, Image.Resampling.BICUBIC))


def test_a_pillow_whose_order_is_unknown_resizes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize_module.PIL, "__version__", "99.0")
    monkeypatch.setattr(resize_module, "side_by_side", None)
    assert resize(Image.new("RGB", (600, 600)), (300, 300)).size == (300, 300)
