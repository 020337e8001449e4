"""Pixels by torch: how far from Pillow, and the same numbers as the reference for frames."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import toys
from opsin.nn.pixels import FAST_ERROR, Pixels


@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_the_fast_way_stays_as_close_to_pillow_as_it_says(kind: str) -> None:
    """Sizes that shrink, grow, and do one each way; Pillow may take either order of its two passes."""
    assert FAST_ERROR.startswith("at most 2 of 255 levels away from Pillow, fewer than 1 value in 100")
    random, fast = np.random.default_rng(0), Pixels("pillow")
    different = total = 0
    for number in range(60):
        width, height, new_width, new_height = (int(side) for side in np.exp(random.uniform(3.4, 5.8, 4)))
        if number % 2:
            new_width, new_height = (max(28, round(side / 28) * 28) for side in (width, height))
        if kind == "smooth":
            picture = toys.picture((width, height), number)
        else:
            picture = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exact = np.asarray(picture.resize((new_width, new_height), Image.Resampling.BICUBIC)).astype(int)
        ours = fast.resize(np.array(picture), (new_width, new_height))
        assert ours.shape == exact.shape
        assert np.abs(ours - exact).max() <= 2, (picture.size, (new_width, new_height))
        different += np.count_nonzero(ours - exact)
        total += exact.size
    assert different < 0.01 * total


def test_frames_are_resized_as_torch_does_it_plane_by_plane() -> None:
    """Another order of memory, the same numbers as the authors' call."""
    frame = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    planes = torch.from_numpy(frame).permute(2, 0, 1).contiguous()[None]
    for size in ((84, 56), (120, 40)):
        theirs = F.interpolate(planes, size[::-1], mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        assert np.array_equal(Pixels("torch").resize(frame, size), theirs.numpy())


def test_a_picture_that_has_its_size_already_stays_as_it_is() -> None:
    levels = np.zeros((28, 56, 3), np.uint8)
    assert Pixels("pillow").resize(levels, (56, 28)) is levels


def test_normalising_differs_from_the_exact_order_by_rounding_alone() -> None:
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (1, 3, 1, 256)).copy()
    mean, std = np.array([0.48, 0.46, 0.41], np.float32), np.array([0.27, 0.26, 0.28], np.float32)
    exact = (levels / np.float32(255) - mean[:, None, None]) / std[:, None, None]
    ours = np.empty((1, 3, 2, 256), np.float32)
    Pixels("torch").normalise(levels, mean, std, ours)
    assert np.array_equal(ours[:, :, 0], ours[:, :, 1])
    assert np.abs(ours - exact).max() < 5e-7
