"""Opens videos: the one place of the library that decodes them. Needs PyAV (`pip install 'opsin[video]'`).

    source --open--> format --packets--> times of all frames --first frame--> size, turn --limits--> chosen frames

A file is read twice: its packets, undecoded, tell how many frames it has and when each is shown; then the frames that
somebody chose are decoded, from the nearest key frame on. Frames are numbered in the order in which they are shown,
whatever the container says about their number. Whatever goes wrong becomes one MediaError.

`reference` leaves frames as the authors' readers do, lying as they were recorded; `display` turns them upright.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from opsin.errors import MediaError
from opsin.media.image import ImageMode, image_size, open_image
from opsin.media.source import (
    DEFAULT_LIMITS,
    Limits,
    VideoSource,
    check_size,
    open_video_file,
)
from opsin.spec.plan import Size

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = ["DEFAULT_LIMITS", "Limits", "Video", "VideoSource", "open_video"]


@dataclass(frozen=True, eq=False, slots=True)
class Video:
    """An opened video: what is known before its frames are decoded."""

    size: Size
    """(width, height) of every frame."""
    num_frames: int
    rate: float | None
    """Frames per second; None where the video was given as its frames, of which nothing is left out."""
    times: tuple[float, ...]
    """Seconds from the first frame at which each is shown; empty where the frames were given."""
    name: str
    """What messages call it."""
    notes: tuple[str, ...]
    decode: Callable[[Sequence[int]], Iterator[Image.Image]]
    """The frames of some indices, which must increase, as RGB. Raises MediaError for one that cannot be decoded."""

    def index_at(self, seconds: float) -> int:
        """The frame that is shown at a time: the last that began by then."""
        assert self.times, "pictures that were given as frames have no times"
        return max(0, bisect_right(self.times, seconds) - 1)


def open_video(source: VideoSource, *, mode: ImageMode, limits: Limits = DEFAULT_LIMITS, name: str = "video") -> Video:
    """Open one video. Raises MediaError, and nothing else, for whatever is wrong with it.

    name: what messages call it, such as `video 2`; a path is named anyway.
    """
    if isinstance(source, tuple | list):
        return _of_pictures(tuple(source), mode, limits, name)
    with _stream(source, limits, name) as (container, stream, label):
        width, height = stream.codec_context.width, stream.codec_context.height
        check_size((width, height), limits, label)
        index = _Index.read(container, stream, limits, label)
        container.seek(0)
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError(f"{label}: none of its {len(index)} frames can be decoded. Copy or download it again.")
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise MediaError(f"{label}: does not say how many frames it shows per second. Encode it again as MP4.")
        if not _SEEKABLE & set(container.format.name.split(",")) or (index.ticks and first.pts != index.ticks[0]):
            index = index.counted()
        turned = _turn(first) if mode == "display" else 0
    size = _upright_size(first, turned)
    check_size(size, limits, label)
    notes = [f"turned upright ({turned} degrees)"] if turned else []

    def to_pixels(frame: "VideoFrame") -> Image.Image:
        if _upright_size(frame, turned) != size:
            raise MediaError(f"{label}: the size of its frames changes on the way. Encode it again at one size.")
        pixels: Image.Image = frame.to_image()
        return pixels if not turned else pixels.transpose(_TRANSPOSE[turned])

    def decode(indices: Sequence[int]) -> Iterator[Image.Image]:
        return _decode(source, limits, name, indices, index, to_pixels)

    return Video(size, len(index), float(rate), index.times(float(rate)), label, tuple(notes), decode)


# ---- files -----------------------------------------------------------------------------------------------------------

_TRANSPOSE = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
"""What makes a frame upright, by the degrees against the clock that its container asks for."""


_SEEKABLE = {"mp4", "matroska"}
"""Containers that say where each frame lies. In AVI FFmpeg guesses the times, in MPEG and FLV it seeks by guessing."""


@contextmanager
def _stream(source: Any, limits: Limits, name: str) -> Iterator[tuple["InputContainer", "VideoStream", str]]:
    """The container and its video stream. Whatever FFmpeg raises becomes a MediaError with a text of our own."""
    try:
        import av
    except ImportError:
        raise MediaError(
            f"{name}: videos are decoded by PyAV, which is not installed. Run: pip install 'opsin[video]'"
        ) from None
    file, format_name, name = open_video_file(source, limits, name)
    try:
        with file, av.open(file, mode="r", format=format_name, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise MediaError(f"{name}: holds no pictures, only sound or data. Give a video.")
            yield container, container.streams.video[0], name
    except MediaError:
        raise
    except MemoryError:
        raise MediaError(f"{name}: there is not enough memory to decode it. Encode it smaller.") from None
    except Exception:  # FFmpeg's errors are of a dozen types, and PyAV adds Python's own
        raise MediaError(
            f"{name}: its data is damaged or cut off, or of a kind that PyAV {av.__version__} does not read (read as "
            f"{format_name}). Copy or download it again, or convert it to MP4."
        ) from None


@dataclass(frozen=True)
class _Index:
    """When each frame is shown, and where decoding may begin."""

    num_frames: int
    tick: float
    """Seconds."""
    ticks: tuple[int, ...] = ()
    """Times, in the order in which frames are shown. Empty where the file does not say, or says it wrongly."""
    keys: tuple[int, ...] = ()
    """Numbers of the frames that can be decoded without others, increasing."""

    def __len__(self) -> int:
        return self.num_frames

    @classmethod
    def read(cls, container: "InputContainer", stream: "VideoStream", limits: Limits, name: str) -> "_Index":
        """From the packets, one for each frame."""
        found: list[tuple[int | None, bool]] = []
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                found.append((packet.pts, packet.is_keyframe))
            if len(found) > limits.max_video_frames:
                raise MediaError(
                    f"{name}: holds more than {limits.max_video_frames} frames, the most that are read "
                    "(max_video_frames). Cut it into pieces."
                )
        if not found:
            raise MediaError(f"{name}: holds no frames. Copy or download it again.")
        order = sorted(ticks for ticks, _ in found if ticks is not None)
        index = cls(len(found), float(stream.time_base or 0))
        if len(set(order)) < len(found):
            return index
        keys = sorted(bisect_right(order, ticks) - 1 for ticks, is_key in found if is_key and ticks is not None)
        return replace(index, ticks=tuple(order), keys=tuple(keys))

    def counted(self) -> "_Index":
        """The same without times: frames are counted from the first."""
        return _Index(self.num_frames, self.tick)

    def times(self, rate: float) -> tuple[float, ...]:
        """Seconds from the first frame; evenly spaced where the file does not say."""
        if not self.ticks:
            return tuple(number / rate for number in range(self.num_frames))
        return tuple((ticks - self.ticks[0]) * self.tick for ticks in self.ticks)

    def number(self, frame: "VideoFrame", last: int) -> int:
        """Which frame the decoder gave, after the one of number `last`; `last` where its time is not in the file."""
        if not self.ticks:
            return last + 1
        if frame.pts is None:
            return last
        place = bisect_right(self.ticks, frame.pts) - 1
        return max(last, place) if self.ticks[place] == frame.pts else last

    def key_before(self, number: int) -> int:
        """The last frame up to `number` from which decoding may begin; the first where none is known."""
        place = bisect_right(self.keys, number)
        return self.keys[place - 1] if place else 0


def _decode(
    source: VideoSource,
    limits: Limits,
    given_name: str,
    indices: Sequence[int],
    index: _Index,
    to_pixels: Callable[["VideoFrame"], Image.Image],
) -> Iterator[Image.Image]:
    """The frames of increasing `indices`. What lies between is decoded only where others are made from it."""
    with _stream(source, limits, given_name) as (container, stream, name):
        frames, number = container.decode(stream), -1
        for place, wanted in enumerate(indices):
            key = index.key_before(wanted)
            if key > number + 1:
                container.seek(index.ticks[key], stream=stream)
                frames, number = container.decode(stream), -1
            frame = None
            while number < wanted:
                frame = next(frames, None)
                if frame is None:
                    break
                # Frames before a key frame may come out broken: with a time that is not in the file, or with none.
                number = index.number(frame, number)
            if frame is not None and number == wanted:
                yield to_pixels(frame)
            elif index.ticks:
                # Its times are not those of its frames, so that only counting from the first is left.
                yield from _decode(source, limits, given_name, indices[place:], index.counted(), to_pixels)
                return
            else:
                raise MediaError(
                    f"{name}: frame {wanted} of {len(index)}, counted from 0, cannot be decoded. Copy or download the "
                    "video again."
                )


def _turn(frame: "VideoFrame") -> int:
    """Degrees against the clock that make a frame upright: 0, 90, 180 or 270."""
    return round(frame.rotation / 90) * 90 % 360


def _upright_size(frame: "VideoFrame", turned: int) -> Size:
    return (frame.height, frame.width) if turned in (90, 270) else (frame.width, frame.height)


# ---- frames given as pictures ----------------------------------------------------------------------------------------


def _of_pictures(pictures: tuple[Any, ...], mode: ImageMode, limits: Limits, name: str) -> Video:
    if not pictures:
        raise MediaError(f"{name}: its list of frames is empty. Give at least one.")
    if len(pictures) > limits.max_shown_frames:
        raise MediaError(
            f"{name}: {len(pictures)} frames are too many, at most {limits.max_shown_frames} are shown "
            "(max_shown_frames). Leave some out."
        )
    size = image_size(pictures[0], mode=mode, limits=limits, name=f"{name}, frame 1")

    def decode(indices: Sequence[int]) -> Iterator[Image.Image]:
        for number in indices:
            picture = open_image(pictures[number], mode=mode, limits=limits, name=f"{name}, frame {number + 1}")
            if picture.size != size:
                width, height = picture.size
                raise MediaError(
                    f"{picture.name}: is {width}x{height} px, but frame 1 is {size[0]}x{size[1]} px. All frames of a "
                    "video must have one size."
                )
            yield picture.pixels

    return Video(size, len(pictures), None, (), name, (), decode)
