"""Answers over HTTP: those of a chat, whole or in pieces, alone or in company."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from opsin.generate import Chat, Sampling
from serve.conftest import MISSING, as_uri, asking, data_uri, wait_until
from toys import picture

pytest.importorskip("fastapi", reason=MISSING)
pytest.importorskip("uvicorn", reason=MISSING)

PHOTO, TALL = picture((80, 60)), picture((40, 90), seed=1)


def drawn(text, *pictures, **fields):
    return asking(text, *pictures, temperature=1.0, top_p=0.9, seed=4, **fields)


def test_an_answer_is_the_one_of_a_chat(live, tiny):
    for sampling, ask in (
        (Sampling(max_new_tokens=12), asking),
        (Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=4), drawn),
    ):
        expected = Chat(tiny, sampling=sampling).ask("Which two?", PHOTO, TALL)
        said = live.post(ask("Which two?", PHOTO, TALL)).json
        usage = expected.usage
        assert said["object"] == "chat.completion"
        assert said["model"] == "tiny"
        choice = said["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
        assert choice["finish_reason"] == {"length": "length"}.get(expected.finish, "stop")
        assert said["usage"]["prompt_tokens"] == usage.text_tokens + usage.image_tokens
        assert said["usage"]["completion_tokens"] == usage.new_tokens
        assert said["usage"]["prompt_tokens_details"]["image_tokens"] == usage.image_tokens == 18
        assert [each["size"] for each in said["usage"]["image_details"]] == [[80, 60], [40, 90]]
        assert said["opsin"]["sampling"]["temperature"] == sampling.temperature


def test_a_conversation_goes_on_as_in_a_chat(live, tiny):
    chat = Chat(tiny, sampling=Sampling(max_new_tokens=12), system_text="Be brief.")
    first = chat.ask("What is it?", PHOTO).text
    second = chat.ask("And that?", TALL).text
    shown = [{"type": "image_url", "image_url": {"url": data_uri(each), "detail": "auto"}} for each in (PHOTO, TALL)]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [shown[0], {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": first, "refusal": None, "tool_calls": None},
        {"role": "user", "content": [shown[1], {"type": "text", "text": "And that?"}]},
    ]
    assert live.post(asking(messages=messages)).text == second
    messages[0]["role"] = "developer"
    messages[1]["content"][0] = {"type": "image_url", "image_url": data_uri(PHOTO)}  # as some clients send it
    shown[1]["image_url"]["detail"] = None
    assert live.post(asking(messages=messages)).text == second


@pytest.mark.parametrize("number", [1, 3])
def test_streamed_pieces_join_to_the_whole_answer(live, number):
    fields = drawn("What now?", PHOTO, n=number, max_tokens=30)
    whole = live.post(fields).json
    said = live.post({**fields, "stream": True, "stream_options": {"include_usage": True}})
    assert said.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last = said.chunks
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [choice["delta"]["role"] for choice in chunks[0]["choices"]] == ["assistant"] * number
    texts, ends = [""] * number, [None] * number
    for chunk in chunks:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            assert ends[choice["index"]] is None
            texts[choice["index"]] += choice["delta"].get("content", "")
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]
    assert ends == [choice["finish_reason"] for choice in whole["choices"]]
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all("usage" not in chunk for chunk in live.post({**fields, "stream": True}).chunks)


def test_requests_that_come_together_are_answered_as_if_alone(serving, tiny, pause):
    live = serving(tiny)
    requests = [
        *(ask(f"Question {number}", *pictures[: number % 3], max_tokens=5 + 4 * number) for number in range(4)
          for ask, pictures in ((asking, (PHOTO, TALL)), (drawn, (TALL, PHOTO)))),
        drawn("Three, please", PHOTO, n=3),
    ]  # fmt: skip
    alone = [live.post(request).json["choices"] for request in requests]
    go = pause(live)
    with ThreadPoolExecutor(len(requests)) as threads:
        answers = [threads.submit(live.post, request) for request in requests]
        wait_until(lambda: live.service.inside == len(requests))
        go.set()
        together = [answer.result().json["choices"] for answer in answers]
    assert together == alone
    sampled = sum(len(each) for each in alone)
    assert sampled == 11
    longest = 17 + 3 * 4
    assert live.service.worker.engine.steps < longest * 3, "side by side, not one after the other"


def test_stops_seeds_and_lengths_do_what_they_say(live):
    free = live.post(asking("Go on", max_tokens=40)).json["choices"][0]
    text = free["message"]["content"]
    stop = text[4:6]
    said = live.post(asking("Go on", max_tokens=40, stop=["never", stop])).json["choices"][0]
    assert said["message"]["content"] == text[: text.index(stop)].rstrip()
    assert said["finish_reason"] == "stop"
    assert live.post(asking("Go on", max_tokens=40, stop=stop)).text == said["message"]["content"]
    short = live.post(asking("Go on", max_tokens=None, max_completion_tokens=3)).json
    assert (short["usage"]["completion_tokens"], short["choices"][0]["finish_reason"]) == (3, "length")
    texts = [live.post(asking("Go on", temperature=1, seed=seed, max_tokens=20)).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_what_asks_for_nothing_is_accepted(live):
    plain = live.post(asking()).text
    extras = {
        "user": "me", "metadata": {"a": "b"}, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
        "logprobs": False, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "seed": None,
        "stop": None, "n": None, "top_p": 1, "top_k": -1, "stream": False, "temperature": 0, "logit_bias ": None,
    }  # fmt: skip
    del extras["logit_bias "]
    assert live.post(asking(**extras)).text == plain
    request = asking()
    del request["model"]
    assert live.post(request).text == plain
    low = asking()
    low["messages"][0]["content"] = [
        {"type": "image_url", "image_url": {"url": data_uri(PHOTO), "detail": "low"}},
        {"type": "text", "text": "What is it?"},
    ]
    assert "detail 'low' does not count" in live.post(low).json["opsin"]["notes"][0]


def test_boxes_of_an_answer_come_in_pixels_of_the_picture(live, tiny, monkeypatch):
    from opsin.serve import answer as module

    monkeypatch.setattr(module, "spell", lambda *_: "a cat at [0.25, 0.25, 0.75, 0.75] and [1, 2")
    whole = live.post(asking("Where?", PHOTO)).json["choices"][0]["opsin"]
    assert whole["boxes"] == [{"label": "", "box": [20.0, 10.0, 60.0, 50.0], "image": 1}]
    assert len(whole["unread"]) == 1
    ends = [chunk["choices"][0] for chunk in live.post(asking("Where?", PHOTO, stream=True)).chunks]
    assert ends[-1]["opsin"] == whole
    assert "opsin" not in live.post(asking("Where?")).json["choices"][0], "no picture, no boxes"


def test_videos_and_sizes_for_models_that_know_them(serving, qwen, tiny, live, tmp_path):
    av = pytest.importorskip("av", reason="videos need PyAV (pip install 'opsin[video]')")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            container.mux(stream.encode(av.VideoFrame.from_image(picture((64, 48), number))))
        container.mux(stream.encode())
    part = {"type": "video_url", "video_url": {"url": as_uri(path.read_bytes(), "video/mp4")}}
    request = asking(messages=[{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}])
    server = serving(qwen)
    said = server.post(request).json
    expected = Chat(qwen, sampling=Sampling(max_new_tokens=12)).ask("What happens?", videos=[str(path)])
    assert said["choices"][0]["message"]["content"] == expected.text
    assert said["usage"]["image_details"][0]["kind"] == "video"
    assert "reads no videos" in live.post(request).refused(400)
    large = asking("?", picture((200, 200)))
    counts = [
        server.post({**large, **more}).json["usage"]["prompt_tokens_details"]["image_tokens"]
        for more in ({}, {"mm_processor_kwargs": {"max_pixels": 4 * 14 * 14}})
    ]
    assert counts == [16, 4]
    message = live.post({**large, "mm_processor_kwargs": {"max_pixels": 100}}).refused(400)
    assert "max_pixels means nothing to this model" in message


def test_a_client_that_leaves_ends_the_work(serving, tiny, pause):
    live = serving(tiny)
    pause(live, seconds=0.02).set()
    worker = live.service.worker
    survivor = asking("Stay", PHOTO, max_tokens=60)
    expected = live.post(survivor).text
    for stream in (False, True):
        with ThreadPoolExecutor(1) as threads:
            stays = threads.submit(live.post, survivor)
            connection = socket.create_connection(("127.0.0.1", live.port))
            body = json.dumps(asking("Write for ever", max_tokens=1500, stream=stream)).encode()
            head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
            wait_until(lambda: worker.engine.num_rows == 2)
            if stream:
                assert b"200 OK" in connection.recv(1000)
            connection.close()
            wait_until(lambda: worker.engine.num_rows == 1, seconds=5)
            assert stays.result().text == expected
        wait_until(lambda: not live.service.inside)
        assert worker.engine.is_idle
        assert not worker._jobs
    assert live.service.statuses[499] == 2


def test_answers_under_way_are_finished_when_the_server_is_told_to_stop(serving, tiny, pause):
    live = serving(tiny)
    pause(live, seconds=0.02).set()
    expected = live.post(asking("Long", max_tokens=50)).text
    with ThreadPoolExecutor(2) as threads:
        whole = threads.submit(live.post, asking("Long", max_tokens=50))
        stream = threads.submit(live.post, asking("Long", max_tokens=50, stream=True))
        wait_until(lambda: live.service.worker.engine.num_rows == 2)
        live.server.handle_exit(15, None)
        assert whole.result().text == expected
        parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in stream.result().chunks]
        assert "".join(parts) == expected
    live.thread.join(10)
    assert not live.thread.is_alive()
    assert not live.service.worker.is_alive
