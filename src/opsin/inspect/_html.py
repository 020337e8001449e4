"""Small things every part of a page needs: escaped text, pictures as data, numbers as people read them."""

import base64
import html
import io
import re

from PIL import Image

_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_PNG_LIMIT = 240_000
"""Bytes up to which a picture stays lossless."""


def escape(text: str) -> str:
    """Text for HTML and XML, inside elements and in quoted attributes alike."""
    return html.escape(_NOT_IN_XML.sub("\ufffd", text), quote=True)


def data_uri(picture: Image.Image, *, max_side: int = 1400) -> str:
    """The picture itself as a URI: PNG, or JPEG where PNG would be large."""
    shown = picture.convert("RGB")
    if max(shown.size) > max_side:
        shown.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    kind, content = "png", _encoded(shown, "PNG")
    if len(content) > _PNG_LIMIT:
        kind, content = "jpeg", _encoded(shown, "JPEG")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def percent(share: float) -> str:
    """A share of 1 as whole percents."""
    return f"{100 * share:.0f} %"


def count(number: int) -> str:
    """1,234; 56 K; 1.8 M; 7.1 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if number >= limit:
            value = number / (1e3 if unit == "K" else limit)
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{number:,}"


def duration(seconds: float) -> str:
    """8.4 s; 3 min 20 s; 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def size_of(num_bytes: int) -> str:
    """Megabytes or gigabytes, of 1000."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"


def _encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, optimize=True, quality=88)
    return buffer.getvalue()
