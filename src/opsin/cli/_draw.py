"""`opsin chat --draw`: the boxes of an answer on its picture."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opsin.errors import ConfigError
from opsin.media.image import ImageMode

if TYPE_CHECKING:
    from opsin.generate import Chat

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def check_draw(path: str, prompt: str | None, images: Sequence[str]) -> None:
    """Whether boxes could be drawn to `path`, before a model is loaded. Raises ConfigError."""
    out = Path(path).expanduser()
    if prompt is None or len(images) != 1:
        raise ConfigError(
            f"--draw needs a PROMPT and exactly one picture, not {len(images)}: a box does not say which picture it is "
            "on"
        )
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--draw {path}: the name must end in one of {', '.join(SUFFIXES)}")
    if out.exists():
        raise ConfigError(f"--draw {path}: exists already; name a new file")
    if not out.parent.is_dir():
        raise ConfigError(f"--draw {path}: there is no folder {str(out.parent)!r}")


def draw_answer(session: "Chat", path: str, image: str, mode: ImageMode) -> None:
    """Draw the boxes of the last answer, and say what was drawn and what could not be read."""
    from opsin.inspect.boxes import draw_boxes

    found = session.boxes()
    for each in found.unread:
        print(f"not read as a box: {each}", file=sys.stderr, flush=True)
    if not found.boxes:
        print(f"the answer holds no box; {path} is not written", file=sys.stderr, flush=True)
        return
    draw_boxes(image, found.boxes, image_mode=mode).save(Path(path).expanduser())
    print(f"{len(found.boxes)} box(es) drawn: {path}", file=sys.stderr, flush=True)
