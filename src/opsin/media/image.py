"""Opens pictures: the one place of the library that decodes images.

Pictures come from strangers, so each step is checked before the next one spends memory on it:

    source --read--> bytes --sniff--> format --header--> size --limits--> decode --convert--> RGB

Of animations and of files with several pages the first frame is read. Whatever goes wrong becomes one MediaError that
names the picture, says what is wrong with which numbers, and what to do. Two ways to turn a file into RGB:

    `reference`  exactly what the authors' code does, `Image.open(...).convert("RGB")`: EXIF orientation is ignored,
                 alpha is dropped (a transparent red pixel is red), 16-bit grey saturates. For evaluation and parity.
    `display`    what people see: upright, transparent parts on white, 16-bit grey scaled to 8 bits. For chat, server.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import numpy as np
import PIL
from PIL import Image

from opsin.errors import MediaError
from opsin.media.source import (
    DEFAULT_LIMITS,
    ImageSource,
    Limits,
    check_size,
    megapixels,
    read,
    shorten,
    sniff,
)
from opsin.spec.plan import ImagePlan, Size

__all__ = ["DEFAULT_LIMITS", "ImageMode", "ImageSource", "Limits", "Picture", "check_plan", "image_size", "open_image"]

ImageMode = Literal["reference", "display"]
"""`reference`: as the authors' code opens pictures. `display`: as people see them."""


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """An opened picture."""

    pixels: Image.Image
    """RGB, 8 bits per channel."""
    name: str
    """What messages call it."""
    notes: tuple[str, ...] = ()
    """What was done to it, or left out, on the way in."""

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return self.pixels.size


def open_image(source: ImageSource, *, mode: ImageMode, limits: Limits = DEFAULT_LIMITS, name: str = "") -> Picture:
    """Open one picture as RGB. Raises MediaError, and nothing else, for whatever is wrong with it.

    name: what messages call it, such as `image 2`; a path is named anyway.
    """
    opened = _open(source, limits, name)
    notes = opened.notes()
    orientation = opened.orientation()
    with opened.guard():
        opened.image.load()
        check_size(opened.image.size, limits, opened.name)  # some formats learn their true size only now
        pixels = _as_authors(opened.image, notes) if mode == "reference" else _as_seen(opened.image, notes)
        if orientation != 1 and mode == "reference":
            notes.append(f"its orientation mark ({orientation}) is ignored")
        elif orientation != 1:
            pixels = pixels.transpose(_TRANSPOSE[orientation])
            notes.append(f"turned upright (orientation mark {orientation})")
    return Picture(pixels, opened.name, tuple(notes))


def image_size(
    source: ImageSource,
    *,
    mode: ImageMode,
    limits: Limits = DEFAULT_LIMITS,
    name: str = "",
    check: Literal["header", "ends", "all"] = "header",
) -> Size:
    """(width, height) that `open_image` will give, from the header. Raises MediaError as far as a header tells.

    check: `ends` also decodes files that do not end as their format does, which shows those that were cut off; `all`
    decodes every one.
    """
    opened = _open(source, limits, name)
    if check == "all" or (check == "ends" and not opened.ends_well()):
        with opened.guard():
            opened.image.load()
    width, height = opened.image.size
    turned = mode == "display" and opened.orientation() >= 5
    return (height, width) if turned else (width, height)


def check_plan(plan: ImagePlan, limits: Limits = DEFAULT_LIMITS, name: str = "picture") -> None:
    """Raise MediaError for a plan whose picture is over the limits, or grows over them while it is prepared."""
    check_size(plan.size, limits, name)
    if plan.derived_pixels > limits.max_derived_pixels:
        raise MediaError(
            f"{name}: {plan.size[0]}x{plan.size[1]} px grows to {megapixels(plan.derived_pixels)} while it is "
            f"prepared, at most {megapixels(limits.max_derived_pixels)} are made (max_derived_pixels). "
            "Cut it into pieces.",
            kind="media_ratio",
        )


# ---- header ----------------------------------------------------------------------------------------------------------

_READERS = {
    "JPEG": ("PIL.JpegImagePlugin", "jpeg_factory"),
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "WebP": ("PIL.WebPImagePlugin", "WebPImageFile"),
    "GIF": ("PIL.GifImagePlugin", "GifImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
}
"""Pillow's reader of each format. `Image.open` would try all that it knows, and warn of sizes that our limits allow."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by EXIF orientation; 5 to 8 swap its sides."""

_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, eq=False, slots=True)
class _Opened:
    """A picture whose header is read and whose size is within the limits, but whose pixels are not decoded yet."""

    image: Image.Image
    name: str
    data: bytes = b""
    """The file; empty for a PIL image."""

    def guard(self) -> "_Guard":
        return _Guard(self.name, self.image.format or "", len(self.data), self.image.size)

    def orientation(self) -> int:
        """EXIF orientation 1 to 8; 1 where there is none that can be read."""
        if self.image.format == "TIFF":
            return 1  # Pillow turns these itself, in either mode
        if self.data and self.image.format == "PNG" and not _PNG_EXIF.search(self.data):
            return 1  # Pillow would decode the picture to look for EXIF behind its pixels
        try:
            with _quiet():
                orientation = self.image.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:  # as many types as Pillow has; viewers show such pictures as they lie
            return 1
        return orientation if orientation in _TRANSPOSE else 1

    def ends_well(self) -> bool:
        """Whether the file ends as its format does. Only for JPEG and PNG, the usual ones; others: no."""
        mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(self.image.format or "")
        return mark is not None and mark in self.data[-1024:]

    def notes(self) -> list[str]:
        """What the header says that a user may want to know."""
        try:
            with _quiet():
                several = bool(getattr(self.image, "is_animated", False))
        except Exception:  # the second frame is broken; the first may be whole
            several = True
        return ["the first of its frames or pages is read"] if several else []


_PNG_EXIF = re.compile(b"eXIf|Raw profile type exif|XML:com.adobe.xmp")


def _open(source: ImageSource, limits: Limits, name: str) -> _Opened:
    """Read the header and check the limits."""
    if isinstance(source, Image.Image):
        opened = _Opened(source, name or shorten(str(getattr(source, "filename", ""))) or "picture")
    elif isinstance(source, str | bytes) or hasattr(source, "__fspath__"):
        data, name = read(source, limits, name)
        format_name = sniff(data, name)
        module, reader = _READERS[format_name]
        with _Guard(name, format_name, len(data)), _quiet():
            opened = _Opened(getattr(import_module(module), reader)(io.BytesIO(data)), name, data)
    else:
        raise MediaError(
            f"{name or 'picture'}: a picture is a path, bytes, a data: URI or a PIL image, not "
            f"{type(source).__name__}. For an array use PIL.Image.fromarray."
        )
    check_size(opened.image.size, limits, opened.name)
    return opened


_quiet_lock = threading.Lock()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Pillow's warnings about odd headers to ourselves: what matters becomes an error.

    `catch_warnings` changes the whole process and is not safe among threads, hence the lock. It is held while headers
    are read, not while pixels are decoded.
    """
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True, slots=True)
class _Guard:
    """Turns whatever Pillow raises into one MediaError with a text of our own.

    For broken files that is OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, RuntimeError,
    struct.error, zlib.error and more, and the texts may hold addresses of memory.
    """

    name: str
    format: str
    num_bytes: int
    size: Size | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, MediaError):
            return
        if isinstance(error, MemoryError):
            what, advice = "there is not enough memory to decode it", "Shrink it."
        elif isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            what, advice = "it claims to hold far more pixels than are read", "Shrink it."
        elif isinstance(error, EOFError) or "truncated" in str(error).lower():
            what, advice = "its data is cut off", "Copy or download it again."
        else:
            what = f"its data is damaged, or of a kind that Pillow {PIL.__version__} does not read"
            advice = "Copy or download it again, or convert it to PNG."
        size = f"{self.size[0]}x{self.size[1]} px" if self.size else ""
        facts = ", ".join(filter(None, [self.format, size, f"{self.num_bytes} bytes" if self.num_bytes else ""]))
        raise MediaError(
            f"{self.name}: {what}{f' ({facts})' if facts else ''}. {advice}", kind="media_damaged"
        ) from None


# ---- pixels ----------------------------------------------------------------------------------------------------------

_WHITE = (255, 255, 255)
_ON_WHITE = "its transparent parts are laid on white"


def _as_authors(image: Image.Image, notes: list[str]) -> Image.Image:
    """`image.convert("RGB")`."""
    if image.has_transparency_data:
        notes.append("its transparency is dropped")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # Pillow warns that alpha is lost; without the mark it converts to the same colours in silence.
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def _as_seen(image: Image.Image, notes: list[str]) -> Image.Image:
    """RGB as a viewer shows it, orientation aside."""
    if image.mode.startswith("I;16"):
        return _from_grey16(image, notes)
    if image.mode in ("I", "F"):
        return _from_grey32(image, notes)
    if not image.has_transparency_data:
        if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
            notes.append(f"converted from {image.mode}")
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    alpha = with_alpha.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return with_alpha.convert("RGB")
    notes.append(_ON_WHITE)
    page = Image.new("RGB", image.size, _WHITE)
    page.paste(with_alpha, mask=alpha)
    return page


def _from_grey16(image: Image.Image, notes: list[str]) -> Image.Image:
    """0..65535 to 0..255, rounded. Pillow's own conversion keeps the numbers and saturates: all but black is white."""
    notes.append("16-bit grey scaled to 8 bits")
    values = np.asarray(image)
    levels = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), 256):  # blocks of lines, because the sums need 32 bits
        levels[top : top + 256] = (values[top : top + 256].astype(np.uint32) + 128) // 257  # 65535 = 255 * 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        notes.append(_ON_WHITE)
        levels[values == transparent] = 255
    return Image.fromarray(levels).convert("RGB")


def _from_grey32(image: Image.Image, notes: list[str]) -> Image.Image:
    """32-bit integers and floats have no agreed range: the first usual one that holds all values, else their own."""
    values = np.asarray(image)
    finite = np.isfinite(values)
    low, high = (float(values[finite].min()), float(values[finite].max())) if finite.any() else (0.0, 0.0)
    usual = [top for top in (1, 255, 65535) if low >= 0 and high <= top and not (top == 1 and image.mode == "I")]
    if usual:
        low, high = 0.0, usual[0]
    notes.append(f"32-bit grey from {low:g} to {high:g} scaled to 8 bits")
    levels = np.zeros(values.shape, np.uint8)
    levels[finite] = np.rint((values[finite] - low) * (255 / (high - low or 1)))
    return Image.fromarray(levels).convert("RGB")
