"""A server on a free port of this machine, with a tiny model, and a client that speaks plain HTTP."""

import base64
import contextlib
import http.client
import io
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from opsin import families, weights
from opsin.weights import Model
from toys import picture, tokenizer_folder

MISSING = "the server needs fastapi and uvicorn (pip install 'opsin[serve]')"


def data_uri(image, format="PNG") -> str:
    """A picture as clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, format)
    return as_uri(buffer.getvalue(), f"image/{format.lower()}")


def as_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(text: str = "What is it?", *pictures, **fields) -> dict[str, Any]:
    """A request: pictures, then a question."""
    shown = [{"type": "image_url", "image_url": {"url": data_uri(each)}} for each in pictures]
    content = [*shown, {"type": "text", "text": text}] if shown else text
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **fields}


@dataclass
class Said:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.json["choices"][0]["message"]["content"]

    def refused(self, status: int, code: str | None = None) -> str:
        """The message of an error in OpenAI's shape."""
        assert self.status == status, self.body
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert code is None or error["code"] == code
        return error["message"]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The events of a stream that ended well, without the mark at its end."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


class Live:
    """A running server."""

    def __init__(self, model: Model, settings) -> None:
        from opsin.serve.run import listen, make_server

        self.socket = listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.server = make_server(model, settings)
        self.service = self.server.service
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        wait_until(lambda: self.server.started)

    def call(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Said:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            headers = headers or {}
            connection.request(method, path, body, headers, encode_chunked="Transfer-Encoding" in headers)
            response = connection.getresponse()
            return Said(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Said:
        return self.call("GET", path, headers=headers)

    def post(self, data: Any, **headers: str) -> Said:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        return self.call("POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **headers})

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()


def wait_until(condition, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def build(folder: Path, preset: str) -> Model:
    """A tiny model whose answers are the same everywhere: larger weights than fresh ones."""
    config = families.preset(preset).config
    vlm = weights.build(config, seed=1)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter.mul_(4)
    return Model(vlm.eval(), config, "tiny", tokenizer_folder=tokenizer_folder(folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Model:
    return build(tmp_path_factory.mktemp("tiny"), "llava-1.5-tiny")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory) -> Model:
    return build(tmp_path_factory.mktemp("qwen"), "qwen2-vl-tiny")


@pytest.fixture
def serving():
    """Start servers that end with the test: `serving(model, some=setting)`."""
    with contextlib.ExitStack() as stack:

        def start(model: Model, **settings: Any) -> Live:
            from opsin.serve.settings import Settings

            live = Live(model, Settings(**{"name": "tiny", **settings}))
            stack.callback(live.stop)
            return live

        yield start


@pytest.fixture(scope="module")
def live(tiny):
    """One server for all tests of a file that leave it as it was."""
    from opsin.serve.settings import Settings

    running = Live(tiny, Settings(name="tiny"))
    yield running
    running.stop()


@pytest.fixture
def pause(monkeypatch):
    """Hold the model of a server back: `pause(live)` returns an event that lets it go on, once it is set.

    Counts the steps of the engine in `steps`, so that tests see whether somebody works.
    """
    opened = []

    def hold(live: Live, seconds: float = 0.0) -> threading.Event:
        go, engine, real = threading.Event(), live.service.worker.engine, live.service.worker.engine.step
        engine.steps = 0

        def step():
            go.wait(30)
            time.sleep(seconds)
            engine.steps += 1
            return real()

        monkeypatch.setattr(engine, "step", step)
        opened.append(go)
        return go

    yield hold
    for go in opened:
        go.set()


__all__ = ["Live", "Said", "as_uri", "asking", "data_uri", "picture", "wait_until"]
