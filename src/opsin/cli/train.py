"""`opsin train`."""

from typing import Annotated

import typer

from opsin.errors import ConfigError, OpsinError


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a recipe. Without it, recipes are listed.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings to change, such as output=runs/a.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the whole config, what trains, steps and tokens; train nothing.")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option(
            metavar="MACHINE",
            help="With --dry-run: whether it fits and how long it takes there, such as 8xA100-80GB or RTX4090@0.3 (at "
            "0.3 of its peak).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: for programs.")] = False,
) -> None:
    """Train a model by a recipe: all its stages, one after the other.

    One YAML file says everything about a run. The same command goes on with a run that was stopped or that crashed, to
    the same bits. Ctrl-C (or SIGTERM) ends the current step, saves, and exits with code 130 (143); once more stops at
    once. Under torchrun the same command trains on several GPUs or machines (docs/distributed.md).

        opsin train

        opsin train llava-1.5/pretrain --dry-run --on 8xA100-80GB

        opsin train run.yaml stages.0.optim.lr=1e-4 stages.finetune.steps=100 output=runs/second
    """
    import os

    from rich.console import Console

    from opsin.train.config import RECIPES, read_run, recipe_names

    first = os.environ.get("RANK", "0") == "0"  # of several processes, one speaks
    console = Console(soft_wrap=True, highlight=False, markup=False, quiet=not first)
    if recipe is None:
        names = recipe_names()
        width = max(map(len, names)) + 2
        for name in names:
            about = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0][2:]
            console.print(f"{name:<{width}}{about}")
        return
    try:
        config = read_run(recipe, overrides or [])
    except OpsinError:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine, whose files may differ
            raise
        raise typer.Exit(2) from None
    if dry_run:
        from opsin.spec.machine import parse_machine
        from opsin.train.preview import preview, preview_json

        machine = None if on is None else parse_machine(on)
        if as_json:
            print(preview_json(config, machine))
            return
        for line in preview(config, machine):
            console.print(line)
        return
    if on is not None or as_json:
        raise ConfigError("--on and --json belong to --dry-run; a run uses the devices that are there")

    from opsin.train.log import Screen
    from opsin.train.parallel import TogetherError
    from opsin.train.runner import run
    from opsin.train.stop import stop_on_signals

    try:
        with stop_on_signals() as stop:
            result = run(config, reporter=Screen(console, every=config.log_every), stop=stop)
    except TogetherError:
        if first:
            raise
        raise typer.Exit(2) from None
    if result.status == "stopped":
        console.print(f"stopped and saved after step {result.steps}; the same command goes on from there")
        raise typer.Exit(128 + (stop.signal or 0))
    console.print(f"done: opsin chat {result.folder} --image PICTURE")
