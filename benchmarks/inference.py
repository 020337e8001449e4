"""opsin against transformers on the same weights: import, load, pictures, prefill, decode, memory, as ratios.

    python benchmarks/inference.py                  # about six minutes on two cores
    python benchmarks/inference.py --quick          # under a minute, small size, float32
    python benchmarks/inference.py --update-docs    # also rewrites the table in docs/benchmarks.md

Two processes, one per library, load the very same files and take turns phase by phase, so that whatever else the
machine does hits both. A ratio is taken inside each round (transformers' time over opsin's: above 1 opsin is faster);
the median over rounds is printed with its range. Before anything is timed, both must give the same greedy ids.

transformers is used at its best: sdpa attention, `logits_to_keep=1`, a bare forward loop on a DynamicCache (quicker
than `generate`). opsin is used as its users use it: `generate`, sampling and stop checks included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import peak_bytes, table, update_docs

LIBRARIES = ("opsin", "transformers")
TEXT_TOKENS = 32
"""Of the prompt, besides the 576 of its picture."""


@dataclass(frozen=True)
class Sizes:
    """A model in LLaVA-1.5's shape."""

    vision: tuple[int, int, int, int]
    """Width, layers, heads, MLP width; 336 px, 14 px patches."""
    decoder: tuple[int, int, int, int]
    vocab_size: int
    new_tokens: int
    rounds: int


SIZES = {
    "tiny": Sizes((64, 3, 4, 128), (96, 2, 4, 192), 512, new_tokens=4, rounds=2),
    "small": Sizes((256, 6, 4, 1024), (512, 8, 8, 1408), 8192, new_tokens=24, rounds=5),
    "medium": Sizes((512, 12, 8, 2048), (1024, 16, 16, 2816), 32064, new_tokens=12, rounds=5),
}


# ---- one worker per library ------------------------------------------------------------------------------------------


def photo(width: int = 1024, height: int = 768) -> Any:
    """A picture of smooth colours and noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    smooth = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = random.integers(-20, 21, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(smooth, np.int16) + noise, 0, 255).astype(np.uint8))


def token_ids(batch: int, vocab_size: int) -> Any:
    """Text tokens of each prompt, the same for both libraries: (batch, TEXT_TOKENS)."""
    import numpy as np

    return np.random.default_rng(1).integers(3, vocab_size - 1, (batch, TEXT_TOKENS))


class Opsin:
    """opsin, as its users use it."""

    def __init__(self, folder: str, dtype: str, new_tokens: int) -> None:
        self.folder, self.dtype, self.new_tokens = folder, dtype, new_tokens

    def load(self) -> None:
        """Map the file: what training and inspection use."""
        from opsin import weights

        self.model = weights.load(self.folder, dtype=self.dtype)

    def ready(self) -> None:
        """Load and lay the weights out for this CPU: what chat uses."""
        from opsin.generate.ready import load_ready

        self.model = load_ready(self.folder, dtype=self.dtype, device="cpu")

    def prepare(self, kind: str) -> Any:
        """Pixels of one picture, by LLaVA-1.5's pad or by LLaVA-NeXT's tiles."""
        from opsin import families
        from opsin.media.image import open_image
        from opsin.media.prepare import prepare

        config = families.preset({"crop": "llava-1.5-7b-hf", "anyres": "llava-next-vicuna-7b-hf"}[kind]).config
        picture = open_image(self.photo, mode="reference")
        return prepare(picture, config.plan(picture.size), config.vision).patches

    def prompts(self, batch: int) -> list[Any]:
        """Encoded prompts: a picture, then text."""
        import numpy as np

        from opsin.encode import Encoded
        from opsin.media.image import open_image
        from opsin.media.prepare import prepare

        config = self.model.config
        picture = open_image(self.photo, mode="reference")
        image = prepare(picture, config.plan(picture.size), config.vision)
        slots = image.plan.num_slots
        prompts = []
        for text in token_ids(batch, config.decoder.vocab_size):
            ids = np.concatenate([np.zeros(slots, np.int64), text])
            prompts.append(
                Encoded(
                    ids=ids,
                    supervised=np.zeros(len(ids), np.bool_),
                    positions=np.arange(len(ids))[:, None],
                    slots=np.arange(slots),
                    slot_rows=image.plan.layout.order.astype(np.int64),
                    images=(image,),
                    token_spans=np.zeros(len(ids), np.int64),
                    spans=(),
                )
            )
        return prompts

    def answer(self, batch: int) -> tuple[list[list[int]], float, float]:
        """Greedy ids, seconds until the first token, seconds per later token."""
        from opsin.generate.decode import generate
        from opsin.generate.sampling import Sampling

        sampling = Sampling(max_new_tokens=self.new_tokens, temperature=0.0)
        answers = generate(self.model.vlm, self.prompts(batch), None, sampling)
        step = max(answer.decode_seconds for answer in answers) / (self.new_tokens - 1)
        return [list(answer.ids) for answer in answers], answers[0].prefill_seconds, step


class Transformers:
    """transformers at its best."""

    def __init__(self, folder: str, dtype: str, new_tokens: int) -> None:
        self.folder, self.dtype, self.new_tokens = folder, dtype, new_tokens

    def load(self) -> None:
        """from_pretrained of the model's own class."""
        import torch
        from transformers import LlavaForConditionalGeneration

        self.model = LlavaForConditionalGeneration.from_pretrained(
            self.folder, dtype=getattr(torch, self.dtype), attn_implementation="sdpa"
        ).eval()

    def prepare(self, kind: str) -> Any:
        """Pixels by the Pillow-backed processors."""
        processor = self.processor(kind)
        return processor(self.photo, return_tensors="np")["pixel_values"]

    def processor(self, kind: str) -> Any:
        """Made once, as users make it."""
        if kind not in self.__dict__.setdefault("processors", {}):
            if kind == "crop":
                from transformers import CLIPImageProcessorPil

                self.processors[kind] = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
            else:
                from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

                self.processors[kind] = LlavaNextImageProcessorPil(
                    size={"shortest_edge": 336},
                    crop_size=336,
                    image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
                )
        return self.processors[kind]

    def answer(self, batch: int) -> tuple[list[list[int]], float, float]:
        """Greedy ids, seconds until the first token, seconds per later token."""
        import torch
        from transformers import DynamicCache

        config = self.model.config
        pixels = torch.from_numpy(self.prepare("crop")).to(getattr(torch, self.dtype)).repeat(batch, 1, 1, 1)
        text = torch.from_numpy(token_ids(batch, config.text_config.vocab_size))
        image = torch.full((batch, 576), config.image_token_id)
        ids = torch.cat([image, text], dim=1)
        with torch.inference_mode():
            start = time.perf_counter()
            cache = DynamicCache()
            logits = self.model(input_ids=ids, pixel_values=pixels, past_key_values=cache, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            prefill = time.perf_counter() - start
            tokens = [token]
            start = time.perf_counter()
            for _ in range(self.new_tokens - 1):
                logits = self.model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(token)
            step = (time.perf_counter() - start) / (self.new_tokens - 1)
        return torch.cat(tokens, dim=1).tolist(), prefill, step


def worker(library: str, folder: str, dtype: str, new_tokens: int, threads: int) -> None:
    """Answer requests on standard input, one JSON line each, until it closes."""
    import torch

    torch.set_num_threads(threads)
    subject: Any = (Opsin if library == "opsin" else Transformers)(folder, dtype, new_tokens)
    subject.photo = photo()
    for line in sys.stdin:
        request = json.loads(line)
        phase = request["phase"]
        start = time.perf_counter()
        reply: dict[str, Any] = {}
        if phase in ("load", "ready"):
            getattr(subject, phase)()
            reply["seconds"] = time.perf_counter() - start
        elif phase == "prepare":
            for _ in range(request["repeat"]):
                subject.prepare(request["kind"])
            reply["seconds"] = (time.perf_counter() - start) / request["repeat"]
        elif phase == "answer":
            reply["ids"], reply["prefill"], reply["step"] = subject.answer(request["batch"])
        reply["peak_bytes"] = peak_bytes()
        print(json.dumps(reply), flush=True)


# ---- the parent ------------------------------------------------------------------------------------------------------


class Pair:
    """Both workers of one size and dtype."""

    def __init__(self, folder: str, dtype: str, new_tokens: int, threads: int) -> None:
        self.processes = {
            library: subprocess.Popen(
                [sys.executable, __file__, "--worker", library, folder, dtype, str(new_tokens), str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for library in LIBRARIES
        }

    def ask(self, library: str, **request: Any) -> dict[str, Any]:
        """One request to one worker."""
        process = self.processes[library]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the {library} worker stopped; its error stands above")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def both(self, **request: Any) -> dict[str, dict[str, Any]]:
        """The same request to both, one after the other."""
        return {library: self.ask(library, **request) for library in LIBRARIES}

    def close(self) -> None:
        """End both."""
        for process in self.processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


@dataclass
class Measured:
    """One row of the table."""

    size: str
    dtype: str
    phase: str
    unit: str
    opsin: list[float]
    transformers: list[float]

    @property
    def ratios(self) -> list[float]:
        """transformers over opsin, round by round."""
        return [theirs / ours for ours, theirs in zip(self.opsin, self.transformers, strict=False)]

    def cells(self) -> list[str]:
        """Text of the row."""
        if not self.transformers:
            return [
                self.size,
                self.dtype,
                self.phase,
                f"{statistics.median(self.opsin):,.4g} {self.unit}",
                "-",
                "-",
                "-",
            ]
        ratios = self.ratios
        return [
            self.size,
            self.dtype,
            self.phase,
            f"{statistics.median(self.opsin):,.4g} {self.unit}",
            f"{statistics.median(self.transformers):,.4g} {self.unit}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        ]


def write_model(folder: Path, sizes: Sizes, dtype: str) -> None:
    """Random weights in the published -hf layout, written once for both."""
    import torch

    from opsin import families, weights
    from opsin.spec.decoder import DecoderConfig
    from opsin.spec.vision import VisionConfig

    width, layers, heads, mlp = sizes.vision
    dim, decoder_layers, decoder_heads, decoder_mlp = sizes.decoder
    config = families.preset("llava-1.5-7b-hf").config.replace(
        vision=VisionConfig(image_size=336, patch_size=14, dim=width, num_layers=layers, num_heads=heads, mlp_dim=mlp),
        decoder=DecoderConfig(
            vocab_size=sizes.vocab_size,
            dim=dim,
            num_layers=decoder_layers,
            num_heads=decoder_heads,
            num_kv_heads=decoder_heads,
            mlp_dim=decoder_mlp,
        ),
        image_token_id=sizes.vocab_size - 1,
    )
    vlm = weights.build(config, seed=0)
    with torch.no_grad():  # wider logits than the usual start gives, so that greedy choice is clear in half precision
        vlm.decoder.head.weight.mul_(20)
    vlm.to(getattr(torch, dtype))
    weights.export(folder, weights.Model(vlm=vlm, config=config, name="random", tokenizer_folder=None), layout="hf")


def time_import(library: str) -> float:
    """Seconds of a fresh process until the library could load a model, less those of importing torch alone."""
    code = {
        "opsin": "import opsin.generate.ready, opsin.generate.decode, opsin.encode",
        "transformers": "from transformers import LlavaForConditionalGeneration, DynamicCache, CLIPImageProcessorPil",
    }[library]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def measure(size: str, dtype: str, folder: Path, threads: int, say: Callable[[str], None]) -> list[Measured]:
    """All phases of one size and dtype."""
    sizes = SIZES[size]
    rows: dict[str, Measured] = {}

    def note(phase: str, unit: str, values: dict[str, float], scale: float = 1.0) -> None:
        row = rows.setdefault(phase, Measured(size, dtype, phase, unit, [], []))
        row.opsin.append(values["opsin"] * scale)
        row.transformers.append(values["transformers"] * scale)

    pair = Pair(str(folder), dtype, sizes.new_tokens, threads)
    try:
        pair.both(phase="load")  # not counted: page cache and lazy imports
        for number in range(sizes.rounds):
            note("load", "ms", {k: v["seconds"] for k, v in pair.both(phase="load").items()}, 1e3)
            packed = pair.ask("opsin", phase="ready")["seconds"] * 1e3 - rows["load"].opsin[-1]
            layout = "lay out for the CPU, once"
            rows.setdefault(layout, Measured(size, dtype, layout, "ms", [], [])).opsin.append(max(packed, 0.0))
            for batch in (1, 8):
                if number == 0:
                    warm = pair.both(phase="answer", batch=batch)
                    same = warm["opsin"]["ids"] == warm["transformers"]["ids"]
                    if dtype == "float32" and not same:
                        raise SystemExit(f"{size} {dtype} batch {batch}: greedy ids differ, so times mean nothing")
                    say(f"{size} {dtype} batch {batch}: greedy ids {'equal' if same else 'differ (half precision)'}")
                replies = pair.both(phase="answer", batch=batch)
                note(f"vision + prefill, batch {batch}", "ms", {k: v["prefill"] for k, v in replies.items()}, 1e3)
                note(f"decode step, batch {batch}", "ms", {k: v["step"] for k, v in replies.items()}, 1e3)
        note("peak memory", "MiB", {k: v["peak_bytes"] for k, v in replies.items()}, 2**-20)
    finally:
        pair.close()
    return list(rows.values())


def measure_pictures(rounds: int, folder: Path, threads: int) -> list[Measured]:
    """Preparing a 1024x768 picture; pixels are asserted equal first."""
    check_pixels()
    pair = Pair(str(folder), "float32", 2, threads)
    rows = []
    try:
        for kind, name in (("crop", "picture, LLaVA-1.5 -hf"), ("anyres", "picture, LLaVA-NeXT -hf")):
            row = Measured("1024x768", "", name, "ms", [], [])
            pair.both(phase="prepare", kind=kind, repeat=2)
            for _ in range(3 * rounds):
                replies = pair.both(phase="prepare", kind=kind, repeat=4)
                row.opsin.append(replies["opsin"]["seconds"] * 1e3)
                row.transformers.append(replies["transformers"]["seconds"] * 1e3)
            rows.append(row)
    finally:
        pair.close()
    return rows


def check_pixels() -> None:
    """Both libraries make the same numbers of the same picture."""
    import numpy as np

    ours, theirs = Opsin("", "", 0), Transformers("", "", 0)
    ours.photo = theirs.photo = photo()
    for kind in ("crop", "anyres"):
        tiles = np.asarray(theirs.prepare(kind)).reshape(-1, 3, 24, 14, 24, 14)
        patches = tiles.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 3 * 14 * 14)
        np.testing.assert_array_equal(ours.prepare(kind), patches)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small size, float32, two rounds")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="which sizes")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--update-docs", action="store_true")
    given = parser.parse_args()
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise SystemExit(
            "this benchmark compares with transformers, which is not installed: pip install -e '.[dev]'"
        ) from None

    names = given.sizes or (["small"] if given.quick else ["small", "medium"])
    dtypes = given.dtypes or (["float32"] if given.quick else ["float32", "bfloat16"])
    rounds = given.rounds or (2 if given.quick else 0)
    if rounds:
        SIZES.update({name: Sizes(**{**vars(SIZES[name]), "rounds": rounds}) for name in names})

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rows: list[Measured] = []
    imports = Measured("", "", "import", "s", [], [])
    for _ in range(1 + (rounds or 3)):
        imports.opsin.append(time_import("opsin"))
        imports.transformers.append(time_import("transformers"))
    imports.opsin, imports.transformers = imports.opsin[1:], imports.transformers[1:]
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            for dtype in dtypes:
                folder = Path(temporary) / f"{name}-{dtype}"
                write_model(folder, SIZES[name], dtype)
                if not rows:
                    rows = [imports, *measure_pictures(rounds or 5, folder, given.threads)]
                rows += measure(name, dtype, folder, given.threads, say)
    text = table("size", [row.cells() for row in rows])
    print(json.dumps([vars(row) | {"ratios": row.ratios} for row in rows], indent=1) if given.json else text)
    if given.update_docs:
        update_docs("inference", text, threads=given.threads)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
