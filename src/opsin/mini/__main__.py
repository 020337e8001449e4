"""`python -m opsin.mini STAGE FOLDER`: makes opsin-mini, stage by stage. Commands and logs: docs/opsin_mini.md."""

import argparse
from dataclasses import replace
from pathlib import Path

STAGES = ("tokenizer", "tower", "language", "connect", "finetune", "ship")


def main(arguments: list[str] | None = None) -> None:
    """Run one stage. `tower` and `language` may run side by side; the others need what came before."""
    parser = argparse.ArgumentParser(prog="python -m opsin.mini", description=main.__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps, if other than those of the shipped model")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    # Each stage is imported when it is asked for: the tokenizer needs no torch.
    if given.stage == "tokenizer":
        from opsin.mini import words

        print(f"{words.write(given.folder)} tokens")
    elif given.stage == "finetune":
        from rich.console import Console

        from opsin.mini import recipe
        from opsin.train.log import Screen

        print(recipe.run(given.folder, seed=given.seed, steps=given.steps, reporter=Screen(Console(), every=50)))
    elif given.stage == "ship":
        from opsin.mini import ship

        print(ship.ship(given.folder))
    else:
        from opsin.mini import connect, language, tower

        part = {"tower": tower, "language": language, "connect": connect}[given.stage]
        settings = replace(part.RUN, steps=given.steps or part.RUN.steps)
        part.run(given.folder, seed=given.seed, settings=settings)


if __name__ == "__main__":
    main()
