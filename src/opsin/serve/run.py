"""A server from start to end: its socket, signals, and what it says on standard error."""

import logging
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from opsin.errors import ConfigError
from opsin.serve.app import make_app
from opsin.serve.service import Service
from opsin.serve.settings import Settings
from opsin.weights import Model

DRAIN_SECONDS = 30
"""How long running answers may go on after the first signal."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises ConfigError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such address"
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {reason}. Take another --port, or a --host of this machine"
        ) from None


def serve(model: Model, settings: Settings, sock: socket.socket, *, ready: Callable[[], None]) -> bool:
    """Serve a model until a signal comes. Returns whether all answers were finished.

    ready: called once requests are answered and signals are heard.

    The first Ctrl-C, or SIGTERM, ends listening and lets running answers end; the second stops at once.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("opsin.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers, logger.propagate = [handler], False
    server = make_server(model, settings)
    server.ready = ready
    try:
        server.run(sockets=[sock])
    finally:
        server.service.close()
        sock.close()
    return not server.force_exit


def make_server(model: Model, settings: Settings) -> "Server":
    """What `serve` runs."""
    app = make_app(model, settings)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=1024,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    return Server(config, app.state.service)


class Server(uvicorn.Server):
    """Tells the service of signals, and ends by returning: a server that was asked to stop has not failed."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        self.ready: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = self.service.draining = True
        if not self.force_exit and self.service.inside:
            # Not through `print`, which a signal may have interrupted.
            os.write(2, f"\nfinishing {self.service.inside} request(s); Ctrl-C again stops at once\n".encode())
