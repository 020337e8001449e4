"""The bytes of a picture or video and their format, under limits: what stands before any decoder.

    path, bytes, data: URI --read--> bytes --sniff--> JPEG, PNG, WebP, GIF, BMP or TIFF
                           --open_video_file--> file and format: MP4, Matroska, AVI, MPEG or FLV

The first bytes decide the format, never a file's name or a declared type.
"""

import base64
import binascii
import io
import re
import stat
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image

from opsin.errors import MediaError
from opsin.spec.base import Spec
from opsin.spec.plan import Size

ImageSource = str | Path | bytes | Image.Image
"""A path, a `data:` URI, the bytes of a file, or a PIL image."""

VideoSource = str | Path | bytes | tuple[ImageSource, ...]
"""A path, a `data:` URI, the bytes of a file, or the frames as pictures."""

READABLE = "JPEG, PNG, WebP, GIF, BMP and TIFF"
READABLE_VIDEOS = "MP4, MOV, Matroska, WebM, AVI, MPEG and FLV"


class Limits(Spec):
    """What a picture or video may ask of the machine, checked before the memory that each limit guards is allocated."""

    max_bytes: int = 64 * 2**20
    """Size of the file."""
    max_pixels: int = 32_000_000
    """Width times height."""
    max_side: int = 16_384
    """Longer side in pixels."""
    max_ratio: float = 200
    """Longer side by shorter side."""
    max_derived_pixels: int = 64_000_000
    """Largest picture that preparing it makes, in pixels: a thin strip grows when its short side is enlarged."""
    max_video_bytes: int = 2**30
    """Size of a video's file."""
    max_video_frames: int = 216_000
    """Frames that a video's file holds: two hours at 30 a second."""
    max_shown_frames: int = 1024
    """Frames of one video that are shown to a model."""


DEFAULT_LIMITS = Limits()

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF.{4}WEBP", "WebP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM", "BMP"),
    (rb"II[*+]\x00|MM\x00[*+]", "TIFF"),
)

_VIDEO_MAGIC: tuple[tuple[bytes, str], ...] = (
    (rb".{4}(ftyp|moov|mdat|wide|free|skip)", "mp4"),
    (rb"\x1aE\xdf\xa3", "matroska"),
    (rb"RIFF.{4}AVI ", "avi"),
    (rb"G.{187}G", "mpegts"),
    (rb"\x00\x00\x01\xba", "mpeg"),
    (rb"FLV\x01", "flv"),
)
"""FFmpeg's reader for a file that begins so. It is always named: FFmpeg's own guess may take a file for a list of other
files and addresses, and open those."""

_STILL = (*_MAGIC, (rb".{4}ftypavi[fs]", "AVIF"), (rb".{4}ftyp(hei[cx]|mif1|msf1)", "HEIC"))
"""What people give by mistake for a video."""

_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (rb".{4}ftypavi[fs]", "an AVIF picture"),
    (rb".{4}ftyp(hei[cx]|hevc|mif1|msf1)", "a HEIC picture"),
    (rb".{4}ftyp", "a video"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (rb"\x00\x00\x01\x00", "an icon"),
    (rb"%PDF", "a PDF document"),
    (rb"\s*<(!doctype html|html)", "a web page: perhaps the answer of a server that had no picture"),
    (rb"\s*<(\?xml|svg)", "an SVG or XML document"),
    (rb"version https://git-lfs", "a Git LFS pointer (run `git lfs pull`)"),
    (rb"[\t\r\n\x20-\x7e]+\Z", "text"),
)
"""What people give by mistake, told by name rather than as unknown bytes."""


def read(source: str | Path | bytes, limits: Limits, name: str) -> tuple[bytes, str]:
    """The bytes of a picture and what messages call it: `name`, its path, or both. Raises MediaError."""
    if isinstance(source, bytes):
        data, name = source, name or "picture"
    elif isinstance(source, str) and source[:5].lower() == "data:":
        name = name or "data: URI"
        data = _decode_data_uri(source, limits.max_bytes, name, "image/png")
    else:
        path = shorten(str(source))
        name = f"{name} ({path})" if name else path
        with _open_file(source, limits.max_bytes, name, "picture") as file:
            data = file.read(limits.max_bytes + 1)  # the file may grow while it is read
    if len(data) > limits.max_bytes:
        raise _too_many_bytes(len(data), limits.max_bytes, name, "picture")
    if not data:
        raise MediaError(f"{name}: is empty (0 bytes). Copy or download it again.", kind="media_empty")
    return data, name


def open_video_file(source: str | Path | bytes, limits: Limits, name: str) -> tuple[BinaryIO, str, str]:
    """A video as an open file, FFmpeg's name of its format, and what messages call it. Raises MediaError."""
    if isinstance(source, bytes):
        file, size, name = io.BytesIO(source), len(source), name or "video"
    elif isinstance(source, str) and source[:5].lower() == "data:":
        name = name or "data: URI"
        data = _decode_data_uri(source, limits.max_video_bytes, name, "video/mp4")
        file, size = io.BytesIO(data), len(data)
    else:
        path = shorten(str(source))
        name = f"{name} ({path})" if name else path
        return _checked(_open_file(source, limits.max_video_bytes, name, "video"), name)
    if size > limits.max_video_bytes:
        raise _too_many_bytes(size, limits.max_video_bytes, name, "video")
    return _checked(file, name)


def _checked(file: BinaryIO, name: str) -> tuple[BinaryIO, str, str]:
    """The file, at its beginning, with the format that its first bytes show."""
    head = file.read(256)
    file.seek(0)
    if not head:
        raise MediaError(f"{name}: is empty (0 bytes). Copy or download it again.", kind="media_empty")
    kinds = (kind for pattern, kind in (*_STILL, *_VIDEO_MAGIC) if re.match(pattern, head, re.DOTALL))
    kind = next(kinds, "")
    if kind in dict(_VIDEO_MAGIC).values():
        return file, kind, name
    file.close()
    if kind:
        raise MediaError(f"{name}: is a {kind} picture, not a video. Show it as a picture.", kind="media_format")
    raise MediaError(
        f"{name}: is not a video in a known format; it begins with {head[:8].hex(' ')}. opsin reads {READABLE_VIDEOS}.",
        kind="media_format",
    )


def is_video(path: Path) -> bool:
    """Whether a file begins as a video does. What cannot be read is none, and whoever opens it says why."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError:
        return False
    return any(re.match(pattern, head, re.DOTALL) for pattern, _ in _VIDEO_MAGIC) and not any(
        re.match(pattern, head, re.DOTALL) for pattern, _ in _STILL
    )


def sniff(data: bytes, name: str) -> str:
    """The format, from the first bytes. Raises MediaError for what is not read, naming what it seems to be."""
    head = data[:256]
    for pattern, format_name in _MAGIC:
        if re.match(pattern, head, re.DOTALL):
            return format_name
    for pattern, kind in _FOREIGN:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            raise MediaError(
                f"{name}: is not a picture that opsin reads, but {kind}. opsin reads {READABLE}.", kind="media_format"
            )
    raise MediaError(
        f"{name}: is not a picture in a known format; its {len(data)} bytes begin with {data[:8].hex(' ')}. "
        f"opsin reads {READABLE}.",
        kind="media_format",
    )


def check_size(size: Size, limits: Limits, name: str) -> None:
    """Raise MediaError for a picture that is too large, too long or too elongated."""
    (width, height), long, short = size, max(size), min(size)
    if short < 1:
        raise MediaError(f"{name}: {width}x{height} px has no pixels.", kind="media_damaged")
    if long > limits.max_side:
        raise MediaError(
            f"{name}: {width}x{height} px is too large: one side is longer than {limits.max_side} px (max_side). "
            "Shrink it or cut it into pieces.",
            kind="media_large",
        )
    if long > limits.max_ratio * short:
        raise MediaError(
            f"{name}: {width}x{height} px is too elongated: one side is {long / short:.0f} times the other, at most "
            f"{limits.max_ratio:g} times is read (max_ratio). Cut it into pieces.",
            kind="media_ratio",
        )
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{name}: {width}x{height} px is too large: {megapixels(width * height)}, at most "
            f"{megapixels(limits.max_pixels)} are read (max_pixels). Shrink it.",
            kind="media_large",
        )


def megapixels(count: int) -> str:
    """A number of pixels in words."""
    return f"{count / 1e6:.1f} million pixels"


def shorten(text: str, length: int = 200) -> str:
    """Text that fits a message: its beginning and its end."""
    return text if len(text) <= length else f"{text[: length - 20]}...{text[-17:]}"


def _open_file(path: str | Path, max_bytes: int, name: str, kind: Literal["picture", "video"]) -> BinaryIO:
    if isinstance(path, str) and (address := re.match(r"([a-z][a-z0-9+.-]*)://", path, re.IGNORECASE)):
        raise MediaError(
            f"{name}: is an address ({address[0]}), and opsin opens local files only. Download the {kind} and give "
            "its path, its bytes, or a data: URI.",
            kind="address",
        )
    try:
        status = Path(path).stat()
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{name}: is a folder, not a {kind}. Give the path of one file.", kind=f"{kind}_missing")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(
                f"{name}: is not a regular file but a device or pipe. Give the path of a {kind} file.",
                kind=f"{kind}_missing",
            )
        if status.st_size > max_bytes:
            raise _too_many_bytes(status.st_size, max_bytes, name, kind)
        return open(path, "rb")
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(
            f"{name}: there is no such file. Check the path and the folder that it starts from.", kind=f"{kind}_missing"
        ) from None
    except PermissionError:
        raise MediaError(
            f"{name}: may not be read (permission denied). Check the rights of the file.", kind=f"{kind}_missing"
        ) from None
    except (OSError, ValueError):  # too long a name, a NUL in it, a loop of links, a file used as a folder
        raise MediaError(
            f"{name}: is not a path that can be opened. Give a path, bytes, or a data: URI.", kind=f"{kind}_missing"
        ) from None


def _decode_data_uri(uri: str, max_bytes: int, name: str, example: str) -> bytes:
    header, comma, body = uri.partition(",")
    kind: Literal["picture", "video"] = "video" if example.startswith("video") else "picture"
    if not comma or not header.lower().endswith(";base64"):
        raise MediaError(
            f"{name}: is not of the form data:{example};base64,... (begins {shorten(header, 60)!r}).", kind="media_data"
        )
    if len(body) * 3 // 4 > max_bytes + 2:
        raise _too_many_bytes(len(body) * 3 // 4, max_bytes, name, kind)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(
            f"{name}: its {len(body)} characters are not valid base64 (letters, digits, + and /, padded with = to a "
            "multiple of 4, without line breaks).",
            kind="media_data",
        ) from None


def _too_many_bytes(count: int, max_bytes: int, name: str, kind: Literal["picture", "video"]) -> MediaError:
    limit, advice = (
        ("max_bytes", "Shrink it, or save it as JPEG.")
        if kind == "picture"
        else ("max_video_bytes", "Shorten it, or encode it smaller.")
    )
    return MediaError(
        f"{name}: {count / 2**20:.1f} MiB is too large, at most {max_bytes / 2**20:.1f} MiB are read ({limit}). "
        f"{advice}",
        kind="media_large",
    )
