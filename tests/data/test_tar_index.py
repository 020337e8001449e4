"""The list of a shard's members is kept, and only used for the very file that it was made of."""

import hashlib
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data.containers import png, write_tar
from opsin.data.files import FileSource

COUNT = 6


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


def shard(path: Path, word: str = "first") -> Path:
    members: dict[str, bytes | str] = {}
    for number in range(COUNT):
        members |= {f"{number:03d}.png": png(number), f"{number:03d}.txt": f"{word} {number:03d}"}
    return write_tar(path, members)


def answers(source: FileSource) -> list[str]:
    return [source.sample(number, 0).messages[-1].text for number in range(len(source))]


def without_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no header can be read."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the shard's headers are read")

    monkeypatch.setattr(tarfile, "open", refuse)


def test_a_second_start_reads_no_headers_and_sees_the_same(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "x.tar")
    first = FileSource(path)
    assert len(list(cache.iterdir())) == 1
    without_headers(monkeypatch)
    second = FileSource(path)
    assert second.fingerprint == first.fingerprint
    assert [second.sample(n, 0) for n in range(COUNT)] == [first.sample(n, 0) for n in range(COUNT)]
    assert FileSource(path, limit=2).fingerprint == _fingerprint(path, 2)


def _fingerprint(path: Path, records: int) -> str:
    """As runs of earlier versions wrote it down: a digest of the headers."""
    digest = hashlib.sha256()
    with path.open("rb") as file, tarfile.TarFile(fileobj=file) as tar:
        for member in tar.getmembers()[: 2 * records]:
            digest.update(f"{member.name} {member.size} {member.mtime} {member.chksum}\n".encode())
    return digest.hexdigest()


def test_fingerprints_are_those_of_the_headers(tmp_path: Path, cache: Path) -> None:
    path = shard(tmp_path / "x.tar")
    for _ in range(2):
        assert FileSource(path).fingerprint == _fingerprint(path, COUNT)


def test_another_shard_in_its_place_is_noticed(tmp_path: Path, cache: Path) -> None:
    path = shard(tmp_path / "x.tar")
    before = path.stat()
    assert answers(FileSource(path))[0] == "first 000"
    shard(path, "other")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as copying with times does
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert answers(FileSource(path))[0] == "other 000"
    # The same path over another folder's file.
    shard(tmp_path / "y.tar", "third")
    os.replace(tmp_path / "y.tar", path)
    assert answers(FileSource(path))[0] == "third 000"


@pytest.mark.parametrize("damage", ["", "[]", "{}", "half", "null", "names"])
def test_a_damaged_list_is_made_anew(tmp_path: Path, cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "x.tar")
    expected = answers(FileSource(path))
    (kept,) = cache.iterdir()
    whole = kept.read_text()
    assert '"names":["000.png"' in whole
    half, no_name = whole[: len(whole) // 2], whole.replace('"names":["000.png"', '"names":[7')
    kept.write_text({"half": half, "names": no_name}.get(damage, damage))
    assert answers(FileSource(path)) == expected
    assert kept.read_text() == whole
    without_headers(monkeypatch)
    assert answers(FileSource(path)) == expected


def test_where_none_can_be_written_all_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = shard(tmp_path / "x.tar")
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("OPSIN_CACHE", str(folder))
        assert len(FileSource(path)) == COUNT
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert len(FileSource(path)) == COUNT
    assert list(cache.iterdir()) == []


def test_part_of_a_shard_leaves_no_list(tmp_path: Path, cache: Path) -> None:
    path = shard(tmp_path / "x.tar")
    assert len(FileSource(path, limit=2)) == 2
    assert not cache.exists()
    assert len(FileSource(path)) == COUNT


def test_a_shard_that_is_still_written_leaves_no_list(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "x.tar")
    really = tarfile.open

    def grown(*given: Any, **more: Any) -> Any:
        os.utime(path)
        return really(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", grown)
        assert len(FileSource(path)) == COUNT
    assert not cache.exists()


def test_names_that_are_no_utf8_are_read(tmp_path: Path, cache: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    path = write_tar(tmp_path / "x.tar", {f"{name}.png": png(), f"{name}.txt": "a cup"})
    prints = {FileSource(path).fingerprint for _ in range(2)}
    assert len(prints) == 1
    assert len(list(cache.iterdir())) == 1
