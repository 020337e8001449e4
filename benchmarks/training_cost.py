"""Published costs of training beside those that `opsin train --dry-run --on MACHINE` tells: docs/training_cost.md.

    python benchmarks/training_cost.py                  print it
    python benchmarks/training_cost.py --update-docs    put it into the page

No number is fitted: a row takes the stage's published settings, the typical sample of `opsin.train.workload` and the
utilisation of `opsin.spec.machine`.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from opsin.spec.machine import parse_machine
from opsin.spec.recipe import RunConfig
from opsin.train.config import read_run
from opsin.train.estimate import StageEstimate, estimate

DOCS = Path(__file__).parents[1] / "docs/training_cost.md"
BEGIN, END = "<!-- training_cost: begin -->", "<!-- training_cost: end -->"


@dataclass(frozen=True)
class Case:
    """A stage whose cost somebody published."""

    name: str
    machine: str
    hours: float
    """Published, on the whole machine."""
    source: str
    run: str | dict[str, Any]
    """A shipped recipe by name, or what a stage of `INTERNVL_12` has of its own."""
    settings: Sequence[str] = ()
    """Overrides: other sizes and schedules."""
    at_most: bool = False
    """Whether it was published as a bound."""
    checkpointing: bool = True
    """Whether the authors computed blocks again on the way back."""


LLAVA = "README.md of haotian-liu/LLaVA"
A100, A100_40 = "8xA100-80GB", "16xA100-40GB"
LIGHTNING = ("stages.0.data.0.count=80000", "stages.0.epochs=1", "stages.0.batch.samples=128")
XXL = ("model=blip2-flan-t5-xxl", "init.decoder=google/flan-t5-xxl")
INTERNVL_12 = {
    "vision": "internvl-1.5-26b",
    "connector": "internvl-1.5-26b",
    "decoder": "llava-next-34b",
    "resolution": {"kind": "squash", "tile_size": 448},
    "chat": "chatml_direct",
}
"""InternViT-6B and Yi-34B, 256 tokens a picture: no family here, but a mix of parts."""


def _llava(size: str, stage: str, hours: float, source: str, recipe: str, *settings: str) -> Case:
    settings = ("model=llava-llama-2-13b", *settings) if size == "13B" else settings
    return Case(f"LLaVA {size}, {stage}", A100, hours, source, recipe, settings)


def _llava15(size: str, stage: str, hours: float, recipe: str) -> Case:
    return Case(f"LLaVA-1.5 {size}, {stage}", A100, hours, LLAVA, recipe, (f"model=llava-1.5-{size.lower()}",))


def _next(size: str, preset: str, machine: str, hours: float) -> Case:
    settings = (f"model=llava-next-{preset}",)
    return Case(f"LLaVA-NeXT {size}, stage 2", machine, hours, "LLaVA-NeXT, see below", "llava-next/finetune", settings)


def _blip2(name: str, days: int, recipe: str, *settings: str) -> Case:
    source = "arXiv:2301.12597 section 3.4"
    return Case(name, A100_40, 24 * days, source, recipe, settings, at_most=True, checkpointing=False)


CASES = (
    _llava("7B", "stage 1", 2, f"{LLAVA}, v1", "llava/pretrain"),
    _llava("13B", "stage 1", 4, f"{LLAVA}, v1", "llava/pretrain"),
    _llava("13B", "Instruct-158K, 3 epochs", 10, "haotian-liu/LLaVA#229", "llava/finetune"),
    _llava("7B", "Lightning: 80K, 1 epoch", 1, "haotian-liu/LLaVA#229", "llava/finetune", *LIGHTNING),
    _llava("13B", "ScienceQA, 12 epochs", 4, "arXiv:2304.08485", "llava/scienceqa"),
    _llava15("7B", "stage 1", 3.5, "llava-1.5/pretrain"),
    _llava15("13B", "stage 1", 5.5, "llava-1.5/pretrain"),
    _llava15("7B", "stage 2", 10, "llava-1.5/finetune"),
    _llava15("13B", "stage 2", 20, "llava-1.5/finetune"),
    _next("7B", "vicuna-7b", "8xA100-80GB", 20),
    _next("13B", "vicuna-13b", "16xA100-80GB", 24),
    _next("34B", "34b", "32xA100-80GB", 30),
    Case(
        "InternVL-Chat-1.2 40B, stage 2",
        "32xA100-80GB",
        36,
        "blog of InternVL-Chat-V1.2",
        {"data": [{"path": "nowhere.jsonl", "count": 1_267_819}], "max_tokens": 2048, "epochs": 1},
        at_most=True,
    ),
    _blip2("BLIP-2 ViT-g, stage 1", 6, "blip2/stage1"),
    _blip2("BLIP-2 ViT-g and FlanT5-XXL, stage 2", 3, "blip2/stage2-flan-t5", *XXL),
)


def config(case: Case, folder: Path) -> RunConfig:
    """The run of a case. folder: for the description of a model that is no preset."""
    if isinstance(case.run, str):
        return read_run(case.run, case.settings)
    model = folder / "mix.yaml"
    model.write_text(yaml.safe_dump(INTERNVL_12), encoding="utf-8")
    stage = {
        "name": "stage",
        "trainable": ["vision", "connector", "decoder"],
        "batch": {"samples": 512, "micro_tokens": 8192},
        "optim": {"kind": "adamw", "lr": 1e-5},
        **case.run,
    }
    run = {"model": str(model), "output": "out", "precision": "bfloat16", "stages": [stage]}
    return RunConfig.parse(run, where=case.name)


def reckon(case: Case) -> StageEstimate:
    """Our estimate of a case."""
    with TemporaryDirectory() as folder:
        (done,) = estimate(config(case, Path(folder)), case.machine, checkpointing=case.checkpointing)
    return done


def table() -> str:
    """Markdown."""
    lines = [
        "| stage | machine | published | ours | ours by published | utilisation reached | tokens per sample | source |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for case in CASES:
        done, machine = reckon(case), parse_machine(case.machine)
        assert done.seconds is not None
        ours = done.seconds / 3600
        bound, least = ("< ", "> ") if case.at_most else ("", "")
        reached = ours / case.hours * machine.utilisation
        lines.append(
            f"| {case.name} | {machine.name} | {bound}{case.hours:g} h | {ours:.1f} h | {ours / case.hours:.2f} | "
            f"{least}{reached:.2f} | {done.tokens / done.samples:,.0f} | {case.source} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update-docs", action="store_true", help="put the table into docs/training_cost.md")
    text = table()
    print(text)
    if parser.parse_args().update_docs:
        page = DOCS.read_text(encoding="utf-8")
        page, count = re.subn(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL)
        assert count == 1, f"{DOCS} has no place for the table"
        DOCS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
