"""`python -m experiments.nlvr.run DATA OUT`: everything, from nothing to the table of docs/experiments/nlvr.md.

DATA  folder of the data set: examples.jsonl (image, split, sentence, label) and the pictures
OUT   tower/       the tower and its log
      tokenizer/, drawn/, real/, start/     what run.yaml reads
      training/    run.yaml's folder: log.jsonl and the model after each stage
      text-only/   the same last stage with empty boxes in place of the pictures: what sentences alone give away
      results.json

What is there already is not made again, so that a stopped run goes on. Settings of run.yaml are changed as with
`opsin train`: stages.drawn.optim.lr=0.002
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from experiments.nlvr import tower
from experiments.nlvr.data import Example, read_examples, write_drawn, write_real, write_words
from experiments.nlvr.score import VIEWS, ask_all, table
from experiments.nlvr.start import write_start
from rich.console import Console
from rich.table import Table

from opsin import weights
from opsin.spec.recipe import DataFile, RunConfig
from opsin.train.config import read_run
from opsin.train.log import Screen
from opsin.train.runner import run as train

RUN_FILE = Path(__file__).with_name("run.yaml").resolve()
PICTURES = 9_600
"""Drawn pictures, each with 16 sentences."""


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(prog="python -m experiments.nlvr.run", description=main.__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=tower.RUN.steps)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--split", choices=("choose", "test"), default="test", help="what is scored in the end")
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    given.out.mkdir(parents=True, exist_ok=True)
    splits = read_examples(given.data)
    seconds: dict[str, dict[str, float]] = {}
    with _timed("tower", seconds):
        _make_parts(given.out, splits, seed=given.seed, tower_steps=given.tower_steps, pictures=given.pictures)
    with contextlib.chdir(given.out):
        config = read_run(str(RUN_FILE), [f"seed={given.seed}", *given.overrides])
        with _timed("training", seconds):
            train(config, reporter=Screen(console, every=config.log_every))
        with _timed("text-only", seconds):
            blind = text_only(config)
            train(blind, reporter=Screen(console, every=config.log_every))
        with _timed("scoring", seconds):
            results = score(config, blind, splits, split=given.split)
        results |= {"seed": given.seed, "seconds": seconds, "threads": torch.get_num_threads()}
        Path("results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(console, results)


@contextlib.contextmanager
def _timed(name: str, seconds: dict[str, dict[str, float]]) -> Iterator[None]:
    wall, busy = time.perf_counter(), time.process_time()
    yield
    seconds[name] = {"wall": round(time.perf_counter() - wall), "cpu": round(time.process_time() - busy)}


def _make_parts(out: Path, splits: dict[str, list[Example]], *, seed: int, tower_steps: int, pictures: int) -> None:
    """Tower, tokenizer, data files and the model to start from, as far as they are not there."""
    if not (out / "tower/done").exists():
        tower.run(out / "tower", seed=seed, steps=tower_steps)
        (out / "tower/done").touch()
    if not (out / "start/opsin.json").exists():
        write_words(out / "tokenizer", splits["train"])
        write_drawn(out / "drawn", seed=seed, pictures=pictures)
        write_real(out / "real", splits)
        write_start(out / "start", tower=out / "tower/tower.safetensors", tokenizer=out / "tokenizer", seed=seed)


def text_only(config: RunConfig) -> RunConfig:
    """The last stage alone, from what the one before left, on pictures of empty boxes."""
    before, last = config.stages[-2:]
    real = tuple(DataFile(path="real/blank.jsonl") for file in last.data[:1])
    return config.replace(
        model=f"{config.output}/{before.name}",
        output="text-only",
        stages=(last.replace(data=real, evaluate=None),),
    )


def score(config: RunConfig, blind: RunConfig, splits: dict[str, list[Example]], *, split: str) -> dict[str, Any]:
    """The tables of the model after each stage, and of the one that trained without pictures."""
    examples = splits[split]
    answers = [example.answer for example in splits["train"]]
    majority = max(("yes", "no"), key=answers.count)
    views = {f"{config.output}/{stage.name}": ("own",) for stage in config.stages}
    views[f"{config.output}/{config.stages[-1].name}"] = VIEWS
    views[f"{blind.output}/{blind.stages[0].name}"] = ("blank",)
    rows = {
        folder: table(ask_all(weights.load(folder), examples, views=shown), examples, majority=majority)
        for folder, shown in views.items()
    }
    return {"split": split, "majority": majority, "rows": rows}


def show(console: Console, results: dict[str, Any]) -> None:
    """The tables."""
    for name, rows in results["rows"].items():
        shown = Table(title=f"{name}, split {results['split']}", title_justify="left", header_style="bold")
        views = [view for view in VIEWS if view in rows[0]]
        for column in ("sentences", "", "majority", *views):
            shown.add_column(column, justify="right" if column else "left")
        for row in rows:
            shares = [
                f"{row[view]:.1%} ({row[f'{view}_interval'][0]:.1%} to {row[f'{view}_interval'][1]:.1%})"
                for view in views
            ]
            shown.add_row(str(row["sentences"]), row["kind"], f"{row['majority']:.1%}", *shares)
        console.print(shown)
    console.print(f"seconds: {results['seconds']}")


if __name__ == "__main__":
    main()
