"""Answers on their way out: JSON at once, or server-sent events."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

from opsin.serve.errors import RequestError


def to_json(data: Any) -> bytes:
    """Compact JSON. Half surrogate pairs, which a client may have sent, are escaped."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


class Sender:
    """One answer of HTTP."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        """Once it is sent."""
        self.is_streaming = False
        """Whether it is events that are sent."""

    async def json(self, data: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """A whole answer."""
        body = to_json(data)
        await self._start(status, {"content-type": "application/json", "content-length": f"{len(body)}"}, headers)
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, error: RequestError) -> None:
        """An error, before anything else was sent."""
        await self.json(error.body, status=error.status, headers=error.headers)

    async def open_events(self) -> None:
        """The head of a stream of events. Proxies are told to hand every one on at once."""
        self.is_streaming = True
        head = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        await self._start(200, head, {"x-accel-buffering": "no"})

    async def event(self, data: Any) -> None:
        """One event."""
        await self._send({"type": "http.response.body", "body": b"data: " + to_json(data) + b"\n\n", "more_body": True})

    async def close_events(self, *, done: bool) -> None:
        """The end of the events. done: whether the answer is complete, which the protocol marks."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if done else b""})

    async def _start(self, status: int, head: Mapping[str, str], more: Mapping[str, str] | None) -> None:
        self.status = status
        fields = [(name.lower().encode(), value.encode("latin-1")) for name, value in {**head, **(more or {})}.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": fields})
