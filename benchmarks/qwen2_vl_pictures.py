"""Qwen2-VL's pictures prepared by opsin and by transformers, side by side: exact and fast, as ratios.

    python benchmarks/qwen2_vl_pictures.py            # about a minute
    python benchmarks/qwen2_vl_pictures.py --threads 1
    python benchmarks/qwen2_vl_pictures.py --json

For each size the ways take turns, round by round, in a process of its own, from the same decoded picture to the patches
that the model reads. What ran just before has a say in how long a way takes, so each round has an order of its own,
drawn from a seed. (Larger pictures before it as well: they teach the C library to keep memory, of which transformers'
way takes more.) A ratio is taken inside each round (transformers' time over opsin's: above 1 opsin is faster); the
median over rounds is printed. Before anything is timed, `exact` must give transformers' Pillow processor's numbers bit
by bit, and the largest difference of `fast` to them is measured and printed beside its ratio.

`--threads` are torch's; `exact` has up to four of its own for large pictures. Beside other programs `--processor-time`
says more than the clock on the wall: it counts the work of all threads, and no waiting for a core.

The processor that works on tensors needs torchvision; where it cannot be imported, its column is left out and said so.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SIZES = ((1024, 768), (640, 480), (320, 240), (1920, 1080), (448, 448))


def photo(width: int, height: int) -> Any:
    """A picture of smooth colours and noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = random.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(smooth, np.int16) + noise, 0, 255).astype(np.uint8))


def ways(image: Any) -> dict[str, Callable[[], Any]]:
    """Name -> a call that gives the patches of `image`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from opsin import families
    from opsin.media.image import Picture
    from opsin.media.prepare import prepare
    from opsin.nn.pixels import Pixels

    config = families.preset("qwen2-vl-7b-instruct").config
    limits = {"min_pixels": config.resolution.min_pixels, "max_pixels": config.resolution.max_pixels}
    picture, fast = Picture(image, "photo"), Pixels("pillow")
    pillow = Qwen2VLImageProcessorPil(**limits)

    def ours(kernels: Any = None) -> Any:
        return prepare(picture, config.plan(image.size), config.vision, kernels=kernels).patches

    found = {
        "exact": ours,
        "pillow": lambda: pillow(image, return_tensors="np")["pixel_values"],
        "fast": lambda: ours(fast),
    }
    try:
        import torchvision  # noqa: F401
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    except Exception as error:  # a build for another torch fails in its own ways
        print(f"torchvision cannot be imported ({type(error).__name__}): no comparison of fast", file=sys.stderr)
        return found
    tensors = Qwen2VLImageProcessor(**limits)
    return found | {"tensors": lambda: tensors(image, return_tensors="pt")["pixel_values"]}


def compare(size: tuple[int, int], rounds: int, now: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """One row of the table. now: the clock. Raises SystemExit where `exact` is not exact."""
    import numpy as np

    from opsin import families

    calls = ways(photo(*size))
    exact, pillow, fast = (np.asarray(calls[name]()) for name in ("exact", "pillow", "fast"))
    if not np.array_equal(exact, pillow):
        raise SystemExit(f"{size}: the exact way differs from transformers' by {np.abs(exact - pillow).max()}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds + 1):
        shuffle(order)
        for name in order:
            began = now()
            calls[name]()
            seconds[name].append(now() - began)
    timed = {name: values[1:] for name, values in seconds.items()}  # the first round warms up

    def ratio(theirs: str, ours: str) -> float | None:
        if theirs not in timed:
            return None
        return statistics.median(a / b for a, b in zip(timed[theirs], timed[ours], strict=True))

    difference = np.abs(exact - fast).reshape(len(exact), 3, -1)
    levels = difference * 255 * np.array(families.preset("qwen2-vl-7b-instruct").config.vision.std)[:, None]
    return {
        "size": f"{size[0]}x{size[1]}",
        "milliseconds": {name: statistics.median(values) * 1e3 for name, values in timed.items()},
        "exact_over_pillow": ratio("pillow", "exact"),
        "fast_over_tensors": ratio("tensors", "fast"),
        "fast_over_pillow": ratio("pillow", "fast"),
        "fast_largest_error_levels": float(levels.max()),
        "fast_share_of_other_values": float((levels > 0.5).mean()),
    }


def alone(options: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """The row of one size; of several each from a process of its own."""
    if len(options.sizes) > 1:
        given = [
            __file__,
            "--json",
            "--rounds",
            str(options.rounds),
            "--threads",
            str(options.threads),
            "--sizes",
            size,
        ]
        given += ["--processor-time"] * options.processor_time
        done = subprocess.run([sys.executable, *given], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.returncode)
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows
    import torch

    torch.set_num_threads(options.threads)
    width, height = map(int, size.split("x"))
    now = time.process_time if options.processor_time else time.perf_counter
    return [compare((width, height), options.rounds, now)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--sizes", nargs="+", default=[f"{w}x{h}" for w, h in SIZES])
    parser.add_argument("--processor-time", action="store_true", help="in place of the clock on the wall")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for size in options.sizes for row in alone(options, size)]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'picture':>10} {'exact ms':>9} {'x Pillow':>9} {'fast ms':>9} {'x tensors':>10}  error of fast")
    for row in rows:
        other = row["fast_over_tensors"]
        print(
            f"{row['size']:>10} {row['milliseconds']['exact']:9.2f} {row['exact_over_pillow']:9.2f} "
            f"{row['milliseconds']['fast']:9.2f} {'-' if other is None else format(other, '.2f'):>10}  "
            f"at most {row['fast_largest_error_levels']:.1f} of 255 levels, "
            f"{100 * row['fast_share_of_other_values']:.2f} % of values differ"
        )


if __name__ == "__main__":
    main()
