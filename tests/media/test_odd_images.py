"""Odd, broken and hostile files: each one opens, or is refused with one MediaError, and fast."""

import io
import random
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsin.errors import MediaError
from opsin.media.image import Picture, image_size, open_image

MODES = ("reference", "display")


def open_or_refuse(source: Path | bytes, mode: str) -> Picture | None:
    """The picture, or None when it is refused properly. Anything but a MediaError, or any warning, is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            picture = open_image(source, mode=mode)
        except MediaError as error:
            picture, message = None, str(error)
    if picture is None:
        # One line, no address of memory, no name of a Pillow class.
        assert not re.search(r"\n|\b0x[0-9a-f]{6,}|BytesIO|PIL\.|Traceback", message), message
        return None
    assert picture.pixels.mode == "RGB"
    assert image_size(source, mode=mode) == picture.size
    return picture


def test_every_odd_file_opens_or_is_refused_cleanly(shared: Path) -> None:
    files = sorted(path for path in (shared / "data" / "odd_images").glob("*/*") if path.is_file())
    if not files:
        pytest.skip(f"{shared / 'data' / 'odd_images'} holds no files")
    opened, slowest = 0, 0.0
    for path in files:
        for mode in MODES:
            start = time.process_time()
            opened += open_or_refuse(path, mode) is not None
            slowest = max(slowest, time.process_time() - start)
    assert opened > len(files)  # in two modes: more than half of them open
    assert slowest < 1, f"slowest took {slowest:.2f} s"


def test_the_eight_orientations_of_one_photo_look_alike_in_display(shared: Path) -> None:
    folder = shared / "data" / "odd_images" / "exif_orientation"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    for kind in ("Landscape", "Portrait"):
        pictures = [open_image(folder / f"{kind}_{n}.jpg", mode="display") for n in range(1, 9)]
        first = np.asarray(pictures[0].pixels, np.float32)
        for picture in pictures[1:]:
            assert picture.size == pictures[0].size
            # The photos carry their number in large print; apart from it and from JPEG's losses they are equal.
            assert np.abs(np.asarray(picture.pixels, np.float32) - first).mean() < 12


def _seeds() -> list[bytes]:
    """Small pictures of every format and of several modes."""
    levels = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    smooth = Image.fromarray(levels).resize((64, 48), Image.Resampling.BICUBIC)
    frames = [smooth.rotate(angle).convert("RGB") for angle in (0, 90)]
    made: list[tuple[Image.Image, str, dict[str, object]]] = [
        (smooth.convert("RGB"), "PNG", {}),
        (smooth, "PNG", {}),
        (smooth.convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(levels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (smooth.convert("RGB"), "JPEG", {}),
        (smooth.convert("RGB"), "JPEG", {"progressive": True}),
        (smooth.convert("CMYK"), "JPEG", {}),
        (smooth, "WEBP", {"lossless": True}),
        (frames[0], "WEBP", {"save_all": True, "append_images": frames[1:]}),
        (frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        (smooth.convert("RGB"), "BMP", {}),
        (smooth.convert("RGB"), "TIFF", {"compression": "tiff_lzw"}),
        (smooth.convert("L"), "TIFF", {}),
    ]
    seeds = []
    for image, format_name, options in made:
        buffer = io.BytesIO()
        image.save(buffer, format_name, **options)
        seeds.append(buffer.getvalue())
    return seeds


def _mutations(seeds: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Flipped, cut, doubled, spliced and overwritten bytes, most of them near the header."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            place = min(int(rng.expovariate(1 / 60)), len(data) - 1) if rng.random() < 0.7 else rng.randrange(len(data))
            match rng.randrange(6):
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    data[place : place + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
                case 2:
                    del data[place : place + rng.randrange(1, 40)]
                case 3:
                    data[place:place] = data[place : place + rng.randrange(1, 40)]
                case 4:
                    other = rng.choice(seeds)
                    cut = rng.randrange(len(other))
                    data[place : place + 30] = other[cut : cut + 30]
                case 5:
                    del data[max(place, 8) :]
            if not data:
                data = bytearray(b"\0")
        yield bytes(data)


def _fuzz(seeds: list[bytes], count: int, seed: int) -> tuple[int, float]:
    """Opens mutants in both modes; returns how many opened and the 99th percentile of the time in seconds."""
    opened, times = 0, []
    for data in _mutations(seeds, count, seed):
        for mode in MODES:
            start = time.process_time()
            opened += open_or_refuse(data, mode) is not None
            times.append(time.process_time() - start)
    return opened, sorted(times)[int(len(times) * 0.99)]


def test_mutated_pictures_open_or_are_refused_cleanly() -> None:
    opened, slow = _fuzz(_seeds(), 2000, seed=1)
    assert 400 < opened < 3600  # the mutations neither break all nor nothing
    assert slow < 0.1


@pytest.mark.slow
def test_many_mutations_of_odd_files_open_or_are_refused_cleanly(shared: Path) -> None:
    files = sorted((shared / "data" / "odd_images").glob("*/*"))
    seeds = [path.read_bytes() for path in files if path.stat().st_size < 20_000]
    opened, slow = _fuzz(_seeds() + seeds, 50_000, seed=2)
    assert opened > 1000
    assert slow < 0.1
