"""`python -m experiments.nlvr.run DATA OUT`: everything, from nothing to the tables of docs/experiments/nlvr.md.

DATA  folder of the data set: examples.jsonl (image, split, sentence, label) and the pictures
OUT   tower/       the tower and its log
      language/    tokenizer, the language model that has learned from facts, and the logs of it and of the connector
      drawn/, real/, start/     what run.yaml reads
      training/    run.yaml's folder: log.jsonl and the model after it
      text-only/   the same with empty boxes in place of the pictures: what sentences alone give away
      results.json

What is there already is not made again, so that a stopped run goes on. Settings of run.yaml are changed as with
`opsin train`: stages.real.optim.lr=0.001
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from experiments.nlvr import connect, language, tower
from experiments.nlvr.data import Example, read_examples, write_drawn, write_real, write_words
from experiments.nlvr.read import read_scene
from experiments.nlvr.score import VIEWS, ask_all, table
from rich.console import Console
from rich.table import Table

from opsin import weights
from opsin.spec.recipe import DataFile, RunConfig
from opsin.train.config import read_run
from opsin.train.log import Screen
from opsin.train.runner import run as train

RUN_FILE = Path(__file__).with_name("run.yaml").resolve()
PICTURES = 1000
"""Drawn pictures of the last stage, each with several sentences."""
Seconds = dict[str, dict[str, float]]


def main(arguments: list[str] | None = None) -> None:
    """Run the experiment."""
    parser = argparse.ArgumentParser(prog="python -m experiments.nlvr.run", description=main.__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=tower.RUN.steps)
    parser.add_argument("--language-steps", type=int, default=language.RUN.steps)
    parser.add_argument("--connect-steps", type=int, default=connect.RUN.steps)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--split", choices=("choose", "test"), default="test", help="what is scored in the end")
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    given.out.mkdir(parents=True, exist_ok=True)
    splits = read_examples(given.data)
    seconds: Seconds = {}
    make_parts(given, splits, seconds)
    with contextlib.chdir(given.out):
        config = read_run(str(RUN_FILE), [f"seed={given.seed}", *given.overrides])
        with _timed("real", seconds):
            train(config, reporter=Screen(console, every=config.log_every))
        with _timed("text-only", seconds):
            blind = text_only(config)
            train(blind, reporter=Screen(console, every=config.log_every))
    examples = splits[given.split]
    answers = [example.answer for example in splits["train"]]
    majority = max(("yes", "no"), key=answers.count)
    with _timed("scoring", seconds):
        rows = score(given.out, config, blind, examples, majority=majority)
        rows["from exact facts, before real"] = table(
            {"facts": from_facts(given.out, examples)}, examples, majority=majority
        )
    results = {"split": given.split, "majority": majority, "rows": rows, "seed": given.seed, "seconds": seconds}
    results |= {"threads": torch.get_num_threads()}
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(console, results)


@contextlib.contextmanager
def _timed(name: str, seconds: Seconds) -> Iterator[None]:
    wall, busy = time.perf_counter(), time.process_time()
    yield
    seconds[name] = {"wall": round(time.perf_counter() - wall), "cpu": round(time.process_time() - busy)}


def make_parts(given: argparse.Namespace, splits: dict[str, list[Example]], seconds: Seconds) -> None:
    """Tower, language model, data files and the model that run.yaml starts from, as far as they are not there."""
    out, seed = given.out, given.seed
    if not (out / "tower/done").exists():
        with _timed("tower", seconds):
            tower.run(out / "tower", seed=seed, steps=given.tower_steps)
        (out / "tower/done").touch()
    if not (out / "language/done").exists():
        write_words(out / "language", splits["train"])
        with _timed("language", seconds):
            language.run(out / "language", seed=seed, settings=replace(language.RUN, steps=given.language_steps))
        (out / "language/done").touch()
    if not (out / "start/opsin.json").exists():
        write_drawn(out / "drawn", seed=seed, pictures=given.pictures)
        write_real(out / "real", splits)
        with _timed("connect", seconds):
            settings = replace(connect.RUN, steps=given.connect_steps)
            connect.run(out / "language", out / "start", tower=out / "tower" / tower.FILE, seed=seed, settings=settings)


def text_only(config: RunConfig) -> RunConfig:
    """The same stage from the same start, with three empty boxes in place of every picture of the data set."""
    (stage,) = config.stages
    blank = (DataFile(path="real/blank.jsonl"),)
    return config.replace(output="text-only", stages=(stage.replace(data=blank, evaluate=None),))


def score(
    out: Path, config: RunConfig, blind: RunConfig, examples: list[Example], *, majority: str
) -> dict[str, list[dict[str, Any]]]:
    """The tables of the model before and after the last stage, and of the one that trained without pictures."""
    (stage,) = config.stages
    views = {
        config.model: ("own",),
        f"{config.output}/{stage.name}": VIEWS,
        f"{blind.output}/{stage.name}": ("blank",),
    }
    return {
        folder: table(ask_all(weights.load(out / folder), examples, views=shown), examples, majority=majority)
        for folder, shown in views.items()
    }


def from_facts(out: Path, examples: list[Example]) -> list[str]:
    """What the language model that has never seen a picture says when it is told exactly what is there."""
    model, encoder = language.load(out / "language")
    scenes = {path: read_scene(path) for path in {example.image for example in examples}}
    said = [(example.sentence, example.answer) for example in examples]
    good = language.right(model, [scenes[example.image] for example in examples], said, encoder)
    return [answer if is_right else "wrong" for (_, answer), is_right in zip(said, good, strict=True)]


def show(console: Console, results: dict[str, Any]) -> None:
    """The tables."""
    for name, rows in results["rows"].items():
        shown = Table(title=f"{name}, split {results['split']}", title_justify="left", header_style="bold")
        views = [view for view in (*VIEWS, "facts") if view in rows[0]]
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
