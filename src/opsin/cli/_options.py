"""What several verbs share: options, names of models, ways of writing numbers. Imports no torch."""

import re
from enum import StrEnum
from pathlib import Path

from opsin.media.image import image_size
from opsin.spec.model import VLMConfig
from opsin.spec.plan import Size
from opsin.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


class Mode(StrEnum):
    """How pictures are opened."""

    display = "display"
    reference = "reference"


MODE_HELP = (
    "How pictures are opened: as people see them (orientation applied, alpha on white), or as the authors' code does."
)


def describe_model(name: str) -> tuple[VLMConfig, Tokenizer | None]:
    """The config of a preset, of a hub repository that is one, the shipped model, or a folder; and its tokenizer.

    Nothing is downloaded.
    """
    from opsin.weights.config import describe_here

    return describe_here(name), tokenizer_of(name)


def tokenizer_of(name: str) -> Tokenizer | None:
    """The tokenizer of a folder or of the shipped model, where it has one; nothing is downloaded."""
    from opsin.weights.shipped import folder_of, is_here

    folder = folder_of(name) if is_here(name) else None
    return load_tokenizer(folder) if folder is not None and has_tokenizer(folder) else None


def picture_size(picture: str, mode: Mode) -> Size:
    """(width, height) of a picture file, or as written: `640x480`."""
    written = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})", picture)
    if written and not Path(picture).exists():
        return int(written[1]), int(written[2])
    return image_size(picture, mode=mode.value)


def readable_bytes(count: int) -> str:
    """302514176 -> '288.5 MiB'."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
