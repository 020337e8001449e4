"""Data on web servers: whole or not at all, whatever the server and the network do."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.containers import png, write_json, write_tar
from data.web import Handler, Web, cut, serving, status
from opsin.cli.app import run as opsin
from opsin.data import remote
from opsin.data.files import FileSource
from opsin.data.remote import ATTEMPTS, fetch
from opsin.errors import DataError

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def web() -> Iterator[Web]:
    with serving({"/x.bin": CONTENT}) as web:
        yield web


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "_unreachable", set())
    return tmp_path / "cache" / "downloads"


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would be waited."""
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def kept(cache: Path) -> list[str]:
    """Files of the cache, but for locks."""
    return sorted(file.name for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock")


def test_shards_and_lines_are_read_as_if_they_were_here(tmp_path: Path, web: Web) -> None:
    for number in range(2):
        members: dict[str, bytes | str] = {f"{n}.png": png(n) for n in range(2)} | {
            f"{n}.txt": f"{n}" for n in range(2)
        }
        path = write_tar(tmp_path / f"shard-{number}.tar", dict(sorted(members.items())))
        web.files[f"/data/{path.name}"] = path.read_bytes()
    turns = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
    lines = write_json(tmp_path / "x.jsonl", [{"conversations": turns}] * 3)
    web.files["/data/x.jsonl"] = lines.read_bytes()
    for name, count in (("shard-{0..1}.tar", 4), ("x.jsonl", 3)):
        here = FileSource(tmp_path / name)
        web.asked.clear()
        there = FileSource(f"{web.address}/data/{name}")
        assert there.fingerprint == here.fingerprint
        for index in range(count):
            mine, other = here.sample(index, 0), there.sample(index, 0)
            assert (mine.messages, mine.images) == (other.messages, other.images)
        num_files = len(web.gets())
        again = FileSource(f"{web.address}/data/{name}#2")
        assert len(again) == 2
        assert len(web.gets()) == num_files  # asked whether they changed, and no more


def test_pictures_that_records_name_are_local(tmp_path: Path, web: Web) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "So."}]
    web.files["/x.jsonl"] = json.dumps({"image": "a.png", "conversations": turns}).encode()
    with pytest.raises(DataError, match=r"x\.jsonl record 1 .* picture .*a\.png is not there.*set image_root"):
        FileSource(f"{web.address}/x.jsonl")
    (tmp_path / "a.png").write_bytes(png())
    assert FileSource(f"{web.address}/x.jsonl", image_root=tmp_path).sample(0, 0).images == (tmp_path / "a.png",)


def test_a_broken_connection_is_gone_on_with_behind_what_has_arrived(web: Web, cache: Path) -> None:
    web.faults = [cut(1000), status(500)]
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT
    assert web.gets() == ["", "bytes=1000-", "bytes=1000-"]
    assert kept(cache) == ["x.bin", "x.bin.json"]


@pytest.mark.parametrize("how", ["no ranges", "no etag", "weak etag"])
def test_where_a_server_cannot_go_on_it_starts_over(web: Web, how: str) -> None:
    web.ranges = how != "no ranges"
    web.etag = {"no etag": "", "weak etag": 'W/"one"'}.get(how, web.etag)
    web.faults = [cut(1000), cut(3000)]
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT


def test_a_file_that_changes_on_the_way_is_never_mixed(web: Web) -> None:
    def change(handler: Handler, content: bytes) -> None:
        cut(1000)(handler, content)
        web.files["/x.bin"], web.etag = CONTENT[::-1], '"two"'

    web.faults = [change]
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT[::-1]


def test_a_server_that_goes_on_with_other_bytes_is_not_believed(web: Web) -> None:
    web.faults = [cut(1000), lambda handler, content: handler.part(content, 1001)]
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT
    assert web.gets() == ["", "bytes=1000-", ""]


def test_what_may_pass_is_tried_again_with_growing_pauses(web: Web, pauses: list[float]) -> None:
    web.faults = [status(500), status(503, Retry_After="7"), status(502), status(429, Retry_After="9999")]
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT
    assert pauses == [1, 7, 4, 60]


def test_what_will_not_pass_is_told_at_once(web: Web, cache: Path, pauses: list[float]) -> None:
    with pytest.raises(DataError, match=rf"^{web.address}/none\.tar cannot be had: the server answers 404 Not Found$"):
        fetch(f"{web.address}/none.tar?key=secret")
    web.faults = [status(403)]
    with pytest.raises(DataError, match="the server answers 403 Forbidden; log in"):
        fetch(f"{web.address}/x.bin")
    assert (len(web.asked), pauses, kept(cache)) == (2, [], [])


def test_attempts_that_bring_nothing_new_are_counted(web: Web, cache: Path, pauses: list[float]) -> None:
    web.faults = [status(500)] * ATTEMPTS
    told = rf"x\.bin cannot be had: the server answers 500 Internal Server Error \({ATTEMPTS} attempts in a row"
    with pytest.raises(DataError, match=told):
        fetch(f"{web.address}/x.bin")
    assert pauses == [1, 2, 4, 8]
    assert kept(cache) == []
    web.faults = [cut(100 * number) for number in range(1, 2 * ATTEMPTS)]  # each brings something
    web.ranges = False
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT


def test_a_wrong_length_is_never_taken_for_the_file(web: Web, cache: Path) -> None:
    web.faults = [lambda handler, content: handler.whole(content, announced=len(content) + 100)] * ATTEMPTS
    with pytest.raises(DataError, match=r"ended after 10,240 of 10,340 bytes .* the same command goes on behind it"):
        fetch(f"{web.address}/x.bin")
    assert kept(cache) == ["x.bin.json", "x.bin.part"]
    # A later start asks for what is missing, is told that nothing is, and begins again.
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT


def test_a_later_start_goes_on_behind_what_an_earlier_one_left(web: Web) -> None:
    web.faults = [cut(4000), *[status(500)] * ATTEMPTS]
    with pytest.raises(DataError, match="answers 500"):
        fetch(f"{web.address}/x.bin")
    web.asked.clear()
    web.faults = []
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT
    assert web.gets() == ["bytes=4000-"]


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("page", "sends a web page in its place"),
        ("packed", r"sends it encoded \(gzip\)"),
        ("endless", "does not say how many bytes it has"),
        ("empty", "answers 204 No Content"),
    ],
)
def test_answers_that_are_not_the_file_are_refused(web: Web, cache: Path, kind: str, told: str) -> None:
    def answer(handler: Handler, content: bytes) -> None:
        if kind == "page":
            handler.whole(b"<html>log in</html>", kind="text/html; charset=utf-8")
            return
        handler.send_response(204 if kind == "empty" else 200)
        if kind == "packed":
            handler.send_header("Content-Encoding", "gzip")
            handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if kind != "empty":
            handler.wfile.write(content)

    web.faults = [answer]
    with pytest.raises(DataError, match=rf"x\.bin is not read: the server {told}"):
        fetch(f"{web.address}/x.bin")
    assert kept(cache) == []


def chunked(content: bytes, *, ended: bool) -> bytes:
    pieces = [content[start : start + 3000] for start in range(0, len(content), 3000)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return body + b"0\r\n\r\n" if ended else body


def test_a_file_of_unknown_length_in_pieces_is_whole_when_the_last_piece_has_come(web: Web) -> None:
    def in_pieces(*, ended: bool):
        def answer(handler: Handler, content: bytes) -> None:
            handler.protocol_version = "HTTP/1.1"
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.send_header("Connection", "close")
            handler.end_headers()
            handler.wfile.write(chunked(content, ended=ended))
            handler.close_connection = True

        return answer

    web.faults = [in_pieces(ended=False), in_pieces(ended=True)]
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT
    assert len(web.gets()) == 2


def test_a_copy_that_is_here_is_used_and_a_changed_file_is_told_of(web: Web, cache: Path) -> None:
    path = fetch(f"{web.address}/x.bin")
    assert fetch(f"{web.address}/x.bin") == path
    web.etag, web.files["/x.bin"] = '"two"', CONTENT + b"more"
    told = (
        r"is another file than the one that was fetched \(10,240 bytes, \"one\"; now 10,244 bytes, \"two\"\); delete "
    )
    with pytest.raises(DataError, match=told):
        fetch(f"{web.address}/x.bin")
    path.unlink()
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT + b"more"
    path.write_bytes(b"cut")  # somebody spoilt the copy
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT + b"more"
    web.files.clear()  # the server has it no longer: the copy stays good
    assert fetch(f"{web.address}/x.bin").read_bytes() == CONTENT + b"more"


def test_without_the_server_a_copy_is_enough_and_nothing_else_is(web: Web, pauses: list[float]) -> None:
    with serving({"/x.bin": CONTENT}) as other:
        fetch(f"{other.address}/x.bin")
    assert fetch(f"{other.address}/x.bin").read_bytes() == CONTENT
    assert pauses == []
    with pytest.raises(DataError, match=r"y\.bin cannot be had: the server cannot be reached \(Connection refused\)"):
        fetch(f"{other.address}/y.bin")


def test_several_that_want_the_same_file_fetch_it_once(web: Web) -> None:
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(fetch, [f"{web.address}/x.bin"] * 4))
    assert len(paths) == 1
    assert web.gets() == [""]


def test_queries_decide_and_are_not_told(web: Web, cache: Path) -> None:
    one, two = (fetch(f"{web.address}/x.bin?version={number}&key=secret") for number in (1, 2))
    assert one != two
    assert one.name == two.name == "x.bin"
    assert "secret" not in json.dumps([file.read_text(errors="ignore") for file in cache.rglob("*.json")])


def test_addresses_that_cannot_be_meant_are_refused(web: Web) -> None:
    with pytest.raises(DataError, match=r"web servers do not list their files.*write \{000\.\.010\}"):
        FileSource(f"{web.address}/shard-*.tar")
    with pytest.raises(DataError, match="without a name and password"):
        fetch("http://me:secret@127.0.0.1/x.bin")
    with pytest.raises(DataError, match="without a name and password"):
        fetch("http:///x.bin")
    assert web.asked == []


def test_a_cache_that_cannot_be_written_is_told_of(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"x\.bin cannot be kept: .*file.*; make room, or set OPSIN_CACHE"):
        fetch(f"{web.address}/x.bin")


def test_data_check_reads_addresses_and_tells_what_a_server_refuses(
    web: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
    web.files["/x.jsonl"] = json.dumps({"conversations": turns}).encode()
    assert opsin(["data", "check", f"{web.address}/x.jsonl"]) == 0
    capsys.readouterr()
    assert opsin(["data", "check", f"{web.address}/none.jsonl", "--json"]) == 2
    ((problem,),) = [each["problems"] for each in json.loads(capsys.readouterr().out)["sets"]]
    assert problem["where"] == f"{web.address}/none.jsonl"
    assert (problem["kind"], problem["message"]) == ("download", "cannot be had: the server answers 404 Not Found")
