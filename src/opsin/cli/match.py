"""`opsin match`: does a text describe a picture, which of several does, and which pictures of a folder it describes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opsin.cli._options import MODE_HELP, Mode
from opsin.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from opsin.match import Matcher, Ranked

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What counts as a picture in a folder."""


@dataclass(frozen=True)
class Row:
    """One pair; the keys of `--json`."""

    picture: str
    text: str
    rank: int
    """From 1, among the texts for one picture, or among the pictures of the folder for one text."""
    contrast: float
    matching: float | None


def match(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture, or a folder of pictures.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What it may show.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="An id such as blip2-itm-vit-g, a folder or a repository.")
    ] = "blip2-itm-vit-g",
    top: Annotated[int, typer.Option("--top", min=1, help="Pictures of a folder that are shown for each text.")] = 10,
    mode: Annotated[Mode, typer.Option("--mode", help=MODE_HELP)] = Mode.display,
    tower: Annotated[
        str | None, typer.Option("--tower", help="Where the vision tower is, for checkpoints of LAVIS without one.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="A torch device such as cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, or auto: the checkpoint's own.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects, one per pair.")] = False,
) -> None:
    """How well texts fit a picture, or the pictures of a folder that fit a text best.

    Contrast is a cosine: comparable between pairs, but no probability. Matching is the probability that the text is
    about the picture; for folders only the 128 pictures of the best contrast are matched. Texts are ordered by both
    together, as the authors rank.

    Examples:

        opsin match photo.jpg "a dog on a beach" "a red car"

        opsin match photos/ "a dog on a beach" --top 5
    """
    pictures = find_pictures(Path(image).expanduser())
    from opsin.match import load

    matcher = load(model, image_mode=mode.value, tower=tower, device=device, dtype=dtype)
    is_folder = len(pictures) > 1 or Path(image).expanduser().is_dir()
    rows = rank_folder(matcher, pictures, texts, top) if is_folder else rank_texts(matcher, pictures[0], texts)
    if json:
        from dataclasses import asdict
        from json import dumps

        typer.echo(dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False))
    else:
        _print(rows, by="text" if is_folder else "picture")


def find_pictures(path: Path) -> list[Path]:
    """A picture, or those of a folder by their names, folders inside it left out. Raises ConfigError."""
    if not path.exists():
        raise ConfigError(f"there is no picture or folder {str(path)!r}")
    if not path.is_dir():
        return [path]
    found = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES and each.is_file())
    if not found:
        raise ConfigError(f"folder {str(path)!r} has no pictures ({', '.join(SUFFIXES)})")
    return found


def rank_texts(matcher: "Matcher", picture: Path, texts: list[str]) -> list[Row]:
    """All texts for one picture, best first."""
    ranked = matcher.rank_texts(picture, texts, num_rescored=len(texts))
    return [_row(picture, texts[each.index], rank, each) for rank, each in enumerate(ranked, start=1)]


def rank_folder(matcher: "Matcher", pictures: list[Path], texts: list[str], top: int) -> list[Row]:
    """For every text, the pictures that fit it best."""
    rows = []
    for text in texts:
        ranked = matcher.rank_pictures(text, pictures)[:top]
        rows += [_row(pictures[each.index], text, rank, each) for rank, each in enumerate(ranked, start=1)]
    return rows


def _row(picture: Path, text: str, rank: int, ranked: "Ranked") -> Row:
    matching = None if ranked.matching is None else round(ranked.matching, 6)
    return Row(str(picture), text, rank, round(ranked.contrast, 6), matching)


def _print(rows: list[Row], *, by: str) -> None:
    from rich.console import Console

    console = Console()
    for title in dict.fromkeys(getattr(row, by) for row in rows):
        console.print(
            _table(title, "picture" if by == "text" else "text", [r for r in rows if getattr(r, by) == title])
        )


def _table(title: str, column: str, rows: list[Row]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("matching", "contrast"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(column, overflow="fold")
    for row in rows:
        matching = "" if row.matching is None else f"{100 * row.matching:.1f} %"
        table.add_row(matching, f"{row.contrast:.4f}", Text(getattr(row, column)))
    return table
