"""`opsin demo`."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("opsin-demo"),
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Train so long instead of the default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One minute in all: worse answers.")] = False,
    seed: Annotated[int, typer.Option(help="Draws other pictures and questions.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a small LLaVA-1.5 here, ask it about pictures it never saw, and write a report.

    Needs no network and no files: pictures are drawn, a small vision tower and language model come with opsin. Takes
    about five minutes on two CPU cores.

        opsin demo

        opsin demo --minutes 20 --out longer

        opsin chat opsin-demo --image drawing.png "Which shape is red?"
    """
    from opsin.demo.run import run

    run(out, minutes=minutes, quick=quick, seed=seed, device=device)
