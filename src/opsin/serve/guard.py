"""What every request passes first: is it meant for this server, and may it come in? Closed unless opened here."""

import base64
import binascii
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from opsin.serve.errors import RequestError
from opsin.serve.send import Sender
from opsin.serve.settings import Settings

OPEN = ("/health",)
"""Paths that need no key: they tell nothing but whether the server lives."""


class Guard:
    """Checks name and key of every request, whatever its path."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] == "http":
            error = self._refusal(scope["path"], Headers(scope=scope))
            if error is not None:
                await Sender(send).refuse(error)
                return
        await self.app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> RequestError | None:
        hosts, key = self.settings.allowed_hosts, self.settings.api_key
        if hosts is not None and _host(headers.get("host", "")) not in hosts:
            return RequestError(
                f"this server answers for {', '.join(hosts)} only; start it with --allow-host to add a name",
                status=421,
                code="wrong_host",
            )
        if key is None or path in OPEN:
            return None
        given = _key(headers.get("authorization", ""))
        if given is None:
            message = "no API key was sent; send the header 'Authorization: Bearer KEY'"
            return RequestError(message, status=401, code="missing_api_key")
        if not hmac.compare_digest(given, key.encode()):
            return RequestError("the API key is wrong", status=401, code="invalid_api_key")
        return None


def _host(value: str) -> str:
    """The name in a Host header, without the port."""
    name = value.rpartition("]")[0] + "]" if value.startswith("[") else value.partition(":")[0]
    return name.lower()


def _key(authorization: str) -> bytes | None:
    """The key of a Bearer header, or the password of a Basic one, which is what browsers can send."""
    scheme, _, value = authorization.partition(" ")
    raw = value.strip().encode("latin-1")  # as it came: headers are bytes, read as Latin-1
    if scheme.lower() == "bearer":
        return raw
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(raw, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return None
