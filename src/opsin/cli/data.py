"""`opsin data`: training data checked, shown and converted, with the code that training reads it with."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsin.errors import ConfigError

if TYPE_CHECKING:
    from opsin.cli._datasets import Dataset

FILES_HELP = "A run file (YAML), or files of records."
MODEL_HELP = "A preset or a model's folder."
TOKENIZER_HELP = "Folder of the tokenizer, where it is not the model's own."
ROOT_HELP = "Folder that relative picture paths start from."


def check(
    files: Annotated[list[str], typer.Argument(metavar="RUN.yaml|FILE...", help=FILES_HELP)],
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help=TOKENIZER_HELP)] = None,
    image_root: Annotated[str | None, typer.Option("--image-root", help=ROOT_HELP)] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=2, help="Longest conversation.")] = None,
    held_out: Annotated[
        list[str] | None, typer.Option("--held-out", help="Test data that must not be among it; may be repeated.")
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every picture, not only headers.")] = False,
    show: Annotated[int, typer.Option("--show", min=0, help="Problems of each kind to print; 0 for all.")] = 5,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors in the exit code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one object with every problem.")] = False,
) -> None:
    """Read all of the data once and say everything that is wrong with it: file, line, what to do.

    This is the loader's own code, so what passes here trains. With a model also what depends on it: the order of
    speakers, tokens, what is taught. Errors are what training stops at; warnings train, perhaps on something that
    nobody meant.

    Exit codes: 0 no error, 2 errors (with --strict also warnings).

    Examples:

        opsin data check data.json --image-root pictures

        opsin data check run.yaml --held-out test.json

        opsin data check data.json --model llava-1.5-7b --tokenizer ./vicuna --json
    """
    from opsin.cli._datasets import ModelOptions, find_datasets
    from opsin.cli._findings import check_all, print_findings, to_json

    options = ModelOptions(model, tokenizer, image_root, max_tokens, decode)
    findings = check_all(find_datasets(files, options), held_out or [], image_root)
    if json:
        typer.echo(to_json(findings))
    else:
        print_findings(findings, show=show)
    if any(each.num_errors or (strict and each.problems) for each in findings):
        raise SystemExit(2)


def show(
    file: Annotated[str, typer.Argument(metavar="RUN.yaml|FILE", help="A run file (YAML), or a file of records.")],
    index: Annotated[int, typer.Option("--index", "-i", min=0, help="Which record, from 0.")] = 0,
    model: Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP)] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help=TOKENIZER_HELP)] = None,
    image_root: Annotated[str | None, typer.Option("--image-root", help=ROOT_HELP)] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Of the run; the first one when not given.")] = None,
) -> None:
    """One sample as the model will see it: tokens with ids, which of them are taught, how pictures are cut.

    What is taught stands on green, the rest is coloured by who wrote it. Records of several files are numbered through,
    as in left_out.jsonl.

    Examples:

        opsin data show data.json --index 3 --model llava-1.5-7b --tokenizer ./vicuna

        opsin data show run.yaml --stage tune --index 12
    """
    from rich.console import Console

    from opsin.cli._datasets import ModelOptions, encoder_of, find_datasets
    from opsin.cli._sample import open_sample, sample_text

    found = find_datasets([file], ModelOptions(model, tokenizer, image_root))
    dataset = _stage(found, stage)
    encoder = encoder_of(dataset)
    # Not cut to 80 columns where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for text in sample_text(open_sample(dataset, index), encoder, dataset.rules):
        console.print(text)


def convert(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files of records, in any shape that is read.")],
    to: Annotated[str, typer.Option("--to", help="The file to write, which must not be there yet: JSON lines.")],
    image_root: Annotated[str | None, typer.Option("--image-root", help=ROOT_HELP)] = None,
) -> None:
    """Write data of any shape in the neutral one: messages, pictures, objects; one record a line.

    Paths of pictures are written relative to the new file where they lie beneath its folder, else in full. Pictures
    that stand in the data itself are written to a folder beside it.

    Examples:

        opsin data convert captions.json vqa.json --to all.jsonl
    """
    from opsin.cli._convert import convert_files

    count, pictures = convert_files(files, Path(to), image_root)
    typer.echo(f"{count:,} records: {to}" + (f"; {pictures:,} pictures beside it" if pictures else ""))


def _stage(found: "list[Dataset]", name: str | None) -> "Dataset":
    names = [each.name for each in found]
    if name is None:
        return found[0]
    if name not in names:
        raise ConfigError(f"no stage {name!r} with data; there are {', '.join(filter(None, names)) or 'none'}")
    return found[names.index(name)]


data = (check, show, convert)
