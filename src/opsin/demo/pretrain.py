"""`python -m opsin.demo.pretrain tokenizer|tower|language FOLDER`: makes the parts that the package ships.

docs/demo_parts.md records the commands, the logs and the figures of the shipped ones. The same seed on the same machine
and versions gives the same parts.
"""

import argparse
from dataclasses import replace
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Make one part. The language model needs the tokenizer in the same folder; the tower needs nothing."""
    parser = argparse.ArgumentParser(prog="python -m opsin.demo.pretrain", description=main.__doc__)
    parser.add_argument("part", choices=("tokenizer", "tower", "language"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimizer steps, if other than those of the shipped parts")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    # Each part is imported when it is asked for: the tokenizer needs no torch.
    if given.part == "tokenizer":
        from opsin.demo import vocabulary

        print(f"{vocabulary.write_tokenizer(given.folder, vocabulary.vocabulary(vocabulary.sentences()))} tokens")
    elif given.part == "tower":
        from opsin.demo import pretrain_tower as tower

        tower.run(given.folder, seed=given.seed, settings=replace(tower.RUN, steps=given.steps or tower.RUN.steps))
    else:
        from opsin.demo import pretrain_language as language

        settings = replace(language.RUN, steps=given.steps or language.RUN.steps)
        language.run(given.folder, seed=given.seed, settings=settings)


if __name__ == "__main__":
    main()
