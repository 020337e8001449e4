"""What a client is told when something goes wrong: one message, in the shape of OpenAI's errors.

Texts are our own. That of an exception that we did not write never leaves the server: it may hold paths or addresses.
"""

from typing import Any

from opsin.errors import GenerationError, MediaError, MessageError, OpsinError, PlanError

CLIENTS_OWN = (MediaError, MessageError, PlanError, GenerationError)
"""Errors of the library that speak of what the client sent."""


class RequestError(OpsinError):
    """A request that is refused, or an answer that cannot be finished."""

    def __init__(
        self, message: str, *, status: int = 400, code: str = "invalid_request", param: str | None = None
    ) -> None:
        """status: of HTTP. code: what is wrong in a word. param: the field of the request that it is about."""
        super().__init__(message, kind=code)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        if self.status in (429, 503):
            return {"Retry-After": "1"}
        return {"WWW-Authenticate": 'Basic realm="opsin", charset="UTF-8"'} if self.status == 401 else {}


def told(error: Exception) -> RequestError:
    """What a client hears of an error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, CLIENTS_OWN):
        status = 500 if error.kind == "not_finite" else 400
        return RequestError(str(error), status=status, code=error.kind or "invalid_request")
    return RequestError("something went wrong in the server; its log says what", status=500, code="internal_error")
