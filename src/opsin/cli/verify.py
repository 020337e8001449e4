"""`opsin verify`: does a model compute here what it computes in transformers, rung by rung."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsin.errors import ConfigError

if TYPE_CHECKING:
    from opsin.verify.rungs import Ladder


def verify(
    model: Annotated[str | None, typer.Argument(help="A model's folder, a preset's id, or a hub repository.")] = None,
    tiny: Annotated[str | None, typer.Option("--tiny", help="A family: its tiny model, with random weights.")] = None,
    case: Annotated[
        Path | None, typer.Option("--case", help="Folder of recorded outputs of the authors' code, with tiny weights.")
    ] = None,
    tokenizers: Annotated[
        Path | None, typer.Option("--tokenizers", help="With --case: folder of published tokenizers, one folder each.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Folder that transformers reads in place of the model's own.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer.")] = None,
    image: Annotated[str | None, typer.Option("--image", "-i", help="A picture; by default a drawn one.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="A question, where there is a tokenizer.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the greedy answer.")] = 16,
    json: Annotated[bool, typer.Option("--json", help="Print an object.")] = False,
) -> None:
    """Compare a model with transformers, rung by rung: pixels, ids, positions, features, rows, layers, logits, answer.

    With --case it is compared with recorded outputs, within the tolerances recorded with them; MODEL is then optional,
    as a case holds its own. transformers is not needed.

    Prints the largest error of each rung, names the first one that differs and the likely cause. Exit code 0: all
    equal; 1: something differs; 2: the two cannot be compared.

    Examples:

        opsin verify llava-hf/llava-1.5-7b-hf

        opsin verify --tiny qwen2_vl

        opsin verify --case tests/goldens/llava/hf_llava15_mlp
    """
    if case is not None:
        if any(value not in (None, "float32") for value in (tiny, against, tokenizer, image, prompt, dtype)):
            raise ConfigError("--case records its inputs, in float32: it takes a MODEL, --tokenizers and --json")
    elif tokenizers is not None:
        raise ConfigError("--tokenizers goes with --case; --tokenizer names the folder of one")
    elif (model is None) == (tiny is None):
        raise ConfigError("give a MODEL or --tiny FAMILY, one of them, or --case FOLDER")
    elif tiny is not None and against is not None:
        raise ConfigError("--against goes with a MODEL; --tiny writes its own")
    from opsin.verify import recorded, run

    question = run.Question(image, prompt, dtype, max_new_tokens)
    if case is not None:
        ladder = recorded.verify_case(case, model, tokenizers=tokenizers)
    elif tiny is not None:
        ladder = run.verify_tiny(tiny, question, tokenizer=tokenizer)
    else:
        assert model is not None
        ladder = run.verify(model, question, against=against, tokenizer=tokenizer)
    if json:
        from json import dumps

        first = ladder.first_difference
        shown = {**asdict(ladder), "equal": first is None, "first_difference": first and first.rung}
        typer.echo(dumps({**shown, "conclusion": ladder.conclusion}, indent=1))
    else:
        _print(ladder)
    if ladder.first_difference is not None:
        raise typer.Exit(1)


def _print(ladder: "Ladder") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("rung", "largest error", "tolerance", "verdict"):
        table.add_column(column, justify="right" if column in ("largest error", "tolerance") else "left", no_wrap=True)
    for step in ladder.steps:
        error, allowed = ("" if value is None else f"{value:.3g}" for value in (step.error, step.tolerance))
        allowed += f" + {step.relative:g}·|x|" if step.relative else ""
        table.add_row(step.rung, error, allowed, f"{step.verdict}{': ' * bool(step.note)}{step.note}")
    # Not cut to 80 columns where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True, highlight=False, markup=False)
    for note in ladder.notes:
        console.print(note)
    console.print(table)
    console.print(ladder.conclusion)
