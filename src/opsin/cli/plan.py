"""`opsin plan`: how many tokens pictures take. Integers only: no torch, no weights, no pixels."""

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from opsin import families
from opsin.cli._options import MODE_HELP, Mode, describe_model, picture_size, readable_bytes
from opsin.cli._videos import Clip, VideoRow, describe_clip, video_row, video_table
from opsin.errors import ConfigError
from opsin.media.image import DEFAULT_LIMITS, check_plan
from opsin.spec.model import VLMConfig
from opsin.spec.plan import Size
from opsin.text.messages import user
from opsin.text.render import ControlSpan, TextSpan, render
from opsin.text.tokenise import tokenise
from opsin.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.table import Table

QUESTION = "What is shown in this image?"
"""Stands in every prompt whose tokens are counted."""

HALF_PRECISION = 2
"""Bytes of a number in the cache."""


@dataclass(frozen=True)
class Row:
    """One picture for one model; the keys of `--json`."""

    model: str
    picture: str
    width: int
    height: int
    resized: Size
    """(width, height) that the picture is resampled to, on the last of its canvases."""
    canvas: Size
    """(width, height) of that canvas: `resized` and what is padded around it."""
    tiles: int
    """Pictures that the vision tower sees."""
    tokens: int
    """Token slots of the picture."""
    text_tokens: int
    """Tokens of the model's prompt with `QUESTION`, without the picture."""
    text_tokens_from: Literal["tokenizer", "estimate"]
    prompt_tokens: int
    """`tokens` and `text_tokens`."""
    kv_bytes: int
    """Keys and values of the picture's tokens, in half precision."""


def plan(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE", help="Picture files, or sizes such as 640x480.")
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", help="A video, or one as written, such as 640x480x250@25.")
    ] = None,
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="A preset, opsin-mini, a folder, or `all` presets; may be repeated."),
    ] = ["all"],  # noqa: B006  typer copies it
    mode: Annotated[Mode, typer.Option("--mode", help=MODE_HELP)] = Mode.display,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects, one per model and picture.")] = False,
) -> None:
    """How many tokens pictures take, and how they are cut, for one model or all.

    Prompt tokens are those of the picture and of the model's chat format with one question, "What is shown in this
    image?". The text is counted with the tokenizer where --model is a folder that has one; otherwise it is estimated, a
    few tokens off, and marked with ~: a word takes a token per 8 letters begun; digits, marks and line breaks take one
    each. KV cache: keys and values of the picture's tokens in half precision.

    Examples:

        opsin plan photo.jpg --model llava-1.5-7b

        opsin plan 640x480 1920x1080 --model all

        opsin plan *.jpg --model llava-next-vicuna-7b --json

        opsin plan --video clip.mp4 --model qwen2-vl-7b-instruct
    """
    pictures, videos = pictures or [], video or []
    if not pictures and not videos:
        raise ConfigError("nothing to plan; name a picture, a size such as 640x480, or --video clip.mp4")
    sizes = [picture_size(picture, mode) for picture in pictures]
    clips = [describe_clip(each, mode.value) for each in videos]
    presets = [preset.id for preset in families.all_presets()]
    rows: list[Row] = []
    video_rows: list[VideoRow] = []
    for name in [each for given in model for each in (presets if given == "all" else [given])]:
        config, tokenizer = describe_model(name)
        video_rows += [video_row(name, config, clip, number_bytes=HALF_PRECISION) for clip in clips]
        text = count_text(config, tokenizer)
        rows += [row(name, config, picture, size, text) for picture, size in zip(pictures, sizes, strict=True)]
    if json:
        from json import dumps

        typer.echo(dumps([*map(asdict, rows), *map(asdict, video_rows)], indent=1))
    else:
        _print_tables(rows, clips, video_rows)


def row(
    name: str, config: VLMConfig, picture: str, size: Size, text: tuple[int, Literal["tokenizer", "estimate"]]
) -> Row:
    """Plan one picture. Raises PlanError or MediaError, naming picture and model."""
    try:
        planned = config.plan(size)
        check_plan(planned, DEFAULT_LIMITS, picture)
    except ValueError as error:
        raise type(error)(f"{error} (model {name})") from None
    canvas = max(planned.canvases, key=lambda each: each.size[0] * each.size[1])  # not the thumbnail
    return Row(
        model=name,
        picture=picture,
        width=size[0],
        height=size[1],
        resized=canvas.resized,
        canvas=canvas.size,
        tiles=planned.num_tiles,
        tokens=planned.num_slots,
        text_tokens=text[0],
        text_tokens_from=text[1],
        prompt_tokens=planned.num_slots + text[0],
        kv_bytes=planned.num_slots * config.decoder.kv_bytes_per_token(HALF_PRECISION),
    )


def count_text(config: VLMConfig, tokenizer: Tokenizer | None) -> tuple[int, Literal["tokenizer", "estimate"]]:
    """Tokens of the prompt with `QUESTION`, the picture left out, and how they were counted."""
    spans = render(config.chat, [user(QUESTION, images=[0])], mode="prompt")
    if tokenizer is not None:
        text = tokenise(spans, tokenizer)
        return len(text.ids) - len(text.images), "tokenizer"
    controls = sum(isinstance(span, ControlSpan) for span in spans)
    return controls + sum(estimate(span.text) for span in spans if isinstance(span, TextSpan)), "estimate"


def estimate(text: str) -> int:
    """Tokens of a text without its tokenizer: a word has one per 8 letters begun, all else one per character.

    For the prompts of this library that is within 5 of what Vicuna's tokenizer gives, of 20 to 70.
    """
    pieces = re.findall(r"[^\W\d_]+|\n|[^\s]", text)
    return sum(-(-len(piece) // 8) for piece in pieces)


def _print_tables(rows: list[Row], clips: list[Clip], video_rows: list[VideoRow]) -> None:
    """One table of all pictures for a single model, else one of all models for each picture."""
    from rich.console import Console

    # Not cut to 80 columns where there is no terminal: files and pipes take lines of any length.
    console = Console(width=None if sys.stdout.isatty() else 200)
    for clip in clips:
        console.print(video_table(clip, [each for each in video_rows if each.video == clip.name]))
    if len({each.model for each in rows}) == 1:
        console.print(_table(rows[0].model, "picture", [(_name(each), each) for each in rows]))
        return
    for name in dict.fromkeys(map(_name, rows)):
        console.print(_table(name, "model", [(each.model, each) for each in rows if _name(each) == name]))


def _table(title: str, first_column: str, rows: list[tuple[str, Row]]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first_column, overflow="fold")
    for column in ("resized", "canvas", "tiles", "tokens", "prompt", "KV cache"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, each in rows:
        table.add_row(
            name,
            "x".join(map(str, each.resized)),
            "x".join(map(str, each.canvas)),
            str(each.tiles),
            str(each.tokens),
            f"{'~' if each.text_tokens_from == 'estimate' else ''}{each.prompt_tokens}",
            readable_bytes(each.kv_bytes),
        )
    return table


def _name(row: Row) -> str:
    size = f"{row.width}x{row.height}"
    return size if row.picture == size else f"{Path(row.picture).name} {size}"
