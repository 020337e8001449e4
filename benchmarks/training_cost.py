"""Published costs of training beside what `opsin train --dry-run --on MACHINE` reckons: the table of docs/training_cost.md.

    python benchmarks/training_cost.py                  print it
    python benchmarks/training_cost.py --update-docs    put it into the page

No number is fitted: every row takes the stage's published settings, the typical sample of `opsin.train.workload` and the
utilisation of `opsin.spec.machine`.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    """A shipped recipe by name, or a run written out."""
    settings: Sequence[str] = field(default=())
    """Overrides: other sizes, and published numbers of samples."""
    at_most: bool = False
    """Whether it was published as a bound."""
    checkpointing: bool = True
    """Whether the authors computed blocks again on the way back."""


def _run(model: str | dict[str, Any], **stage: Any) -> dict[str, Any]:
    optim = {"kind": "adamw", "lr": 1e-4}
    data = [{"path": "nowhere.json", "count": stage.pop("count", None)}]
    stages = [{"name": "stage", "optim": optim, "data": data, **stage}]
    return {"model": model, "output": "out", "precision": "bfloat16", "stages": stages}


QFORMER = (
    "norm_features",
    "queries",
    "qformer",
    "words",
    "positions",
    "*_proj.*",
    "itm_head",
    "captions",
    "temperature",
)
LLAVA = "README.md of haotian-liu/LLaVA"
A100 = "8xA100-80GB"
SIZE_13B = ("model=llava-llama-2-13b",)
CASES = (
    Case("LLaVA 7B, stage 1", A100, 2, f"{LLAVA}, v1", "llava/pretrain", ("stages.0.data.0.count=595375",)),
    Case("LLaVA 13B, stage 1", A100, 4, f"{LLAVA}, v1", "llava/pretrain", (*SIZE_13B, "stages.0.data.0.count=595375")),
    Case(
        "LLaVA 13B, Instruct-158K, 3 epochs",
        A100,
        10,
        "haotian-liu/LLaVA#229",
        "llava/finetune",
        (*SIZE_13B, "stages.0.data.0.count=157712"),
    ),
    Case(
        "LLaVA 7B Lightning, 80K, 1 epoch",
        A100,
        1,
        "haotian-liu/LLaVA#229",
        "llava/finetune",
        ("stages.0.data.0.count=80000", "stages.0.epochs=1", "stages.0.batch.samples=128"),
    ),
    Case(
        "LLaVA 13B, ScienceQA, 12 epochs",
        A100,
        4,
        "arXiv:2304.08485",
        "llava/scienceqa",
        (*SIZE_13B, "stages.0.data.0.count=12726"),
    ),
    Case(
        "LLaVA-1.5 7B, stage 1",
        A100,
        3.5,
        LLAVA,
        "llava-1.5/pretrain",
        ("stages.0.data.0.count=558128",),
    ),
    Case(
        "LLaVA-1.5 13B, stage 1",
        A100,
        5.5,
        LLAVA,
        "llava-1.5/pretrain",
        ("model=llava-1.5-13b", "stages.0.data.0.count=558128"),
    ),
    Case("LLaVA-1.5 7B, stage 2", A100, 10, LLAVA, "llava-1.5/finetune", ("stages.0.data.0.count=665298",)),
    Case(
        "LLaVA-1.5 13B, stage 2",
        A100,
        20,
        LLAVA,
        "llava-1.5/finetune",
        ("model=llava-1.5-13b", "stages.0.data.0.count=665298"),
    ),
    *(
        Case(
            f"LLaVA-NeXT {size}, stage 2",
            machine,
            hours,
            "LLaVA-NeXT, see below",
            "llava-next/finetune",
            (f"model=llava-next-{preset}", "stages.0.data.0.count=760000"),
        )
        for size, preset, machine, hours in (
            ("7B", "vicuna-7b", "8xA100-80GB", 20),
            ("13B", "vicuna-13b", "16xA100-80GB", 24),
            ("34B", "34b", "32xA100-80GB", 30),
        )
    ),
    Case(
        "InternVL-Chat-1.2 40B, stage 2",
        "32xA100-80GB",
        36,
        "blog of InternVL-Chat-V1.2",
        _run(
            {
                "vision": "internvl-1.5-26b",
                "connector": "internvl-1.5-26b",
                "decoder": "llava-next-34b",
                "resolution": {"kind": "squash", "tile_size": 448},
                "chat": "chatml_direct",
            },
            trainable=["vision", "connector", "decoder"],
            batch={"samples": 512, "micro_tokens": 8192},
            max_tokens=2048,
            epochs=1,
            count=1_267_819,
        ),
        at_most=True,
    ),
    Case(
        "BLIP-2 ViT-g, stage 1",
        "16xA100-40GB",
        6 * 24,
        "arXiv:2301.12597 section 3.4",
        _run(
            "blip2-stage1-vit-g",
            trainable=QFORMER,
            batch={"samples": 1680, "form": "pad"},
            steps=250_000,
        ),
        at_most=True,
        checkpointing=False,
    ),
    Case(
        "BLIP-2 ViT-g and FlanT5-XXL, stage 2",
        "16xA100-40GB",
        3 * 24,
        "arXiv:2301.12597 section 3.4",
        _run(
            "blip2-flan-t5-xxl",
            trainable=["connector"],
            batch={"samples": 1520, "form": "pad"},
            steps=80_000,
        ),
        at_most=True,
        checkpointing=False,
    ),
)


def config(case: Case, folder: Path) -> RunConfig:
    """The run of a case. folder: for the description of a model that is no preset."""
    if isinstance(case.run, str):
        return read_run(case.run, case.settings)
    run = dict(case.run)
    if isinstance(run["model"], dict):
        path = folder / "mix.yaml"
        path.write_text(yaml.safe_dump(run["model"]), encoding="utf-8")
        run["model"] = str(path)
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
