"""`opsin serve` under load: eight requests at once against the same eight one after the other, over HTTP, as a ratio.

    python benchmarks/serving.py                 # a minute on two cores
    python benchmarks/serving.py --update-docs   # also rewrites the table in docs/serving.md

A random model with the geometry of LLaVA-1.5 (576 tokens a picture), a tower of 6 x 256 and a language model of 8 x
512, behind the real server on a free port; each request has its own question and asks for as many tokens.
Both ways take turns, a ratio is taken inside each round (above 1, requests that come together are answered with less),
and its median and range are printed, of seconds and of the process's CPU seconds, which other work on the machine
disturbs less. All answers are checked to be equal both ways.
"""

import argparse
import base64
import http.client
import io
import json
import re
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import pairwise
from pathlib import Path

import torch
from inference import photo
from report import processor_name

from families import small
from opsin import families, weights
from opsin.demo.shipped import PARTS
from opsin.nn.packed import pack
from opsin.serve.run import Server, listen, make_server
from opsin.serve.settings import Settings

PAGE = Path(__file__).parents[1] / "docs/serving.md"


def start(dtype: torch.dtype, rows: int) -> tuple[Server, threading.Thread, int]:
    """A server with the random model."""
    config = small(families.preset("llava-1.5-7b").config)
    vlm = weights.build(config, seed=0)
    with torch.no_grad():  # wider logits than the usual start gives, so that greedy choice is clear
        vlm.decoder.embed.weight.mul_(20)
        if vlm.decoder.head is not None:
            vlm.decoder.head.weight.mul_(20)
    pack(vlm.to(dtype).eval())
    model = weights.Model(vlm, config, "small", tokenizer_folder=PARTS)
    server, sock = make_server(model, Settings(name="small", max_rows=rows)), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, sock.getsockname()[1]


def request(number: int, tokens: int, *, with_picture: bool) -> bytes:
    """A question of its own, perhaps about a picture."""
    text = {"type": "text", "text": f"Question {number}: what is shown at place {number}?"}
    content: list[dict[str, object]] = [text]
    if with_picture:
        buffer = io.BytesIO()
        photo(640, 480).save(buffer, "JPEG")
        uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": uri}})
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": tokens}).encode()


def post(port: int, body: bytes) -> tuple[str, int]:
    """The answer and its number of tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    data = json.loads(response.read())
    connection.close()
    assert response.status == 200, data
    return data["choices"][0]["message"]["content"], data["usage"]["completion_tokens"]


def measure(port: int, bodies: list[bytes]) -> tuple[int, tuple[float, float], tuple[float, float]]:
    """Tokens of all answers, and (seconds, CPU seconds) one by one and at once."""
    clocks = [(time.perf_counter(), time.process_time())]
    single = [post(port, body) for body in bodies]
    clocks.append((time.perf_counter(), time.process_time()))
    with ThreadPoolExecutor(len(bodies)) as threads:
        together = list(threads.map(lambda body: post(port, body), bodies))
    clocks.append((time.perf_counter(), time.process_time()))
    assert together == single, "answers in company are not those that requests get alone"
    alone, at_once = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(clocks)]
    return sum(count for _, count in single), alone, at_once


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=("float32",), choices=("float32", "bfloat16"))
    parser.add_argument("--kinds", nargs="+", dest="requests_of", default=("text", "picture"))
    parser.add_argument("--update-docs", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lines = [
        "| dtype | request | tokens | clock | one by one | at once | ratio | range |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for dtype in given.dtypes:
        server, thread, port = start(getattr(torch, dtype), given.requests)
        try:
            for kind in given.requests_of:
                bodies = [
                    request(number, given.tokens, with_picture=kind == "picture") for number in range(given.requests)
                ]
                post(port, bodies[0])
                rounds = [measure(port, bodies) for _ in range(given.rounds)]
                for clock, unit in enumerate(("seconds", "CPU seconds")):
                    ratios = sorted(alone[clock] / at_once[clock] for _, alone, at_once in rounds)
                    single, together = (statistics.median(each[way][clock] for each in rounds) for way in (1, 2))
                    lines.append(
                        f"| {dtype} | {kind} | {rounds[0][0]} | {unit} | {single:.2f} | {together:.2f} | "
                        f"{statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |"
                    )
                    print(lines[-1], flush=True)
        finally:
            server.should_exit = True
            thread.join()
    table = "\n".join(lines)
    print(table)
    if given.update_docs:
        command = " ".join(["python benchmarks/serving.py", *sys.argv[1:]])
        machine = f"{processor_name()}, {given.threads} thread(s), torch {torch.__version__}"
        stamp = f"`{command}`, {date.today()}, {machine}:"
        page, count = re.subn(
            "<!-- serving: begin -->.*<!-- serving: end -->",
            lambda _: f"<!-- serving: begin -->\n{stamp}\n\n{table}\n<!-- serving: end -->",
            PAGE.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        assert count == 1, f"{PAGE} has no place for the table"
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
