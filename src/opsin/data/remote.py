"""Files on web servers: fetched whole into the cache folder, then read like any other.

    CACHE/downloads/0123.../NAME        the file, once it is whole
                            NAME.part   what there is of it before that; a later attempt goes on behind it
                            NAME.json   what the server said of it: bytes, etag, date
                            NAME.lock   held by the process that fetches; others wait for it

A file has its name only when as many bytes are there as the server announced, and they are on the disk.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from ssl import SSLCertVerificationError
from typing import Self
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock

from opsin.data.cache import cache_folder, write_whole
from opsin.errors import DataError

ATTEMPTS = 5
"""Attempts in a row that bring nothing new before it is given up."""
PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before the second attempt, which double with each; and the most that are waited when a server asks for it."""
TIMEOUT, CHECK_TIMEOUT = 30.0, 10.0
"""Seconds without a byte after which an attempt, or the question whether a file has changed, is given up."""
TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which trying again makes sense (RFC 9110, RFC 6585)."""
CHUNK = 1 << 20

_unreachable: set[str] = set()
"""Servers that did not answer whether a file has changed: not asked again by this process."""


@dataclass(frozen=True)
class _Said:
    """What a server says of a file."""

    num_bytes: int | None
    etag: str
    modified: str

    @classmethod
    def of(cls, headers: Message, num_bytes: int | None) -> Self:
        return cls(num_bytes, headers.get("ETag", "").strip(), headers.get("Last-Modified", "").strip())

    @classmethod
    def read(cls, file: Path) -> Self | None:
        try:
            return cls(**json.loads(file.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def condition(self) -> str:
        """What a request to go on is tied to. Weak etags do not tell bytes apart (RFC 9110, 13.1.5)."""
        return self.modified if not self.etag or self.etag.startswith("W/") else self.etag

    def may_be(self, other: "_Said") -> bool:
        """Whether two answers can be about the same bytes. Servers behind one name may differ in etags or in dates."""
        if None not in (self.num_bytes, other.num_bytes) and self.num_bytes != other.num_bytes:
            return False
        pairs = [
            pair
            for pair in (
                (self.etag.removeprefix("W/"), other.etag.removeprefix("W/")),
                (self.modified, other.modified),
            )
            if all(pair)
        ]
        return not pairs or any(mine == theirs for mine, theirs in pairs)


class _AgainError(Exception):
    """An attempt that failed for a reason that may pass."""

    def __init__(self, why: str, *, wait: float | None = None) -> None:
        """wait: seconds that the server asks for."""
        super().__init__(why)
        self.wait = wait


def is_address(path: str) -> bool:
    """Whether a path is the address of a file on a web server."""
    return path.lower().startswith(("http://", "https://"))


def fetch(address: str) -> Path:
    """The local copy of a file on a web server, fetched if need be. Raises DataError where it cannot be had whole.

    A copy that is there is used as it is. Where the server says that the file is another one by now, that is an error;
    where it cannot be asked, it is not.
    """
    return _Download(address).path()


class _Download:
    """One file."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.shown = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
        """For messages: queries may hold keys."""
        if not parts.hostname or parts.username is not None:
            told = f"{self.shown}: an address with a server and without a name and password is needed"
            raise DataError(told, kind="download")
        self.address, self.server = parts._replace(fragment="").geturl(), parts.netloc
        name = re.sub(r"[^\w.-]", "_", unquote(parts.path).rpartition("/")[2]).lstrip(".")[-100:] or "data"
        try:
            folder = cache_folder("downloads") / hashlib.sha256(self.address.encode()).hexdigest()[:32]
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        self.target, self.facts = folder / name, folder / f"{name}.json"
        self.part, self.lock = folder / f"{name}.part", folder / f"{name}.lock"

    def path(self) -> Path:
        """Where the file lies, once it is whole."""
        try:
            with FileLock(self.lock):
                said = _Said.read(self.facts)
                if self.target.exists():
                    if said is not None and self.target.stat().st_size == said.num_bytes:
                        self._check_unchanged(said)
                        return self.target
                    self.target.unlink()
                self._fetch()
                return self.target
        except OSError as error:  # of the cache; those of the network never come here
            raise self._unwritable(error) from None

    def _fetch(self) -> None:
        """Try until the file is whole, or nothing new has come for too long."""
        furthest, failures = self._num_there(), 0
        with _Progress(self.shown) as tell:
            while True:
                try:
                    self._attempt(tell)
                    return
                except _AgainError as error:
                    if self._num_there() > furthest:
                        furthest, failures = self._num_there(), 0
                    failures += 1
                    if failures == ATTEMPTS:
                        raise DataError(
                            f"{self.shown} cannot be had: {error} ({ATTEMPTS} attempts in a row brought nothing new)",
                            kind="download",
                            fix="check the address and the network; what has arrived is kept, and the same command "
                            "goes on behind it",
                        ) from None
                    time.sleep(PAUSE * 2 ** (failures - 1) if error.wait is None else min(error.wait, LONGEST_PAUSE))

    def _attempt(self, tell: "_Tell") -> None:
        """Ask once, for the rest where there is a beginning. Raises _AgainError, and DataError for what stays so."""
        known, there = _Said.read(self.facts), self._num_there()
        headers = {}
        if there and known is not None and known.condition:
            headers = {"Range": f"bytes={there}-", "If-Range": known.condition}
        with self._open(headers) as response:
            said, goes_on = self._understood(response, there, known)
            if not goes_on:
                there = 0
                write_whole(self.facts, json.dumps(asdict(said)))
            left = None if said.num_bytes is None else said.num_bytes - there
            with self.part.open("ab" if goes_on else "wb") as file:
                while left is None or left > 0:
                    tell(there, said.num_bytes)
                    try:
                        data = response.read1(CHUNK if left is None else min(CHUNK, left))
                    except (HTTPException, OSError) as error:
                        raise _AgainError(f"the connection broke after {there:,} bytes ({_why(error)})") from None
                    if not data:
                        break
                    file.write(data)
                    there += len(data)
                    left = None if left is None else left - len(data)
                if left:
                    raise _AgainError(f"the connection ended after {there:,} of {said.num_bytes:,} bytes")
                file.flush()
                os.fsync(file.fileno())
        write_whole(self.facts, json.dumps(asdict(_Said(there, said.etag, said.modified))))
        os.replace(self.part, self.target)

    def _open(self, headers: dict[str, str]) -> HTTPResponse:
        try:
            return _ask(self.address, "GET", TIMEOUT, headers)
        except HTTPError as error:
            error.close()
            answer = f"the server answers {error.code} {error.reason}"
            if error.code == 416 and headers:
                self.part.unlink()
                raise _AgainError(answer, wait=0) from None
            if error.code in TEMPORARY:
                wait = error.headers.get("Retry-After", "")
                raise _AgainError(answer, wait=float(wait) if wait.isdecimal() else None) from None
            fix = "log in where the files are and download them by hand" if error.code in (401, 403) else ""
            raise DataError(f"{self.shown} cannot be had: {answer}", kind="download", fix=fix) from None
        except (HTTPException, OSError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, SSLCertVerificationError):
                raise DataError(
                    f"{self.shown} cannot be had: its server cannot be trusted ({_why(error)})", kind="download"
                ) from None
            raise _AgainError(f"the server cannot be reached ({_why(error)})") from None

    def _understood(self, response: HTTPResponse, there: int, known: _Said | None) -> tuple[_Said, bool]:
        """What an answer says of the file, and whether it goes on behind what is there."""
        headers = response.headers
        wrong = ""
        if response.status not in (200, 206):
            wrong = f"the server answers {response.status} {response.reason}"
        elif encoding := headers.get("Content-Encoding", "").replace("identity", ""):
            wrong = f"the server sends it encoded ({encoding}), although that was not asked for"
        elif headers.get_content_type() == "text/html":
            wrong = "the server sends a web page in its place, perhaps one to log in or about the file"
        elif response.length is None and not response.chunked:
            wrong = "the server does not say how many bytes it has, so nobody can tell when it is whole"
        if wrong:
            fix = "give the address of the file itself, or download it by hand and give its path"
            raise DataError(f"{self.shown} is not read: {wrong}", kind="download", fix=fix)
        if response.status == 200:
            return _Said.of(headers, response.length), False
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", "").strip())
        said = _Said.of(headers, int(found[2]) if found else None)
        if found is None or int(found[1]) != there or known is None or not known.may_be(said):
            self.part.unlink()
            raise _AgainError("the server goes on with other bytes than those that were asked for", wait=0)
        return _Said(said.num_bytes, known.etag, known.modified), True

    def _check_unchanged(self, known: _Said) -> None:
        """Ask whether the file is still the same. No answer is no objection: the copy is whole."""
        if self.server in _unreachable:
            return
        try:
            with _ask(self.address, "HEAD", CHECK_TIMEOUT, {}) as response:
                length = response.headers.get("Content-Length", "")
                said = _Said.of(response.headers, int(length) if length.isdecimal() else None)
        except HTTPError as error:
            error.close()
            return
        except (HTTPException, OSError):
            _unreachable.add(self.server)
            return
        if not known.may_be(said):
            raise DataError(
                f"{self.shown} is another file than the one that was fetched ({_told(known)}; now {_told(said)})",
                kind="changed",
                fix=f"delete {self.target} to have the new one, or give that path to go on with the old one",
            )

    def _num_there(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _unwritable(self, error: OSError) -> DataError:
        place = error.filename or "the cache folder"
        return DataError(
            f"{self.shown} cannot be kept: {place}: {error.strerror or error}",
            kind="download",
            fix="make room, or set OPSIN_CACHE to a folder that can be written",
        )


def _ask(address: str, method: str, timeout: float, headers: dict[str, str]) -> HTTPResponse:
    about = {"User-Agent": "opsin", "Accept-Encoding": "identity", **headers}
    response = urlopen(Request(address, headers=about, method=method), timeout=timeout)
    if not isinstance(response, HTTPResponse):
        response.close()
        raise URLError("it leads to an address that is not on the web")
    return response


def _why(error: Exception) -> str:
    """The system's words for what went wrong."""
    reason = error.reason if isinstance(error, URLError) else error
    return str(getattr(reason, "strerror", None) or reason or type(reason).__name__)


def _told(said: _Said) -> str:
    about = (f"{said.num_bytes:,} bytes" if said.num_bytes is not None else "", said.modified, said.etag)
    return ", ".join(filter(None, about)) or "nothing said"


_Tell = Callable[[int, int | None], None]


class _Progress:
    """A line on the screen about a download, where the errors' stream is a screen."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(name.replace("[", r"\["), total=None)

    def __enter__(self) -> _Tell:
        self._progress.start()
        return lambda there, total: self._progress.update(self._task, completed=there, total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
