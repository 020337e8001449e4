"""opsin against a plain training loop around transformers' model, on the same weights and samples.

    python benchmarks/training.py                   # about 25 minutes on two quiet cores
    python benchmarks/training.py --quick           # two minutes: float32, two rounds, no memory
    python benchmarks/training.py --update-docs     # also rewrites the table in docs/benchmarks.md

A LLaVA-1.5 in small (39 M parameters: tower 6 x 384, decoder 8 x 512, 8,192 ids; 64 tokens a picture). Both libraries
take turns, one optimizer step of 16 conversations each; the ratio is taken inside each round. *equal*: 256 tokens each;
*skewed*: lognormal texts, as in instruction data. *stage 1* trains the connector, *stage 2* connector and decoder.

transformers runs as in its users' loops: eight conversations a pass, in the order in which they come, padded to the
longest, sdpa attention, the loss of all taught tokens of the step, fused AdamW, gradients clipped at 1. opsin is used
as its users use it: `StageLoop`, passes of at most 2,048 tokens, everything checked and counted. Before anything is
timed, the losses of the first step must agree.

Peak memory is of a process of its own per library, after two steps. *loss* is that of the last layer alone at Qwen2's
vocabulary (151,936 ids, 1,536 wide): logits, cross-entropy and gradients, above weights and inputs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from report import peak_bytes, table, update_docs

from opsin import weights
from opsin.collate import pad
from opsin.data.order import permutation
from opsin.encode import Encoded
from opsin.families import preset
from opsin.media.prepare import PreparedImage
from opsin.spec.connector import MLPConnector
from opsin.spec.decoder import DecoderConfig
from opsin.spec.model import VLMConfig
from opsin.spec.recipe import Stage
from opsin.spec.resolution import Pad
from opsin.spec.vision import VisionConfig
from opsin.train.loop import StageLoop
from opsin.train.objectives import linear_cross_entropy, next_token
from opsin.train.prepare import prepare_stage
from opsin.weights import Model

SAMPLES, PER_PASS, PASS_TOKENS = 16, 8, 2048
"""Conversations per optimizer step; per pass of transformers; tokens per pass of opsin."""
STAGES = {"stage 1": ("connector",), "stage 2": ("connector", "decoder")}
HEAD = (151_936, 1_536)
LOSS_TOKENS = (1_024, 2_048, 4_096)


def config() -> VLMConfig:
    """The model's description."""
    return VLMConfig(
        vision=VisionConfig(image_size=112, patch_size=14, dim=384, num_layers=6, num_heads=6, mlp_dim=1536),
        connector=MLPConnector(),
        decoder=DecoderConfig(vocab_size=8192, dim=512, num_layers=8, num_heads=8, num_kv_heads=4, mlp_dim=1408),
        resolution=Pad(tile_size=112),
        chat=preset("llava-1.5-7b-hf").config.chat,
        image_token_id=8191,
    )


class Conversations:
    """A source of samples that are encoded already: a picture, a question, an answer of 60 % of the text."""

    def __init__(self, lengths: str, count: int) -> None:
        self.random = np.random.default_rng(0)
        if lengths == "equal":
            self.texts = [192] * count
        else:  # mean 146, a few of them past 500
            self.texts = [int(n) for n in self.random.lognormal(4.7, 0.75, count).clip(16, 580)]
        self.model = config()
        self.plan = self.model.plan((112, 112))

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, index: int, epoch: int) -> Encoded:
        """Sample `index`, the same every time."""
        random, text, slots = np.random.default_rng(index), self.texts[index], self.plan.num_slots
        length = slots + text
        ids = np.concatenate([np.full(slots, 8191), random.integers(3, 8000, text)])
        patches = random.standard_normal((64, 588), dtype=np.float32)
        return Encoded(
            ids=ids,
            supervised=np.arange(length) >= length - int(0.6 * text),
            positions=np.arange(length)[:, None],
            slots=np.arange(slots),
            slot_rows=self.plan.layout.order.astype(np.int64),
            images=(PreparedImage(patches, np.array([[1, 8, 8]]), self.plan, "picture"),),
            token_spans=np.zeros(length, np.int64),
            spans=(),
            name=str(index),
        )


def ours(
    folder: Path, lengths: str, stage: str, precision: str, steps: int, *, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """One optimizer step of opsin after the other: its log rows."""
    model = weights.load(folder)
    spec = Stage.parse(
        {
            "name": "bench",
            "trainable": STAGES[stage],
            "batch": {"samples": SAMPLES, "micro_tokens": PASS_TOKENS},
            "optim": {"kind": "adamw", "lr": 1e-4},
            "schedule": {"kind": "constant", "warmup_ratio": 0},
            "steps": steps,
        },
        where="benchmark",
    )
    source = Conversations(lengths, SAMPLES * steps)
    prepared = prepare_stage(spec, module=model.vlm, model=model.config, tokenizer=None, seed=0, source=source)
    loop = StageLoop(
        model.vlm,
        prepared.feed,
        trainable=prepared.trainable,
        objective=next_token,
        precision=precision,  # type: ignore[arg-type]
        workers=1,
        compiled=compiled,
    )
    for row in loop.rows():
        yield dict(row)


def theirs(
    folder: Path, lengths: str, stage: str, precision: str, steps: int, *, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """The same by a plain loop, on the same samples in the same order."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").train()
    source = Conversations(lengths, SAMPLES * steps)
    names = {"connector": "multi_modal_projector.", "decoder": ("language_model.", "lm_head.")}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.removeprefix("model.").startswith(names[part]) for part in STAGES[stage]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    order = permutation(len(source), 0, "bench", "order", 0)  # opsin's
    for step in range(steps):
        samples = [source.sample(index, 0) for index in order[step * SAMPLES : (step + 1) * SAMPLES]]
        start, total = time.perf_counter(), 0.0
        taught = sum(sample.num_supervised for sample in samples)
        for first in range(0, SAMPLES, PER_PASS):
            batch = pad(samples[first : first + PER_PASS])
            mask = torch.zeros_like(batch.ids)
            for row, begin, stop in batch.documents:
                mask[row, begin:stop] = 1
            pixels = batch.patches.view(-1, 8, 8, 3, 14, 14).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 112, 112)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = model(
                    input_ids=batch.ids,
                    attention_mask=mask,
                    pixel_values=pixels,
                    labels=batch.ids.masked_fill(~batch.supervised, -100),
                    num_items_in_batch=taught,
                ).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield {"loss": total, "supervised": taught, "seconds": time.perf_counter() - start}


def speed(
    folder: Path, lengths: str, stage: str, precision: str, rounds: int, *, compiled: bool = False
) -> list[list[str]]:
    """Rows of the table: rate and time of waiting. The first step of each library warms up."""
    steps = rounds + 1
    loops = [each(folder, lengths, stage, precision, steps, compiled=compiled) for each in (ours, theirs)]
    pairs = zip(*loops, strict=True)
    rates, ratios, waiting = [], [], []
    for number, (mine, other) in enumerate(pairs):
        if mine["supervised"] != other["supervised"]:
            raise SystemExit("the two loops were given different samples")
        if number == 0 and abs(mine["loss"] - other["loss"]) > (1e-4 if precision == "float32" else 2e-2):
            raise SystemExit(f"losses differ ({mine['loss']} and {other['loss']}), so times mean nothing")
        if number:
            pair = mine["supervised"] / mine["seconds"], other["supervised"] / other["seconds"]
            rates.append(pair)
            ratios.append(pair[0] / pair[1])
            waiting.append(mine["data_seconds"] / mine["seconds"])
    what = f"{lengths}, {stage}" + (", compiled" if compiled else "")
    medians = [f"{statistics.median(column):,.0f}" for column in zip(*rates, strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return [
        [what, precision, "taught tokens per second", *medians, f"{statistics.median(ratios):.2f}", spread],
        [what, precision, "waiting for data", f"{statistics.median(waiting):.1%}", "-", "-", "-"],
    ]


def told(*arguments: str) -> Any:
    """What a worker process reports. (In one process the memory that one pair of loops leaves slows down the next.)"""
    command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def step_memory(folder: Path, lengths: str, stage: str, precision: str) -> list[str]:
    """Row of the peak memory of whole processes."""
    values = [told(library, str(folder), lengths, stage, precision) for library in ("ours", "theirs")]
    return memory_row(f"{lengths}, {stage}", precision, "peak memory", values)


def loss_memory(tokens: int, precision: str, head: str) -> list[str]:
    """Row of the memory of the last layer."""
    values = [told("loss", library, str(tokens), precision, head) for library in ("ours", "theirs")]
    return memory_row(f"loss, head {head}", precision, f"memory at {tokens:,} tokens", values)


def memory_row(what: str, precision: str, phase: str, values: list[float]) -> list[str]:
    """Cells: mebibytes, and theirs over ours."""
    shown = [f"{value / 2**20:,.0f} MiB" for value in values]
    return [what, precision, phase, *shown, f"{values[1] / values[0]:.2f}", "-"]


def worker(kind: str, *arguments: str) -> Any:
    """What a process of its own measures."""
    if kind == "speed":
        folder, lengths, stage, precision, rounds, compiled = arguments
        return speed(Path(folder), lengths, stage, precision, int(rounds), compiled=compiled == "compiled")
    if kind != "loss":
        folder, lengths, stage, precision = arguments
        list((ours if kind == "ours" else theirs)(Path(folder), lengths, stage, precision, 2))
        return peak_bytes()
    library, tokens, precision, head = arguments
    size, dim = HEAD
    layer = torch.nn.Linear(dim, size, bias=False).requires_grad_(head == "trained")
    hidden, targets = torch.randn(int(tokens), dim, requires_grad=True), torch.randint(0, size, (int(tokens),))
    before = peak_bytes()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        if library == "ours":
            loss = linear_cross_entropy(hidden, layer, targets)
        else:  # as transformers' losses do: in float32, whatever the logits are
            loss = F.cross_entropy(layer(hidden).float(), targets, reduction="sum")
    loss.backward()
    return peak_bytes() - before


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"), choices=("float32", "bfloat16"))
    parser.add_argument("--lengths", nargs="+", default=("equal", "skewed"), choices=("equal", "skewed"))
    parser.add_argument("--stages", nargs="+", default=tuple(STAGES), choices=tuple(STAGES))
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--compile", action="store_true", help="both libraries compiled: opsin's blocks, their model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--update-docs", action="store_true")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        print(json.dumps(worker(*given.worker)))
        return
    if given.quick:
        given.rounds, given.dtypes, given.no_memory = 2, ("float32",), True
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        weights.export(folder, Model(weights.build(config(), seed=0), config(), "benchmark"), layout="hf")
        for precision in given.dtypes:
            for lengths in given.lengths:
                for stage in given.stages:
                    print(precision, lengths, stage, file=sys.stderr, flush=True)
                    form = "compiled" if given.compile else "eager"
                    rows += told("speed", str(folder), lengths, stage, precision, str(given.rounds), form)
                    if not given.no_memory:
                        rows.append(step_memory(folder, lengths, stage, precision))
    if not given.no_memory:
        for precision in given.dtypes:
            for head in ("trained", "frozen"):
                for tokens in LOSS_TOKENS:
                    print("loss", precision, head, tokens, file=sys.stderr, flush=True)
                    rows.append(loss_memory(tokens, precision, head))
    text = table("lengths, stage", rows)
    print(text)
    if given.update_docs:
        update_docs("training", text, threads=given.threads)


if __name__ == "__main__":
    main()
