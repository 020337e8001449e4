"""Opening pictures: sources, limits, the two modes, and one clear error for whatever is wrong."""

import base64
import io
import os
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from opsin.errors import MediaError
from opsin.media.image import Limits, check_plan, image_size, open_image
from opsin.spec.plan import Canvas, ImagePlan, RowLayout, Size, Tile

MODES = ("reference", "display")


def noise(size: Size = (40, 30), mode: str = "RGB", seed: int = 0) -> Image.Image:
    width, height = size
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(levels[..., :3]).convert(mode)


def encoded(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    """A valid 1-bit PNG of any size in a few thousand bytes."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    lines = zlib.compress(bytes(1 + (width + 7) // 8) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", lines) + png_chunk(b"IEND", b"")


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_path_bytes_data_uri_and_pil_image_give_the_same_picture(tmp_path: Path, mode: str) -> None:
    image, data = noise(), encoded(noise())
    path = tmp_path / "photo.jpg"  # the name lies: the first bytes decide
    path.write_bytes(data)
    for source in (path, str(path), data, data_uri(data), data_uri(data, "image/jpeg"), image):
        picture = open_image(source, mode=mode)
        assert (picture.size, picture.pixels.mode) == ((40, 30), "RGB")
        assert np.array_equal(np.asarray(picture.pixels), np.asarray(image))
        assert image_size(source, mode=mode) == (40, 30)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_opens_as_the_authors_open_it(format_name: str) -> None:
    data = encoded(noise(), format_name)
    with Image.open(io.BytesIO(data)) as expected:
        assert np.array_equal(
            np.asarray(open_image(data, mode="reference").pixels), np.asarray(expected.convert("RGB"))
        )


def test_messages_name_the_picture_and_its_path(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"^image 2 \(.*absent\.png\): there is no such file\."):
        open_image(tmp_path / "absent.png", mode="display", name="image 2")


def test_what_is_no_picture_file_is_told_in_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.png").write_text("Dear diary,\n")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><p>404</p>")
    (tmp_path / "bytes.png").write_bytes(bytes(range(128, 160)))
    os.mkfifo(tmp_path / "pipe.png")
    expected = {
        "absent.png": "there is no such file",
        "": "is a folder",
        "empty.png": r"is empty \(0 bytes\)",
        "notes.png": "not a picture that opsin reads, but text",
        "page.jpg": "but a web page",
        "bytes.png": "begin with 80 81 82",
        "pipe.png": "device or pipe",
        "notes.png/inside.png": "not a path that can be opened",
    }
    for name, message in expected.items():
        with pytest.raises(MediaError, match=message) as raised:
            open_image(tmp_path / name, mode="display")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/cat.jpg", "is an address"),
        ("FILE:///etc/passwd", "is an address"),
        ("a\0b.png", "not a path that can be opened"),
        ("x" * 5000, "not a path that can be opened"),
        (b"", "is empty"),
        (np.zeros((2, 2, 3), np.uint8), "not ndarray. For an array use PIL.Image.fromarray"),
        (None, "not NoneType"),
    ],
)
def test_sources_that_cannot_be_pictures_are_refused(source: object, message: str) -> None:
    with pytest.raises(MediaError, match=message) as raised:
        open_image(source, mode="display")
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    "uri",
    [
        "data:",
        "data:,",
        "data:image/png,plain",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64,iVBO Rw0K",
        "data:image/png;base64,iVBO\nRw0K",
        "data:image/png;base64,iVBORw0",
        "data:image/png;base64,iVB-_w0=",
        "data:image/png;base64,ünicode",
        "data:image/png;base64,iVBORw0KGgo=",
    ],
)
def test_malformed_data_uris_are_refused(uri: str) -> None:
    with pytest.raises(MediaError):
        open_image(uri, mode="display")


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "word"),
    [((20_000, 1), "max_side"), ((1, 16_385), "max_side"), ((2_010, 10), "max_ratio"), ((6_000, 6_000), "max_pixels")],
)
def test_sizes_over_a_limit_are_refused_with_the_limit_by_name(size: Size, word: str) -> None:
    for call in (open_image, image_size):
        with pytest.raises(MediaError, match=f"{size[0]}x{size[1]} px is too .*{word}"):
            call(png_bomb(*size), mode="display")
    with pytest.raises(MediaError, match=word):
        open_image(Image.new("1", size), mode="reference")


def test_limits_are_inclusive_and_can_be_changed() -> None:
    limits = Limits(max_pixels=1200, max_side=40, max_ratio=40 / 30, max_bytes=len(encoded(noise())))
    assert open_image(encoded(noise()), mode="reference", limits=limits).size == (40, 30)
    for changes in ({"max_pixels": 1199}, {"max_side": 39}, {"max_ratio": 1.33}, {"max_bytes": 100}):
        with pytest.raises(MediaError, match=next(iter(changes))):
            open_image(encoded(noise()), mode="reference", limits=limits.replace(**changes))


def test_files_and_data_uris_over_the_byte_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    start = time.process_time()
    with pytest.raises(MediaError, match=r"10240\.0 MiB is too large"):
        open_image(path, mode="display")
    with pytest.raises(MediaError, match="max_bytes"):
        open_image("data:image/png;base64," + "A" * 4000, mode="display", limits=Limits(max_bytes=2000))
    assert time.process_time() - start < 1


def gif_header(width: int, height: int) -> bytes:
    block = b"\x2c\0\0\0\0" + struct.pack("<HH", width, height) + b"\0\x02\x02\x4c\x01\0\x3b"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\xf0\0\0\0\0\0\xff\xff\xff" + block


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", 66, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(12)


def tiff_header(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def webp_header(width: int, height: int) -> bytes:
    body = (
        b"VP8X" + struct.pack("<II", 10, 0x10) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("make", [png_bomb, gif_header, bmp_header, tiff_header, webp_header], ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [(13_000, 13_000), (8_000, 8_000)])
def test_bombs_are_refused_from_their_header_in_every_format(make: object, size: Size) -> None:
    """A few bytes that claim up to 169 million pixels: refused at once, without a warning, nothing decoded."""
    data = make(*size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = time.process_time()
        with pytest.raises(MediaError):
            open_image(data, mode="display")
    assert time.process_time() - start < 0.1


def test_a_compressed_text_bomb_in_a_png_is_refused() -> None:
    text = zlib.compress(bytes(100 * 2**20), 9)
    data = encoded(noise())
    bomb = data[:33] + png_chunk(b"zTXt", b"Comment\0\0" + text) + data[33:]
    start = time.process_time()
    with pytest.raises(MediaError, match="damaged"):
        open_image(bomb, mode="display")
    assert time.process_time() - start < 0.5


def test_a_plan_that_grows_over_the_limit_is_refused_before_it_is_drawn() -> None:
    def stretched(size: Size, resized: Size) -> ImagePlan:
        canvas = Canvas(size, (0, 0), resized, (336, 336), (0, 0))
        return ImagePlan(
            size, (canvas,), (Tile(0, (0, 0, 336, 336), (1, 24, 24)),), ((1, 24, 24),), RowLayout(np.arange(576))
        )

    check_plan(stretched((16_000, 100), (53_760, 336)))
    with pytest.raises(MediaError, match=r"strip\.png: 20000x1 px is too .*max_side"):
        check_plan(stretched((20_000, 1), (6_720_000, 336)), name="strip.png")
    with pytest.raises(MediaError, match=r"grows to 2257\.9 million pixels .* \(max_derived_pixels\)"):
        check_plan(stretched((20_000, 1), (6_720_000, 336)), Limits(max_side=30_000, max_ratio=30_000))


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_pictures_are_refused_not_filled_with_grey(format_name: str, mode: str) -> None:
    data = encoded(noise((200, 150)), format_name)
    for share in (0.01, 0.3, 0.6, 0.9):
        with pytest.raises(MediaError, match=r"cut off|damaged"):
            open_image(data[: int(len(data) * share)], mode=mode)


def test_a_damaged_picture_is_told_with_its_format_size_and_length() -> None:
    data = bytearray(encoded(noise((64, 48))))
    data[60] ^= 0xFF
    with pytest.raises(MediaError, match=rf"^a\.png: its data is .*\(PNG, 64x48 px, {len(data)} bytes\)\. Copy or"):
        open_image(bytes(data), mode="display", name="a.png")


def test_a_pil_image_that_was_opened_but_not_read_is_guarded_too(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(noise((200, 150)))[:20_000])
    with (
        Image.open(path) as image,
        pytest.raises(MediaError, match=r"cut\.png: its data is cut off \(PNG, 200x150 px\)"),
    ):
        open_image(image, mode="display")


def test_pillows_own_limits_and_the_process_warnings_stay_as_they_are() -> None:
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters))
    data = encoded(noise(), "WEBP")
    threads = [threading.Thread(target=lambda: [open_image(data, mode="display") for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == before


# ---- the two modes ---------------------------------------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    values = Image.Exif()
    values[0x0112] = orientation
    return values


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(9))
def test_display_turns_pictures_upright_and_reference_leaves_them(format_name: str, orientation: int) -> None:
    """Black at the top left, white elsewhere: the corner moves as EXIF says. JPEG blurs, so look at corners."""
    image = Image.new("RGB", (64, 32), "white")
    image.paste("black", (0, 0, 24, 16))
    data = encoded(image, format_name, exif=exif(orientation))
    # Where the stored top left corner belongs, as (right?, bottom?).
    right, bottom = [(0, 0), (0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 0), (1, 1), (0, 1)][orientation]
    for mode in MODES:
        # Pillow turns TIFF itself whenever it loads one, also for the authors.
        turned = orientation if mode == "display" or format_name == "TIFF" else 1
        picture = open_image(data, mode=mode)
        assert picture.size == image_size(data, mode=mode) == ((32, 64) if turned >= 5 else (64, 32))
        x, y = (right, bottom) if turned > 1 else (0, 0)
        dark = picture.pixels.convert("L").getpixel((x * (picture.size[0] - 1), y * (picture.size[1] - 1)))
        light = picture.pixels.convert("L").getpixel(((1 - x) * (picture.size[0] - 1), (1 - y) * (picture.size[1] - 1)))
        assert dark < 40 < 200 < light
        assert any("orientation" in note for note in picture.notes) == (orientation > 1 and format_name != "TIFF")


def test_an_orientation_that_stands_behind_the_pixels_of_a_png_is_found() -> None:
    data = encoded(noise((40, 30)))
    late = data[:-12] + png_chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    assert image_size(late, mode="display") == open_image(late, mode="display").size == (30, 40)
    assert image_size(late, mode="reference") == open_image(late, mode="reference").size == (40, 30)


def test_damaged_exif_does_not_hide_a_whole_picture() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_image(data, mode="display").size == (40, 30)


def with_transparency(mode: str) -> Image.Image:
    """Left half opaque blue (grey: black), right half fully transparent red (grey: white)."""
    image = Image.new("RGBA", (8, 4), (0, 0, 255, 255))
    image.paste((255, 0, 0, 0), (4, 0, 8, 4))
    if mode == "LA":
        grey = Image.new("LA", (8, 4), (0, 255))
        grey.paste((255, 0), (4, 0, 8, 4))
        return grey
    return image


def test_transparency_is_dropped_in_reference_and_laid_on_white_in_display() -> None:
    data = encoded(with_transparency("RGBA"))
    reference, display = (open_image(data, mode=mode) for mode in MODES)
    assert [reference.pixels.getpixel((x, 0)) for x in (0, 7)] == [(0, 0, 255), (255, 0, 0)]
    assert [display.pixels.getpixel((x, 0)) for x in (0, 7)] == [(0, 0, 255), (255, 255, 255)]
    assert reference.notes == ("its transparency is dropped",)
    assert display.notes == ("its transparent parts are laid on white",)


def test_half_transparent_colours_are_mixed_with_white() -> None:
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 51))
    assert open_image(image, mode="display").pixels.getpixel((0, 0)) == (204, 204, 204)


def test_every_way_of_marking_transparency_is_seen_in_display() -> None:
    """Alpha channels, palettes with alpha, and the single transparent colour of PNG's tRNS chunk."""
    palette = Image.new("P", (8, 4), 0)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    palette.paste(1, (4, 0, 8, 4))
    colour = with_transparency("RGBA").convert("RGB")
    grey = with_transparency("LA").convert("L")
    deep = Image.fromarray(np.repeat(np.array([[0] * 4 + [9999] * 4], np.uint16), 4, axis=0))
    pictures = [
        with_transparency("RGBA"),
        with_transparency("LA"),
        encoded(with_transparency("RGBA"), "WEBP", lossless=True),
        encoded(palette, transparency=1),
        encoded(palette, transparency=b"\xff\x00"),
        encoded(palette, "GIF", transparency=1),
        encoded(colour, transparency=(255, 0, 0)),
        encoded(grey, transparency=255),
        encoded(deep, transparency=9999),
    ]
    for picture in pictures:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seen = open_image(picture, mode="display")
            open_image(picture, mode="reference")
        assert seen.pixels.getpixel((7, 3)) == (255, 255, 255)
        assert seen.pixels.getpixel((0, 0)) in ((0, 0, 255), (0, 0, 0))
        assert "its transparent parts are laid on white" in seen.notes


def test_an_alpha_channel_that_hides_nothing_changes_nothing() -> None:
    image = noise().convert("RGBA")
    display = open_image(image, mode="display")
    assert display.notes == ()
    assert np.array_equal(np.asarray(display.pixels), np.asarray(noise()))


def test_16_bit_grey_is_scaled_in_display_and_saturates_in_reference() -> None:
    values = np.array([[0, 128, 129, 255, 256, 32768, 40000, 65535]], np.uint16)
    data = encoded(Image.fromarray(values))
    display = np.asarray(open_image(data, mode="display").pixels)[0, :, 0]
    assert display.tolist() == np.rint(values[0] / 257).astype(int).tolist()
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(data, mode="reference").pixels), expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.0, 70000.0]], np.float32), [0, 0, 255]),
        (np.array([[0, 1, 255]], np.int32), [0, 1, 255]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[7, 7, 7]], np.int32), [7, 7, 7]),
        (np.array([[100_000, 100_000, 100_000]], np.int32), [0, 0, 0]),
    ],
)
def test_32_bit_grey_takes_the_first_usual_range_that_holds_it(values: np.ndarray, expected: list[int]) -> None:
    picture = open_image(Image.fromarray(values), mode="display")
    assert np.asarray(picture.pixels)[0, :, 0].tolist() == expected
    assert "32-bit grey" in picture.notes[0]


def test_cmyk_and_palettes_and_bitmaps_become_rgb() -> None:
    for mode in ("CMYK", "P", "L", "1", "YCbCr"):
        image = noise(mode="RGB").convert(mode)
        for name in MODES:
            assert np.array_equal(np.asarray(open_image(image, mode=name).pixels), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("format_name", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_read_and_noted(format_name: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], format_name, save_all=True, append_images=frames[1:])
    for mode in MODES:
        picture = open_image(data, mode=mode)
        red, green, blue = picture.pixels.getpixel((5, 5))
        assert red > 250 > 5 >= max(green, blue)
        assert picture.notes == ("the first of its frames or pages is read",)


def test_the_picture_that_is_given_is_not_changed() -> None:
    image = noise(mode="P")
    image.info["transparency"] = bytes(256)
    before = image.tobytes()
    for mode in MODES:
        open_image(image, mode=mode)
    assert image.tobytes() == before
    assert image.info["transparency"] == bytes(256)


def test_a_text_chunk_does_not_pass_for_exif() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "eXIf")
    assert image_size(encoded(noise(), pnginfo=info), mode="display") == (40, 30)
