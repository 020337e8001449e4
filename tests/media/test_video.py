"""Videos: frames by index and time, limits, and one error for whatever is wrong."""

import base64
import builtins
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin.errors import MediaError
from opsin.families import preset
from opsin.media.prepare import prepare_video
from opsin.media.source import Limits
from opsin.media.video import Video, open_video

av = pytest.importorskip("av", reason="videos need PyAV (pip install 'opsin[video]')")


def picture(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A number in five black or white stripes, which survive any codec."""
    stripes = np.array([255 * (number >> bit & 1) for bit in range(5)], np.uint8)
    return Image.fromarray(stripes[None, :, None].repeat(3, axis=2)).resize(size, Image.Resampling.NEAREST)


def number_of(frame: Image.Image) -> int:
    """The number that a frame shows."""
    stripes = np.asarray(frame.convert("L").resize((5, 1), Image.Resampling.BOX))[0]
    return sum(int(level > 127) << bit for bit, level in enumerate(stripes))


def clip(num_frames: int, size: tuple[int, int] = (64, 48), *, rate: int = 10, kind: str = "mp4") -> bytes:
    """A video whose n-th frame shows n. Key frames every 8; B-frames between, so that packets do not
    come in the order in which frames are shown."""
    file = io.BytesIO()
    with av.open(file, mode="w", format=kind) as container:
        stream = container.add_stream("mpeg4", rate=rate, options={"bf": "2", "g": "8", "q": "2"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(number, size))))
        container.mux(stream.encode())
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def turned(data: bytes, matrix: Sequence[int]) -> bytes:
    """An MP4 whose track asks to be shown through another matrix (ISO 14496-12, tkhd: nine numbers after 40 bytes)."""
    place = data.index(b"tkhd") + 4 + 40
    return (
        data[:place]
        + b"".join((number << 16 & 0xFFFFFFFF).to_bytes(4, "big") for number in matrix)
        + data[place + 32 :]
    )


def numbers(video: Video, indices: Sequence[int]) -> list[int]:
    """Which frames came out."""
    return [number_of(frame) for frame in video.decode(indices)]


def opened(source: Any, **limits: int) -> Video:
    return open_video(source, mode="display", limits=Limits(**limits))


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi", "mpegts", "flv"])
def test_frames_come_by_their_number_in_the_order_shown(kind: str) -> None:
    if kind == "flv":
        file = io.BytesIO()
        with av.open(file, mode="w", format="flv") as container:
            stream = container.add_stream("flv1", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for number in range(30):
                container.mux(stream.encode(av.VideoFrame.from_image(picture(number))))
            container.mux(stream.encode())
        data = file.getvalue()
    else:
        data = clip(30, kind=kind)
    video = opened(data)
    assert (video.size, video.num_frames, video.rate) == ((64, 48), 30, 10.0)
    assert numbers(video, range(30)) == list(range(30))
    chosen = random.Random(0)
    for _ in range(5):
        indices = sorted(chosen.sample(range(30), 4))
        assert numbers(video, indices) == indices


def test_times_are_those_of_the_container() -> None:
    video = opened(clip(30))
    assert video.times == pytest.approx([number / 10 for number in range(30)])
    assert [video.index_at(seconds) for seconds in (-1, 0, 0.05, 0.1, 1.25, 99)] == [0, 0, 0, 1, 12, 29]
    # AVI stores no times; they follow from the rate.
    assert opened(clip(30, kind="avi")).times == pytest.approx(video.times)


def test_a_video_comes_from_a_path_bytes_or_a_data_uri(tmp_path: Path) -> None:
    data = clip(4)
    path = tmp_path / "clip.bin"  # the name does not count
    path.write_bytes(data)
    uri = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    for source in (path, str(path), data, uri):
        assert numbers(opened(source), range(4)) == [0, 1, 2, 3]


def test_frames_that_were_chosen_before_are_all_shown(tmp_path: Path) -> None:
    frames = tuple(map(picture, range(3)))
    video = opened(frames)
    assert (video.num_frames, video.rate, video.times) == (3, None, ())
    assert numbers(video, range(3)) == [0, 1, 2]
    with pytest.raises(MediaError, match=r"frame 2: is 10x10 px, but frame 1 is 64x48 px"):
        list(opened((frames[0], Image.new("RGB", (10, 10)))).decode([0, 1]))
    with pytest.raises(MediaError, match=r"3 frames are too many, at most 2 are shown"):
        opened(frames, max_shown_frames=2)
    with pytest.raises(MediaError, match="list of frames is empty"):
        opened(())


def test_an_odd_number_of_frames_repeats_the_last() -> None:
    config = preset("qwen2-vl-tiny").config
    video = opened(tuple(Image.new("RGB", (64, 48), (50 * number,) * 3) for number in range(3)))
    plan = config.plan_video(video.size, num_frames=3)
    assert plan.frames == (0, 1, 2, 2)
    prepared = prepare_video(video.decode([0, 1, 2]), plan, config.vision, name="clip")
    times = prepared.patches.reshape(2, -1, 3, 2, config.vision.patch_size**2)
    assert prepared.grids.tolist() == [[2, *plan.tiles[0].grid[1:]]]
    levels = times.mean((1, 4))[:, 0]  # (time, frame within) of the red channel
    assert levels[0, 0] < levels[0, 1] < levels[1, 0] == levels[1, 1]


def test_a_video_that_ends_too_early_is_one_error() -> None:
    config = preset("qwen2-vl-tiny").config
    plan = config.plan_video((64, 48), num_frames=4)
    with pytest.raises(MediaError, match="clip: its frame 2 cannot be decoded"):
        prepare_video(opened(clip(2)).decode([0, 1]), plan, config.vision, name="clip")


@pytest.mark.parametrize(
    ("matrix", "degrees"),
    [((0, 1, 0, -1, 0, 0, 0, 0), 270), ((-1, 0, 0, 0, -1, 0, 0, 0), 180), ((0, -1, 0, 1, 0, 0, 0, 0), 90)],
)
def test_a_telephone_held_upright_is_shown_upright(matrix: tuple[int, ...], degrees: int) -> None:
    """The matrix takes the recorded right to the shown bottom (a quarter with the clock) in the first case."""
    file = io.BytesIO()
    with av.open(file, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"q": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        image = Image.new("RGB", (64, 48), "black")
        image.paste("white", (48, 0, 64, 48))  # the right quarter
        container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    data = turned(file.getvalue(), matrix)
    video = open_video(data, mode="display")
    assert video.size == ((48, 64) if degrees != 180 else (64, 48))
    assert video.notes == (f"turned upright ({degrees} degrees)",)
    (frame,) = (np.asarray(frame).mean(-1) for frame in video.decode([0]))
    side = {270: frame[-8:], 180: frame[:, :8], 90: frame[:8]}[degrees]
    assert side.mean() > 200 > frame.mean()
    assert open_video(data, mode="reference").size == (64, 48)


@pytest.mark.parametrize(
    ("source", "limits", "message"),
    [
        (b"", {}, "is empty"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 300, {}, "is a PNG picture, not a video. Show it as a picture"),
        (b"#EXTM3U\nhttp://example.com/a.ts\n", {}, "is not a video in a known format; it begins with 23 45"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", {}, "is not a video in a known format"),
        ("http://example.com/a.mp4", {}, r"is an address \(http://\), and opsin opens local files only"),
        ("nowhere.mp4", {}, "there is no such file"),
        ("/dev/zero", {}, "is not a regular file but a device"),
        (b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 80, {}, "damaged or cut off"),
        ("data:video/mp4;base64,!!!", {}, "not valid base64"),
        ("data:video/mp4,abc", {}, "is not of the form data:video/mp4;base64"),
    ],
)
def test_what_is_no_video_is_one_error(source: str | bytes, limits: dict[str, int], message: str) -> None:
    with pytest.raises(MediaError, match=message):
        opened(source, **limits)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_video_bytes": 1000}, r"MiB is too large.*max_video_bytes"),
        ({"max_video_frames": 19}, "holds more than 19 frames, the most that are read"),
        ({"max_side": 63}, "one side is longer than 63 px"),
        ({"max_pixels": 3000}, "too large"),
        ({"max_ratio": 1}, "too elongated"),
    ],
)
def test_limits_hold_for_videos(limits: dict[str, int], message: str) -> None:
    data = clip(20)
    with pytest.raises(MediaError, match=message):
        opened(data, **limits)


def test_a_video_without_pictures_or_without_frames_is_one_error() -> None:
    with pytest.raises(MediaError, match="holds no pictures, only sound"):
        opened(sound())
    with pytest.raises(MediaError, match=r"is empty|holds no frames"):
        opened(clip(0))


def test_a_damaged_video_is_one_error_and_never_a_wrong_frame() -> None:
    """Bytes changed at random: what is decoded at all has the size that was announced, and nothing else is raised."""
    data, random_bytes = clip(20), random.Random(1)
    failed = 0
    for _ in range(40):
        broken = bytearray(data)
        for _ in range(60):
            broken[random_bytes.randrange(len(broken))] = random_bytes.randrange(256)
        try:
            video = opened(bytes(broken))
            sizes = {frame.size for frame in video.decode(range(0, video.num_frames, 3))}
            assert sizes <= {video.size}
        except MediaError:
            failed += 1
    assert failed
    for end in (10, 100, len(data) // 2):
        with pytest.raises(MediaError):
            opened(data[:end])


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MediaError, match=r"pip install 'opsin\[video\]'"):
        opened(b"\x00\x00\x00\x18ftypmp42")


def test_real_files_of_several_codecs_give_the_frames_of_a_plain_read(shared: Path) -> None:
    folder = shared / "data" / "videos_small"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    for file in sorted(folder.glob("torchcodec*")) + sorted(folder.glob("mmaction2__test.avi")):
        with av.open(str(file)) as container:
            plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        video = open_video(file, mode="reference")
        assert video.num_frames == len(plain), file.name
        indices = sorted(random.Random(file.name).sample(range(len(plain)), 4))
        for index, frame in zip(indices, video.decode(indices), strict=True):
            assert np.array_equal(np.asarray(frame), plain[index]), f"{file.name} frame {index}"
