"""A model folder, pictures good and bad, and a way to run the command line in this process."""

import io
import struct
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opsin import families, weights
from opsin.cli.app import run
from toys import byte_tokenizer, picture


@dataclass
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def refused(self) -> str:
        """The message of a command that ended in one clear error."""
        assert self.code == 2, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def opsin(capsys: pytest.CaptureFixture[str]):
    """Run `opsin ARGUMENTS`."""

    def call(*arguments: object) -> Done:
        code = run([str(each) for each in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the native format: tiny, random, but sharp enough to answer the same everywhere."""
    folder = tmp_path_factory.mktemp("model")
    config = families.preset("llava-next-tiny").config
    vlm = weights.build(config, seed=1)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.mul_(4)
    weights.save_native(folder / "tiny", vlm, config, byte_tokenizer(folder / "tokenizer"))
    return folder / "tiny"


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures by name: good.png, and what people and strangers send."""
    folder = tmp_path_factory.mktemp("pictures")
    good = picture((80, 60))
    good.save(folder / "good.png")
    picture((60, 90), seed=1).save(folder / "tall.jpg")
    good.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(good.convert("L"), np.uint16) * 257).save(folder / "deep.png")
    good.save(folder / "animated.gif", save_all=True, append_images=[picture((80, 60), seed=2)])
    turned = good.getexif()
    turned[0x0112] = 6
    picture((80, 60)).save(folder / "turned.jpg", exif=turned)
    (folder / "huge.png").write_bytes(png_header(15000, 15000))
    (folder / "line.png").write_bytes(png_header(20000, 1))
    (folder / "ribbon.png").write_bytes(png_header(9000, 10))
    (folder / "text.jpg").write_text("not a picture\n")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.jpg").write_bytes((folder / "tall.jpg").read_bytes()[:700])
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def converse(opsin, monkeypatch):
    """Run `opsin chat` with lines piped in."""

    def call(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return opsin("chat", *arguments)

    return call
