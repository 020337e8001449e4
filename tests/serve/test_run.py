"""`opsin serve` as people start and stop it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from opsin import weights
from opsin.cli.app import run
from serve.conftest import MISSING, asking, wait_until

pytest.importorskip("fastapi", reason=MISSING)
pytest.importorskip("uvicorn", reason=MISSING)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """The tiny model as a folder."""
    path = tmp_path_factory.mktemp("served") / "mine"
    weights.save_native(path, tiny.vlm, tiny.config, tiny.tokenizer)
    return path


class Process:
    """A server in a process of its own."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "opsin.cli", "serve", *map(str, arguments), "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.said = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        wait_until(lambda: "is served at" in self.said or self.process.poll() is not None, 60)
        found = re.search(r"is served at http://127.0.0.1:(\d+) ", self.said)
        assert found, self.said
        self.port = int(found[1])

    def _read(self) -> None:
        for line in self.process.stderr:
            self.said += line

    def post(self, data, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Content-Type": "application/json", **headers}
        connection.request("POST", "/v1/chat/completions", json.dumps(data), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def end(self) -> int:
        code = self.process.wait(20)
        self.reader.join(5)
        return code


def test_a_folder_is_served_until_sigterm_which_lets_answers_end(folder):
    server = Process(folder, "--max-tokens", 3, OPSIN_API_KEY="s3cret")
    try:
        assert "mine is served at" in server.said
        request = {**asking(), "model": "mine"}
        assert server.post(request)[0] == 401
        key = {"Authorization": "Bearer s3cret"}
        status, said = server.post({**request, "max_tokens": None}, **key)
        assert (status, said["usage"]["completion_tokens"]) == (200, 3)
        answers = []
        long = {**request, "max_tokens": 600}
        thread = threading.Thread(target=lambda: answers.append(server.post(long, **key)))
        thread.start()
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        thread.join(30)
        assert answers[0][0] == 200
        assert server.end() == 0
        assert "finishing 1 request(s)" in server.said
        assert "Traceback" not in server.said
        assert re.search(r"^\d\d:\d\d:\d\d 200 in \d+\.\d\d s, \d+ \+ 3 tokens$", server.said, re.M)
    finally:
        server.process.kill()


def test_a_second_ctrl_c_stops_at_once(folder):
    server = Process(folder)
    try:
        answers = []
        long = {**asking(max_tokens=3000), "model": "mine"}
        thread = threading.Thread(target=lambda: answers.append(server.post(long)))
        thread.start()
        time.sleep(0.3)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        started = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 130
        assert time.monotonic() - started < 10
        thread.join(5)
        status, said = answers[0]
        assert (status, said["error"]["code"]) == (503, "shutting_down")
    finally:
        server.process.kill()


def test_what_cannot_be_served_is_told_before_the_model_is_loaded(capsys, folder, monkeypatch):
    def refused(*arguments: object) -> str:
        assert run(["serve", str(folder), *map(str, arguments)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in refused("--port", port)
    assert "cannot listen on no.such.host.invalid" in refused("--host", "no.such.host.invalid")
    assert "the API key is empty" in refused("--api-key", " ")
    monkeypatch.setattr("opsin.cli.serve.find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    assert "uvicorn must be installed to serve: pip install 'opsin[serve]'" in refused()
