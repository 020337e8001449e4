"""A web server on this machine that can be told to fail."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Web:
    """What it serves, how it fails, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    """By path, such as `/a.tar`."""
    etag: str = '"one"'
    ranges: bool = True
    """Whether it can go on in the middle of a file."""
    faults: list[Callable[["Handler", bytes], None]] = field(default_factory=list)
    """The next GETs are answered by these, one each."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """(method, path, Range) of each request."""
    address: str = ""

    def gets(self) -> list[str]:
        """The ranges asked for by GETs."""
        return [wanted for method, _, wanted in self.asked if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    """Answers as `web` says."""

    web: Web

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        web, path = self.web, self.path.partition("?")[0]
        wanted = self.headers.get("Range", "")
        web.asked.append((self.command, path, wanted))
        content = web.files.get(path)
        if content is None:
            self.send_error(404)
        elif not head and web.faults:
            web.faults.pop(0)(self, content)
        elif wanted and web.ranges and self.headers.get("If-Range") == web.etag:
            self.part(content, int(re.findall(r"\d+", wanted)[0]), head=head)
        else:
            self.whole(content, head=head)

    def whole(
        self, content: bytes, *, head: bool = False, announced: int | None = None, kind: str = "application/x-tar"
    ) -> None:
        """All of it. announced: a length that it has not."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        if self.web.etag:
            self.send_header("ETag", self.web.etag)
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def part(self, content: bytes, start: int, *, head: bool = False) -> None:
        """From a byte on."""
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", self.web.etag)
        self.end_headers()
        if not head:
            self.wfile.write(content[start:])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Web]:
    """A server while the block runs."""
    web = Web(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"web": web}))
    web.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def cut(after: int) -> Callable[[Handler, bytes], None]:
    """The connection ends after so many bytes of the file."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.whole(content[:after], announced=len(content))

    return answer


def status(code: int, **headers: str) -> Callable[[Handler, bytes], None]:
    """An answer without the file."""

    def answer(handler: Handler, content: bytes) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer
