"""What `chat` and `plan` share about videos. Imports no torch."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from opsin.cli._options import readable_bytes
from opsin.errors import ConfigError
from opsin.media.image import ImageMode, check_plan
from opsin.media.source import DEFAULT_LIMITS, check_size
from opsin.media.video import open_video
from opsin.spec.model import VLMConfig
from opsin.spec.plan import Size

if TYPE_CHECKING:
    from rich.table import Table

NO_VIDEOS = "reads pictures only, no videos"


@dataclass(frozen=True)
class Clip:
    """What planning needs to know of a video."""

    name: str
    size: Size
    num_frames: int
    rate: float | None


def describe_clip(video: str, mode: ImageMode) -> Clip:
    """A video file, or one as written: `640x480x250@25`. Raises ConfigError or MediaError."""
    written = re.fullmatch(r"(\d{1,9})[xX×](\d{1,9})[xX×](\d{1,9})@(\d{1,9}(?:\.\d{1,9})?)", video)
    if not written or Path(video).exists():
        found = open_video(video, mode=mode)
        return Clip(video, found.size, found.num_frames, found.rate)
    size, num_frames, rate = (int(written[1]), int(written[2])), int(written[3]), float(written[4])
    if not num_frames or not rate:
        raise ConfigError(f"{video}: {num_frames} frames at {rate:g} a second; both must be more than 0")
    check_size(size, DEFAULT_LIMITS, video)
    if num_frames > DEFAULT_LIMITS.max_video_frames:
        raise ConfigError(f"{video}: {num_frames} frames, at most {DEFAULT_LIMITS.max_video_frames} are read")
    return Clip(video, size, num_frames, rate)


@dataclass(frozen=True)
class VideoRow:
    """One video for one model; the keys of `--json`."""

    model: str
    video: str
    width: int
    height: int
    num_frames: int
    rate: float | None
    frames: tuple[int, ...] = ()
    """Indices of the frames that are shown."""
    resized: Size | None = None
    """(width, height) that each is resampled to."""
    tokens: int | None = None
    kv_bytes: int | None = None
    """Keys and values of the video's tokens, in half precision."""
    reason: str = ""
    """Why the model cannot be shown it; empty where it can."""


def video_row(name: str, config: VLMConfig, clip: Clip, *, number_bytes: int) -> VideoRow:
    """Plan one video. Raises PlanError or MediaError, naming video and model, for one that a video model refuses."""
    row = VideoRow(name, clip.name, *clip.size, clip.num_frames, clip.rate)
    if not config.reads_videos:
        return replace(row, reason=NO_VIDEOS)
    try:
        plan = config.plan_video(clip.size, num_frames=clip.num_frames, rate=clip.rate)
        check_plan(plan, DEFAULT_LIMITS, clip.name)
    except ValueError as error:
        raise type(error)(f"{clip.name}: {error} (model {name})") from None
    return replace(
        row,
        frames=plan.frames,
        resized=plan.canvases[0].resized,
        tokens=plan.num_slots,
        kv_bytes=plan.num_slots * config.decoder.kv_bytes_per_token(number_bytes),
    )


def video_table(clip: Clip, rows: list[VideoRow]) -> "Table":
    """What each model sees of one video."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rate = "" if clip.rate is None else f" at {clip.rate:g} a second"
    title = f"{Path(clip.name).name}: {clip.size[0]}x{clip.size[1]}, {clip.num_frames} frames{rate}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "frames", "resized", "tokens", "KV cache", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        if row.tokens is None or row.resized is None or row.kv_bytes is None:
            table.add_row(row.model, "-", "-", "-", "-", row.reason)
            continue
        cells = (_shown(row.frames), "x".join(map(str, row.resized)), str(row.tokens), readable_bytes(row.kv_bytes))
        table.add_row(row.model, *cells, "")
    return table


def _shown(frames: tuple[int, ...]) -> str:
    """`20: 0 13 26 ... 249`"""
    few = " ".join(map(str, frames)) if len(frames) <= 5 else f"{' '.join(map(str, frames[:3]))} ... {frames[-1]}"
    return f"{len(frames)}: {few}"
