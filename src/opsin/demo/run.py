"""`opsin demo`, start to end: draw, train through two stages, evaluate on held-out pictures, answer, write a report.

OUT/opsin.json, model.safetensors, tokenizer.json   the model: `opsin chat OUT --image drawing.png`
    results.json                                    accuracy and controls, over all and per task
    report.html                                     what happened, on one page
    training/STAGE/                                 per stage: log.jsonl, run.yaml, checkpoints, the model at its end
    pictures/                                       the unseen pictures of the ten answers
"""

import copy
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from opsin import __version__, weights
from opsin.demo import shipped
from opsin.demo.recipe import FINETUNE, PRETRAIN, Drawn, demo_run
from opsin.demo.score import Asked, ask_all, mean_scores, scores_by_task
from opsin.demo.tasks import heldout_questions, sample
from opsin.encode import Encoder
from opsin.errors import ConfigError
from opsin.inspect.curves import read_curves
from opsin.inspect.parts import Answer, MaskView, PictureView, RunFacts, Scores, StageView, TaskScore, TrainedPart, flow
from opsin.inspect.report import Report, write_report
from opsin.inspect.tokens import mask_pieces
from opsin.nn.vlm import VLM
from opsin.spec.recipe import Stage
from opsin.train.log import Screen
from opsin.train.loop import Row
from opsin.train.prepare import parameter_table
from opsin.train.runner import run as train
from opsin.train.runner import train_stage
from opsin.train.trainable import choose, idle_tensors
from opsin.weights import Model

BUDGET_SECONDS, QUICK_SECONDS = 250.0, 40.0
"""Longest training of the default and of `--quick`. Evaluation and report take about half a minute more."""
PER_TASK, PER_TASK_QUICK = 40, 30
"""Held-out questions of each task."""
TRIAL_STEPS = 4
"""Steps that are timed on a copy to find out how fast the machine is."""
EXPLANATIONS = {
    "pretrain": "Only the connector learns, from captions: it turns what the tower sees into rows that the frozen "
    "language model can read.",
    "finetune": "Connector and language model learn together, from questions with short answers; only the answers are "
    "taught.",
}


def run(
    out: Path,
    *,
    minutes: float | None = None,
    quick: bool = False,
    seed: int = 0,
    device: str = "auto",
    console: Console | None = None,
) -> dict[str, object]:
    """Run the demo and return what stands in results.json.

    minutes: trains about so long. quick: a minute in all. device: auto, cpu or cuda.
    """
    started = time.perf_counter()
    console = console or Console()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "opsin.json").exists())):
        raise ConfigError(f"{out} exists and is not a demo's folder; name another with --out")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = start(seed)
    shutil.rmtree(out, ignore_errors=True)
    seconds = minutes * 60 if minutes is not None else QUICK_SECONDS if quick else BUDGET_SECONDS
    stages, rows = train_stages(
        out / "training", model, seconds, capped=minutes is None, seed=seed, device=device, console=console
    )
    vlm = model.vlm.eval()
    weights.save_native(out, vlm, model.config, model.tokenizer)
    encoder = Encoder(model.config, model.tokenizer)
    items = heldout_questions(seed, per_task=PER_TASK_QUICK if quick else PER_TASK)
    with console.status("asking") as status:
        asked = ask_all(
            vlm,
            encoder,
            items,
            seed=seed,
            on_progress=lambda done, total: status.update(f"asking about unseen pictures: {done} of {total}"),
        )
    tasks = scores_by_task(asked)
    shown = ten(asked)
    results = {
        **asdict(mean_scores(tasks)),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes": peak_bytes(),
        "tasks": {task: asdict(scores) for task, scores in tasks.items()},
        "steps": {stage.name: stage.steps for stage in stages},
        "seed": seed,
        "device": device,
    }
    save_pictures(out / "pictures", shown, seed)
    write_results(out / "results.json", results)
    write_report(out / "report.html", build_report(out, model, stages, rows, asked, shown, results, seed=seed))
    show(console, out, shown, results, tasks)
    return results


def start(seed: int) -> Model:
    """The model before training: shipped tower and language model, a connector that knows nothing."""
    config = shipped.config()
    vlm = weights.build(config, seed=seed)
    for part, file in ((vlm.vision, shipped.TOWER_FILE), (vlm.decoder, shipped.DECODER_FILE)):
        part.load_state_dict(load_file(shipped.PARTS / file))  # from half precision, into float32
    return Model(vlm=vlm, config=config, name="demo", tokenizer_folder=shipped.PARTS)


def train_stages(
    folder: Path, model: Model, seconds: float, *, capped: bool, seed: int, device: str, console: Console
) -> tuple[tuple[Stage, ...], list[Row]]:
    """Train both stages in about so many seconds; returns them, and what each step did.

    How fast the machine is gets measured before each stage: another program may be busy beside one and not the other.
    capped: at most the default numbers of steps.
    """
    started, rows, stages, first = time.perf_counter(), list[Row](), list[Stage](), 0
    for stage, kind, share in ((PRETRAIN, "captions", pretrain_share()), (FINETUNE, "questions", 1.0)):
        per_step = seconds_per_step(model, seed=seed, device=device)
        left = seconds - (time.perf_counter() - started)
        planned = stage.replace(steps=planned_steps(share * left / per_step, stage.steps if capped else None))
        console.print(
            f"A step takes {per_step:.2f} s here: {planned.steps} steps of stage {stage.name!r}"
            + ("." if planned.steps == stage.steps else ", as many as there is time for.")
        )
        source = Drawn(kind, seed, first, planned_samples(planned))
        config = demo_run(str(folder / stage.name), seed=seed, device=device, stage=planned)
        reporter = Screen(console, every=config.log_every)
        train(config, model=model, sources={stage.name: source}, on_row=rows.append, reporter=reporter)
        stages.append(planned)
        first += len(source)
    return tuple(stages), rows


def pretrain_share() -> float:
    """Share of all steps that are pretraining."""
    assert PRETRAIN.steps is not None
    assert FINETUNE.steps is not None
    return PRETRAIN.steps / (PRETRAIN.steps + FINETUNE.steps)


def planned_steps(possible: float, most: int | None) -> int:
    """As many steps as are possible, at most so many and at least a few."""
    steps = max(8, round(possible))
    return steps if most is None else min(steps, most)


def planned_samples(stage: Stage) -> int:
    """Samples that a stage reads."""
    assert stage.steps is not None
    return stage.steps * stage.batch.samples


def seconds_per_step(model: Model, *, seed: int, device: str) -> float:
    """Time of one step of the second stage, measured on a copy; the first, which warms up, is not counted."""
    stage = FINETUNE.replace(steps=TRIAL_STEPS)
    source = Drawn("questions", seed, 10**6, planned_samples(stage))
    trial = copy.deepcopy(model.vlm)
    rows = train_stage(trial, stage, source, tokenizer=model.tokenizer, seed=seed, device=device)
    return min(row["seconds"] for row in rows[1:])


def ten(asked: Sequence[Asked]) -> list[Asked]:
    """One question of each of ten tasks, each about another picture: right or wrong as they come."""
    chosen: dict[str, Asked] = {}
    pictures: set[int] = set()
    for one in asked:
        if one.item.question.task not in chosen and one.item.index not in pictures and len(chosen) < 10:
            chosen[one.item.question.task] = one
            pictures.add(one.item.index)
    return list(chosen.values())


def peak_bytes() -> int:
    """Most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def save_pictures(folder: Path, shown: Sequence[Asked], seed: int) -> None:
    """The pictures of the ten answers, to try `opsin chat` with."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(shown, start=1):
        sample(seed, one.item.index, "heldout").picture.save(folder / f"{number:02d}-{one.item.question.task}.png")


def write_results(path: Path, results: dict[str, object]) -> None:
    """Write whole or not at all."""
    partial = path.with_suffix(".json.tmp")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def build_report(
    out: Path,
    model: Model,
    stages: Sequence[Stage],
    rows: Sequence[Row],
    asked: Sequence[Asked],
    shown: Sequence[Asked],
    results: dict[str, object],
    *,
    seed: int,
) -> Report:
    """Everything for the page."""
    tasks = scores_by_task(asked)
    overall = mean_scores(tasks)
    example = sample(seed, shown[0].item.index, "heldout")
    plan = model.config.plan(example.picture.size)
    taught = Encoder(model.config, model.tokenizer).encode(Drawn("questions", seed, 0, 1).sample(0, 0), mode="train")
    questions = {one.item.question.task: one.item.question.text for one in reversed(asked)}
    return Report(
        title="A small vision-language model, trained here",
        summary=(
            f"A LLaVA-1.5 in small ({sum(p.numel() for p in model.vlm.parameters()) / 1e6:.1f} M parameters) went "
            f"through its two stages on drawn pictures. It answers {overall.accuracy:.0%} of {overall.questions} "
            f"questions about pictures it never saw; always giving a task's commonest answer would earn "
            f"{overall.majority:.0%}."
        ),
        scores=overall,
        tasks=tuple(TaskScore(task, scores, questions[task]) for task, scores in tasks.items()),
        answers=tuple(
            Answer(
                picture=sample(seed, one.item.index, "heldout").picture,
                task=one.item.question.task,
                question=one.item.question.text,
                answer=one.answer,
                truth=one.item.question.answer,
                verdict="right" if one.is_right else "wrong",
            )
            for one in shown
        ),
        flow=flow(model.config, plan),
        picture=PictureView(example.picture, plan, example.caption),
        mask=MaskView(mask_pieces(taught, model.tokenizer), "one picture with its questions"),
        stages=stage_views(out, model.vlm, stages, rows),
        run=RunFacts(
            seconds=float(str(results["seconds"])),
            peak_bytes=int(str(results["peak_rss_bytes"])),
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, device {results['device']}",
            command=" ".join(["opsin", *sys.argv[1:]]) if "opsin" in Path(sys.argv[0]).name else "opsin demo",
            chat_command=f"opsin chat {out} --image {out}/pictures/01-{shown[0].item.question.task}.png",
            versions=f"opsin {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        ),
    )


def stage_views(out: Path, vlm: VLM, stages: Sequence[Stage], rows: Sequence[Row]) -> tuple[StageView, ...]:
    """What each stage trained, for how long, and its loss."""
    views = []
    for stage in stages:
        trainable = choose(vlm, stage.trainable, idle=idle_tensors(vlm, vlm.config))
        mine = [row for row in rows if row["stage"] == stage.name]
        views.append(
            StageView(
                name=stage.name,
                explanation=EXPLANATIONS[stage.name],
                parts=tuple(
                    TrainedPart(part, trained, total) for part, total, trained in parameter_table(vlm, trainable)
                ),
                seconds=sum(row["seconds"] for row in mine),
                samples=sum(row["samples"] for row in mine),
                curve=next(iter(read_curves(out / "training" / stage.name / "log.jsonl")), None),
            )
        )
    return tuple(views)


def show(
    console: Console, out: Path, shown: Sequence[Asked], results: dict[str, object], tasks: dict[str, Scores]
) -> None:
    """The answers and the figures, on the screen."""
    table = Table(title="Ten questions about pictures it never saw", title_justify="left", header_style="bold")
    for column in ("", "question", "answer", "truth"):
        table.add_column(column)
    for one in shown:
        mark = "[green]✓[/]" if one.is_right else "[red]✗[/]"
        table.add_row(mark, one.item.question.text, one.answer, one.item.question.answer)
    console.print(table)
    scores = Table(title="Held-out questions", title_justify="left", header_style="bold")
    for column in ("task", "accuracy", "majority", "shuffled"):
        scores.add_column(column, justify="left" if column == "task" else "right")
    for task, each in tasks.items():
        scores.add_row(task, f"{each.accuracy:.0%}", f"{each.majority:.0%}", f"{each.shuffled:.0%}")
    mean = mean_scores(tasks)
    scores.add_section()
    scores.add_row("mean", f"{mean.accuracy:.0%}", f"{mean.majority:.0%}", f"{mean.shuffled:.0%}")
    console.print(scores)
    console.print(
        f"{mean.questions} questions; {results['seconds']} s; {int(str(results['peak_rss_bytes'])) / 2**30:.2f} GiB"
    )
    console.print(f"report      {out / 'report.html'}")
    console.print(f"talk to it  opsin chat {out} --image {out}/pictures/01-{shown[0].item.question.task}.png")
