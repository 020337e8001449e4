"""What a server refuses, and how: one message in OpenAI's shape, and it serves on."""

import base64
import io
import json
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from cli.conftest import png_header
from serve.conftest import MISSING, as_uri, asking, data_uri, wait_until
from toys import picture

pytest.importorskip("fastapi", reason=MISSING)
pytest.importorskip("uvicorn", reason=MISSING)

PHOTO = picture((80, 60))


def showing(url, kind="image_url"):
    content = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "?"}]
    return asking(messages=[{"role": "user", "content": content}])


@pytest.fixture(autouse=True)
def still_answers(request):
    """After each refusal the same question gets the same answer."""
    yield
    if "live" in request.fixturenames:
        live = request.getfixturevalue("live")
        assert live.post(asking("Canary", PHOTO)).text == live.post(asking("Canary", PHOTO, stream=False)).text
        wait_until(lambda: live.service.inside == 0)


ADDRESSES = [
    *("http://127.0.0.1:1/a.png", "https://example.com/a.png", "HTTP://[::1]/", "ftp://x/y", "gopher://x", "//host/a"),
    *("file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd", "/etc/passwd", "../../etc/passwd", "a.png", ""),
    *(
        " data:image/png;base64,AAAA",
        "\x00/etc/passwd",
        "~/a.png",
        "blob:abc",
        "http://0x7f000001/",
        "/proc/self/environ",
    ),
]


def test_addresses_and_paths_are_refused_and_nothing_is_opened(live):
    opened = []

    def hook(event, arguments):
        if watching and event in ("open", "socket.connect", "socket.getaddrinfo"):
            opened.append((event, str(arguments)[:100]))

    watching = False
    sys.addaudithook(hook)
    for url in ADDRESSES:
        for kind in ("image_url", "video_url"):
            body = json.dumps(showing(url, kind)).encode()
            live.get("/health")
            watching = True
            message = live.post(body).refused(400, "address_refused")
            watching = False
            assert "is not a data: URI" in message
    # The client of this test itself connects to the server, once a request.
    own = [each for each in opened if each[0].startswith("socket") and str(live.port) in each[1]]
    assert [each for each in opened if each not in own] == []


def bomb(mode, size, format):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format)
    return buffer.getvalue()


BAD_PICTURES = {
    "huge": (as_uri(png_header(15000, 15000)), "is too large"),
    "line": (as_uri(png_header(20000, 1)), "is too large: one side is longer"),
    "ribbon": (as_uri(png_header(9000, 10)), "too elongated"),
    "bomb": (as_uri(bomb("1", (12000, 12000), "PNG")), "is too large"),
    "gif bomb": (as_uri(bomb("P", (16000, 16000), "GIF"), "image/gif"), "is too large"),
    "text": (as_uri(b"not a picture"), "is not a picture that opsin reads, but text"),
    "empty": ("data:image/png;base64,", "is empty"),
    "cut": (as_uri(base64.b64decode(data_uri(PHOTO).split(",")[1])[:400]), "image 1"),
    "no base64": ("data:image/png;base64,%%%%", "not valid base64"),
    "broken base64": ("data:image/png;base64,AAA", "not valid base64"),
    "line breaks": (data_uri(PHOTO)[:60] + "\n" + data_uri(PHOTO)[60:], "not valid base64"),
    "plain": ("data:image/png,abc", "is not of the form"),
    "no comma": ("data:image/png;base64", "is not of the form"),
    "svg": (as_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "SVG"),
    "tiff": (as_uri(bomb("RGB", (8, 8), "TIFF"), "image/tiff"), "is a TIFF picture; this server reads JPEG, PNG"),
    "bmp": (as_uri(bomb("RGB", (8, 8), "BMP"), "image/bmp"), "is a BMP picture"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_refused_with_a_reason(live, name):
    url, reason = BAD_PICTURES[name]
    started = time.perf_counter()
    message = live.post(showing(url)).refused(400)
    assert reason in message
    assert time.perf_counter() - started < 2, "before it is decoded"
    assert live.post({**showing(url), "stream": True}).status == 400, "with the same status when streaming"


def test_what_a_picture_is_called_does_not_count(live):
    assert live.post(showing(data_uri(PHOTO).replace("image/png", "text/plain"))).status == 200


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": []}, "the list of messages is empty"),
        ({"messages": "hello"}, "messages: Input should be a valid list"),
        ({"messages": ["hello"]}, "messages[0] must be an object"),
        ({"messages": [{"role": "user"}]}, "messages[0]: 'content' must be text or a list"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]: 'content' must be text or a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]: the role is 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0]: the role is ['user']"),
        ({"messages": [{"role": "user", "content": "x", "name": "Bob"}]}, "messages[0] has 'name'"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "unknown key 'contents' (did you mean 'content'?)"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0]: the type is 'audio'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
            "the type is 'image'",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]: the type is None"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part of type image_url is"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "needs at least one"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "nothing to answer"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"temperature": "warm"}, "temperature: Input should be a valid number"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 1, "top_p": 0}, "top_p is 0"),
        ({"temperature": 1, "top_k": -7}, "top_k is -7"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 1.5}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "send one"),
        ({"max_tokens": 10**6}, "together more than the 4096 that the model was trained for"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"n": 0}, "n is 0; it must be from 1 to 8"),
        ({"n": 9, "temperature": 1}, "n is 9; it must be from 1 to 8"),
        ({"n": 2}, "n is 2, but at temperature 0 all answers would be the same"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": ["x"] * 17}, "17 stop strings"),
        ({"stop": ["x" * 257]}, "a stop string has 257 characters"),
        ({"stop": ""}, "a stop string has 0 characters"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stream": "yes"}, "stream: Input should be a valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options are for streamed answers"),
        ({"stream": True, "stream_options": {"include": True}}, "include"),
        ({"frequency_penalty": 0.5}, "'frequency_penalty' is not supported"),
        ({"logprobs": True}, "'logprobs' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
        ({"tools": [{"type": "function"}]}, "'tools' is not supported"),
        ({"chat_template": "{{ 1 }}"}, "'chat_template' is not supported"),
        ({"best_of": 4}, "'best_of' is not supported"),
        ({"tempreature": 1}, "unknown field 'tempreature' (did you mean 'temperature'?)"),
    ],
)
def test_fields_that_cannot_be_followed_are_refused_by_name(live, fields, reason):
    assert reason in live.post(asking(**fields)).refused(400)


def test_a_foreign_models_name_is_not_answered_for(live):
    assert "there is no model 'gpt-4o' here; this server has 'tiny'" in live.post(asking(model="gpt-4o")).refused(404)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b'{"messages": NaN}', b"1" * 5000, b'{"a":' * 50_000),
        *(b"[" * 100_000, json.dumps({"messages": [], "metadata": eval("[" * 40 + "]" * 40)}).encode()),
    ],
    ids=range(11),
)
def test_what_is_no_request_is_refused(live, body):
    live.post(body).refused(400, "invalid_json")


def test_the_text_of_control_tokens_and_placeholders_stays_text(live, tiny):
    texts = [
        "<image>",
        "<video>",
        "</s><s>",
        "<|im_start|>system",
        "<img>/etc/passwd</img>",
        "<|vision_start|>",
        "\x00",
    ]
    controls = set(tiny.tokenizer.controls.values())
    for text in (*texts, *tiny.tokenizer.controls):
        plain = live.service.encoder.encode
        said = live.post(asking(f"a{text}b"))
        assert said.status == 200, said.body
        from opsin.text.messages import ask

        ids, empty = (plain(ask(each)).ids.tolist() for each in (f"a{text}b", "ab"))
        assert sum(each in controls for each in ids) == sum(each in controls for each in empty)
        assert said.json["usage"]["prompt_tokens"] == len(ids)
        assert live.post(asking(f"a{text}b", PHOTO)).json["usage"]["prompt_tokens_details"]["image_tokens"] == 9


def test_limits_hold_at_the_limit_and_refuse_above_it(serving, tiny):
    live = serving(tiny, max_images=2, max_body_bytes=4000, body_timeout_seconds=1, max_choices=3, max_rows=4)
    small = picture((8, 8))
    assert live.post(asking("?", small, small)).status == 200
    assert "more than 2 images" in live.post(asking("?", small, small, small)).refused(400, "too_many_images")
    padded = json.dumps(asking()).encode()
    assert live.post(padded + b" " * (4000 - len(padded))).status == 200
    live.post(padded + b" " * (4001 - len(padded))).refused(413, "request_too_large")
    chunked = live.call(
        "POST",
        "/v1/chat/completions",
        iter([padded, b" " * 2000, b" " * 3000]),  # its length is not told beforehand
        {"Content-Type": "application/json", "Transfer-Encoding": "chunked"},
    )
    chunked.refused(413, "request_too_large")
    assert live.post(asking(n=3, temperature=1)).status == 200
    live.post(asking(n=4, temperature=1)).refused(400)
    live.call("POST", "/v1/chat/completions", padded).refused(415)
    slow = {"Content-Type": "application/json", "Content-Length": "100"}
    live.call("POST", "/v1/chat/completions", b"{", slow).refused(408, "timeout")
    assert "no POST /v1/completions" in live.call("POST", "/v1/completions", b"{}").refused(404, "no_such_route")
    live.get("/v1/chat/completions").refused(405)


def test_the_context_is_counted_in_numbers_before_any_picture_is_decoded(live, monkeypatch):
    length = live.post(asking("?", PHOTO)).json["usage"]["prompt_tokens"]
    fits = live.post(asking("?", PHOTO, max_tokens=4096 - length, stop=[" "]))
    assert fits.status == 200
    monkeypatch.setattr(live.service.encoder, "prepare_image", None)
    message = live.post(asking("?", PHOTO, max_tokens=4097 - length)).refused(400, "context_length_exceeded")
    assert f"the prompt takes {length} tokens (9 of them for pictures)" in message
    assert f"the answer may take {4097 - length}" in message
    monkeypatch.undo()
    assert "takes" in live.post(asking("word " * 2000)).refused(400, "context_length_exceeded")
    message = live.post(asking("a" * 70_000)).refused(400, "context_length_exceeded")
    assert "the text has 70000 characters, at most 65536 are read" in message


def test_a_full_queue_refuses_at_once_and_recovers(serving, tiny, pause):
    live = serving(tiny, max_rows=1, max_queue=2)
    go = pause(live)
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(live.post, asking(stream=stream)) for stream in (False, True, False)]
        wait_until(lambda: live.service.inside == 3)
        for stream in (False, True):
            started = time.perf_counter()
            said = live.post(asking(stream=stream))
            assert "1 answered at once and 2 waiting" in said.refused(429, "queue_full")
            assert said.headers["retry-after"] == "1"
            assert time.perf_counter() - started < 0.5
        go.set()
        assert [each.result().status for each in waiting] == [200] * 3
    assert live.post(asking()).status == 200


def test_time_that_runs_out_is_told_and_ends_the_work(serving, tiny, pause):
    live = serving(tiny, timeout_seconds=0.6)
    go = pause(live)
    for stream in (False, True):
        live.post(asking(stream=stream)).refused(503, "queue_timeout")
    go.set()
    wait_until(lambda: live.service.worker.engine.is_idle)
    pause(live, seconds=0.05).set()
    message = live.post(asking(max_tokens=1000)).refused(504, "timeout")
    assert re.search(r"longer than 0.6 s and was stopped after \d+ tokens", message)
    said = live.post(asking(max_tokens=1000, stream=True))
    *events, end = said.body.decode().split("\n\n")
    assert said.status == 200
    assert end == ""
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until(lambda: live.service.worker.engine.is_idle)


def test_our_own_mistakes_tell_nothing_but_that_they_happened(serving, tiny, monkeypatch):
    live = serving(tiny)
    expected = live.post(asking()).text
    secret = "cannot open /root/secret at 0x7f00deadbeef"
    for owner, name in ((live.service.encoder, "encode"), (tiny.vlm, "hidden"), (live.service, "_prepare")):
        with monkeypatch.context() as patch:

            def broken(*_, **__):
                raise RuntimeError(secret)

            patch.setattr(owner, name, broken)
            for stream in (False, True):
                message = live.post(asking(stream=stream)).refused(500, "internal_error")
                assert message == "something went wrong in the server; its log says what"
        assert live.post(asking()).text == expected


def test_every_route_but_health_needs_the_key(serving, tiny):
    live = serving(tiny, api_key="s3cret-ключ")
    assert live.get("/health").json == {"status": "ok"}
    routes = [route.path for route in live.server.config.app.router.routes]
    assert {"/", "/v1/models", "/metrics", "/v1/chat/completions"} <= set(routes)
    right = base64.b64encode("anyone:s3cret-ключ".encode()).decode()
    for path in (*routes, "/nothing", "/health/", "//health", "/v1/../health"):
        if path != "/health":
            assert "no API key was sent" in live.get(path).refused(401, "missing_api_key")
            for wrong in ("Bearer nope", "Bearer ", "bearer s3cret", "Basic !!!", "Basic " + "QUJD", "Digest x"):
                live.get(path, Authorization=wrong).refused(401)
    assert live.get("/v1/models", Authorization=f"Basic {right}").json["data"][0]["id"] == "tiny"
    raw = "s3cret-ключ".encode().decode("latin-1")  # what http.client sends as the bytes of UTF-8
    assert live.get("/v1/models", Authorization=f"Bearer {raw}").status == 200
    live.post(asking()).refused(401)


def test_a_bearer_key_opens_the_server(serving, tiny):
    live = serving(tiny, api_key="s3cret")
    assert live.post(asking(), Authorization="Bearer s3cret").status == 200
    live.post(asking(), Authorization="Bearer s3cre").refused(401, "invalid_api_key")
    assert live.get("/", Authorization="Bearer s3cret").status == 200
    assert live.get("/").headers["www-authenticate"].startswith("Basic")


def test_a_page_under_a_foreign_name_cannot_use_a_local_server(serving, tiny):
    live = serving(tiny, allowed_hosts=("localhost", "127.0.0.1", "[::1]"))
    for host, status in (("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 421), ("", 421)):
        assert live.get("/health", Host=host).status == status
    said = live.call("OPTIONS", "/v1/chat/completions", headers={"Origin": "https://evil.example"})
    assert said.status == 405
    assert not [name for name in said.headers if name.startswith("access-control")]


def test_the_other_routes(live):
    models = live.get("/v1/models").json
    assert models["object"] == "list"
    assert [each["id"] for each in models["data"]] == ["tiny"]
    assert models["data"][0]["max_model_len"] == 4096
    assert live.get("/v1/models/tiny").json == models["data"][0]
    live.get("/v1/models/a/b").refused(404, "model_not_found")
    for path in ("/docs", "/openapi.json", "/redoc", "/v1/embeddings", "/page/index.html", "/../../etc/passwd"):
        live.get(path).refused(404, "no_such_route")
    metrics = live.get("/metrics").body.decode()
    assert re.search(r'^opsin_requests_total\{status="200"\} \d+$', metrics, re.M)
    page = live.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|url\(", page.body.decode()), "nothing from elsewhere"


def mutated(random_, request):
    """A request with one thing changed: a value of another type, a key gone or new, a byte of its text."""
    odd = [
        None,
        True,
        -1,
        0,
        1e308,
        10**20,
        "",
        "\x00",
        "<image>",
        [],
        {},
        [[]],
        {"a": 1},
        "data:,",
        "\ud83d",
        ["x"] * 9,
    ]
    data = json.loads(json.dumps(request))
    places = []

    def walk(node):
        for key in list(node.keys() if isinstance(node, dict) else range(len(node))):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(data)
    node, key = random_.choice(places)
    kind = random_.random()
    if kind < 0.6:
        node[key] = random_.choice(odd)
    elif kind < 0.75 and isinstance(node, dict):
        node[random_.choice([*data, "x", "type", "url", "role"])] = node.pop(key)
    elif kind < 0.9 and isinstance(node[key], str) and node[key]:
        place = random_.randrange(len(node[key]))
        node[key] = node[key][:place] + chr(random_.choice([0, 10, 37, 65, 0x430, 0x1F600])) + node[key][place + 1 :]
    else:
        del node[key]
    return data


def fuzz(live, count, seed):
    random_ = random.Random(seed)
    base = asking("What?", picture((8, 8)), temperature=1.0, seed=3, top_p=0.9, stop=["x"], n=1, stream=False)
    base["max_tokens"] = 2
    base["messages"].insert(0, {"role": "system", "content": "Brief."})
    canary = live.post(base).text
    statuses = {}
    for _ in range(count):
        said = live.post(mutated(random_, base))
        statuses[said.status] = statuses.get(said.status, 0) + 1
        assert said.status in (200, 400, 404, 413), said.body
        if said.status != 200:
            text = said.body.decode()
            assert not re.search(r"0x[0-9a-fA-F]{6,}|Traceback|site-packages|/root|File \"", text), text
    assert live.post(base).text == canary
    return statuses


def test_mutated_requests_get_an_answer_or_a_refusal(live):
    assert fuzz(live, 250, seed=1)[400] > 50


@pytest.mark.slow
def test_thousands_of_mutated_requests(live):
    """Evidence for docs/serving.md: 20,000 requests."""
    print(fuzz(live, 20_000, seed=2))
