"""`opsin eval`: figures with intervals for a model on a task, and two results compared."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.cli._options import MODE_HELP, Mode
from opsin.errors import ConfigError

if TYPE_CHECKING:
    from opsin.evaluate.tasks import Task


def eval(
    model: Annotated[
        str, typer.Argument(help="A model's folder, a preset's id or a hub repository; or the folder of results.")
    ],
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="A task's name, or a YAML file of one. --list names them.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="File of rows: JSON, JSON lines, parquet, tar, COCO, VQA v2.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder of outputs and results; evals/TASK/MODEL by default.")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option("--control", help="shuffled or text-only, beside the real figures; may repeat.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Folder of results on the same data to compare with.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="{} stands for the question.")] = None,
    parser: Annotated[str | None, typer.Option("--parser", help="How outputs are read, of those of the task.")] = None,
    image_root: Annotated[str | None, typer.Option("--image-root", help="Where picture paths start from.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="Key of the rows whose value groups them.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="The first so many rows.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = None,
    beams: Annotated[int | None, typer.Option("--beams", min=1, help="Search for the likeliest answer.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Answers side by side.")] = 8,
    mode: Annotated[Mode, typer.Option(help=MODE_HELP)] = Mode.display,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto keeps the checkpoint's.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print what results.json holds, or the comparison.")] = False,
    show_list: Annotated[
        bool,
        typer.Option("--list", is_eager=True, callback=lambda wanted: _list_tasks(wanted), help="Tasks and parsers."),
    ] = False,
) -> None:
    """Evaluate a model on your own data or a built-in task: figures, 95 % intervals, controls.

    Every output is kept as it comes; the same command goes on where it was stopped, and asks nothing again when only
    --parser or --group change. Without --task, MODEL is a folder of results, shown or compared with --against.

    Examples:

        opsin eval llava-1.5-7b --task vqa --data questions.jsonl --control shuffled --control text-only

        opsin eval blip2-itm-vit-g --task retrieval --data captions_val.json --image-root val2014

        opsin eval evals/vqa/mine --against evals/vqa/llava-1.5-7b
    """
    if task is None:
        given = {"--data": data, "--output": output, "--control": control, "--prompt": prompt, "--parser": parser}
        _show_finished(model, against, [name for name, value in given.items() if value], json=json)
        return
    from opsin.evaluate.tasks import open_task

    controls = control or []
    _check_controls(controls)
    if against is not None:
        from opsin.evaluate.folder import read_results

        read_results(Path(against))  # before anything is asked
    opened = open_task(
        task,
        data=data,
        prompt=prompt,
        parser=parser,
        image_root=image_root,
        group=group,
        limit=limit,
        max_new_tokens=max_new_tokens,
        beams=beams,
    )
    folder = Path(output) if output is not None else Path("evals") / opened.settings.name / _slug(model)
    results = _evaluate(
        opened,
        model,
        folder,
        controls=controls,
        image_mode=mode.value,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        quiet=json,
    )
    if against is not None:
        _show_comparison(folder, Path(against), json=json)
    elif json:
        _print_json(results)
    else:
        _print_results(results, folder)


def _evaluate(task: "Task", model: str, folder: Path, *, quiet: bool, **options: Any) -> dict[str, Any]:
    from rich.console import Console

    from opsin.evaluate.metrics import RETRIEVAL
    from opsin.evaluate.progress import Screen

    console = Console(stderr=quiet, soft_wrap=True, highlight=False, markup=False)
    try:
        if task.settings.metric == RETRIEVAL:
            from opsin.evaluate.matching import evaluate_retrieval
            from opsin.generate.ready import choose_device

            options["device"] = choose_device(options["device"])
            return evaluate_retrieval(task, model, folder, reporter=Screen(console), **options)
        from opsin.evaluate.run import Evaluation

        return Evaluation(task, model, folder, reporter=Screen(console), **options)()
    except KeyboardInterrupt:
        again = "begins anew" if task.settings.metric == RETRIEVAL else "goes on from there"
        print(f"\nstopped; what was answered is in {folder}, and the same command {again}", file=sys.stderr)
        raise typer.Exit(130) from None


def _show_finished(model: str, against: str | None, unused: list[str], *, json: bool) -> None:
    """The results of a folder, or two compared."""
    from opsin.evaluate.folder import RESULTS, RUN, read_results
    from opsin.evaluate.tasks import DEFAULTS, MADE

    folder = Path(model).expanduser()
    if not (folder / RESULTS).is_file():
        if (folder / RUN).is_file():
            raise ConfigError(f"the evaluation in {folder} is not finished; give its command once more to go on")
        raise ConfigError(f"what is {model} to be asked? Give --task: {', '.join((*DEFAULTS, *MADE))}, or a YAML file")
    if unused:
        raise ConfigError(
            f"{folder} holds finished results, which {', '.join(unused)} cannot change; give a --task too"
        )
    if against is not None:
        _show_comparison(folder, Path(against), json=json)
    elif json:
        _print_json(read_results(folder))
    else:
        _print_results(read_results(folder), folder)


def _show_comparison(first: Path, second: Path, *, json: bool) -> None:
    from dataclasses import asdict

    from opsin.evaluate.compare import compare

    found = compare(first, second)
    if json:
        _print_json(asdict(found))
        return
    from opsin.cli._eval_tables import comparison_table

    _print(comparison_table(found), *[f"note: {note}" for note in found.notes])


def _print_results(results: dict[str, Any], folder: Path) -> None:
    from opsin.cli._eval_tables import facts_text, results_table

    notes = [f"note: {note}" for note in results["notes"]]
    _print(facts_text(results), results_table(results), *notes, f"outputs, scores and results: {folder}")


def _print(*parts: Any) -> None:
    from rich.console import Console

    # Not cut to 80 columns where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True, highlight=False, markup=False)
    for part in parts:
        console.print(part)


def _print_json(data: Any) -> None:
    from json import dumps

    typer.echo(dumps(data, indent=1, ensure_ascii=False))


def _check_controls(controls: list[str]) -> None:
    from opsin.evaluate.controls import check_controls

    check_controls(controls)


def _list_tasks(wanted: bool) -> None:
    if not wanted:
        return
    from opsin.cli._eval_tables import tasks_table

    _print(tasks_table())
    raise typer.Exit


def _slug(model: str) -> str:
    """A model's name as a folder's: the last part of a path, or a repository without its slash."""
    path = Path(model).expanduser()
    name = path.resolve().name if path.exists() else model
    return re.sub(r"[^\w.@-]+", "--", name).strip("-.") or "model"
