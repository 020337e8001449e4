"""opsin against transformers, family by family: picture, vision, prefill and decode, as ratios.

    python benchmarks/families.py                  # a few minutes on two cores
    python benchmarks/families.py --update-docs    # also rewrites the table in docs/benchmarks.md

Each family keeps the geometry of a published preset (pixels, patches, tokens) and gets a tower of 6 x 256 and a
language model of 8 x 512, random, written once in the layout of transformers and read by both. Both libraries take
turns in one process, each of them first in every second round; a ratio is taken inside each round (transformers' time
over opsin's: above 1 opsin is faster), and its median and range are printed. Greedy ids must be equal before anything
is timed. The picture is 1024x768.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from inference import photo
from report import table, update_docs

from opsin import families, weights
from opsin.generate.decode import generate
from opsin.generate.ready import load_ready
from opsin.generate.sampling import Sampling
from opsin.media.image import open_image
from opsin.media.prepare import prepare
from opsin.spec.model import VLMConfig
from opsin.spec.qformer import QFormerConfig
from opsin.verify import ours, theirs

PRESETS = ("llava-1.5-7b-hf", "llava-next-vicuna-7b-hf", "blip2-opt-2.7b", "internvl-1.5-2b", "qwen2-vl-2b-instruct")
VOCABULARY, NEW_TOKENS = 8192, 17
Result = TypeVar("Result")


def small(config: VLMConfig) -> VLMConfig:
    """The same geometry, with few and narrow layers."""
    vision = config.vision.replace(dim=256, num_layers=6, num_heads=4, mlp_dim=1024)
    rope = config.decoder.rope
    if rope is not None and rope.sections is not None:
        rope = rope.replace(sections=(8, 12, 12))  # of a head of 64, in the proportions of the published 128
    decoder = config.decoder.replace(
        vocab_size=VOCABULARY, dim=512, num_layers=8, num_heads=8, num_kv_heads=8, mlp_dim=1408, rope=rope
    )
    connector = config.connector
    if isinstance(connector, QFormerConfig):
        connector = connector.replace(dim=256, num_layers=6, num_heads=4, mlp_dim=1024)
    ids = {"image_token_id": VOCABULARY - 1}
    if config.video_token_id is not None:
        ids["video_token_id"] = VOCABULARY - 2
    return config.replace(vision=vision, decoder=decoder, connector=connector, **ids)


class Family:
    """One family in both libraries."""

    def __init__(self, preset: str, folder: Path, dtype: torch.dtype) -> None:
        config = small(families.preset(preset).config)
        vlm = weights.build(config, seed=0)
        with torch.no_grad():  # wider logits than the usual start gives, so that greedy choice is clear
            vlm.decoder.embed.weight.mul_(20)
            if vlm.decoder.head is not None:
                vlm.decoder.head.weight.mul_(20)
        weights.export(folder, weights.Model(vlm=vlm.to(dtype), config=config, name=preset), layout="hf")
        self.dtype = dtype
        self.model = load_ready(folder, device="cpu")
        self.config, self.vlm = self.model.config, self.model.vlm
        transformers = theirs.load_transformers()
        name = theirs.class_name(folder)
        self.points = theirs.CLASSES[name]
        self.other = getattr(transformers, name).from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.cache = transformers.DynamicCache
        self.photo = photo()
        self.picture = open_image(self.photo, mode="reference")
        self.image = prepare(self.picture, self.config.plan(self.picture.size), self.config.vision)
        self.sample = ours.given_ids(self.config, self.image)
        self.patches = torch.from_numpy(self.image.patches).to(dtype)
        self.grids = torch.from_numpy(self.image.grids)
        ids = torch.from_numpy(self.sample.ids)[None]
        given = self.points.inputs(self.image, theirs.to_tiles(self.image, self.config.vision), ids)
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"][:, self.sample.slots] = 1
        self.inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        self.ids = ids

    def our_picture(self) -> None:
        """Open and prepare."""
        picture = open_image(self.photo, mode="reference")
        prepare(picture, self.config.plan(picture.size), self.config.vision)

    def their_picture(self) -> None:
        """The Pillow-backed processor."""
        self.processor(images=self.photo, return_tensors="np")

    def our_vision(self) -> None:
        """Tower and connector."""
        with torch.inference_mode():
            self.vlm.rows(self.patches, self.grids)

    def their_vision(self) -> None:
        """Tower and connector, as the class itself calls them."""
        with torch.inference_mode():
            given = {key: value for key, value in self.inputs.items() if key != "mm_token_type_ids"}
            self.other.get_image_features(**given)

    def our_answer(self) -> tuple[list[int], float, float]:
        """Greedy ids, seconds of vision and prefill, seconds of a later token."""
        sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
        answer = generate(self.vlm, [self.sample], None, sampling)[0]
        return list(answer.ids), answer.prefill_seconds, answer.decode_seconds / (NEW_TOKENS - 1)

    @torch.inference_mode()
    def their_answer(self) -> tuple[list[int], float, float]:
        """The same by a bare forward loop, which is quicker than its `generate`."""
        start = time.perf_counter()
        cache = self.cache()
        more = {"logits_to_keep": 1} if self.points.language != "language_model" else {}
        out = self.other(input_ids=self.ids, past_key_values=cache, use_cache=True, **self.inputs, **more)
        past = cache
        if self.points.language == "language_model":  # BLIP-2 hands the language model's output through
            past = out.language_model_outputs.past_key_values
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefill, tokens = time.perf_counter() - start, [int(token)]
        step = self.other.language_model if not more else self.other
        start = time.perf_counter()
        for _ in range(NEW_TOKENS - 1):
            out = step(input_ids=token, past_key_values=past, use_cache=True, **more)
            past = out.past_key_values
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))
        return tokens, prefill, (time.perf_counter() - start) / (NEW_TOKENS - 1)


def seconds(action: Callable[[], Any]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(number: int, mine: Callable[[], Result], other: Callable[[], Result]) -> tuple[Result, Result]:
    """What both give; in odd rounds the other goes first, for what ran before has a say in how long a call takes."""
    if number % 2:
        theirs = other()
        return mine(), theirs
    return mine(), other()


def measure(preset: str, folder: Path, dtype: torch.dtype, rounds: int) -> list[list[str]]:
    """Rows of the table."""
    family = Family(preset, folder, dtype)
    mine, other = family.our_answer()[0], family.their_answer()[0]
    if dtype == torch.float32 and mine != other:
        raise SystemExit(f"{preset}: greedy ids differ ({mine} and {other}), so times mean nothing")
    pairs: dict[str, list[tuple[float, float]]] = {}
    for number in range(rounds + 1):
        row = {
            "picture": in_turn(number, partial(seconds, family.our_picture), partial(seconds, family.their_picture)),
            "vision": in_turn(number, partial(seconds, family.our_vision), partial(seconds, family.their_vision)),
        }
        answers = in_turn(number, family.our_answer, family.their_answer)
        (_, prefill, step), (_, their_prefill, their_step) = answers
        row |= {"vision + prefill": (prefill, their_prefill), "decode step": (step, their_step)}
        if number:  # the first warms up
            for phase, pair in row.items():
                pairs.setdefault(phase, []).append(pair)
    return [cells(preset, str(dtype).removeprefix("torch."), phase, values) for phase, values in pairs.items()]


def cells(preset: str, dtype: str, phase: str, values: list[tuple[float, float]]) -> list[str]:
    """Text of one row."""
    ratios = [other / mine for mine, other in values]
    times = [f"{1e3 * statistics.median(column):,.4g} ms" for column in zip(*values, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [preset, dtype, phase, *times, f"{statistics.median(ratios):.2f}", spread]


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"), choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--update-docs", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for preset in given.presets:
            for dtype in given.dtypes:
                print(preset, dtype, file=sys.stderr, flush=True)
                rows += measure(preset, Path(temporary) / f"{preset}-{dtype}", getattr(torch, dtype), given.rounds)
    text = table("preset", rows)
    print(text)
    if given.update_docs:
        update_docs("families", text, threads=given.threads)


if __name__ == "__main__":
    main()
