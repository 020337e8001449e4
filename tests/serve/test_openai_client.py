"""OpenAI's own client and the server: what the client makes of answers, streams and refusals. Where it is installed."""

import asyncio
import io

import pytest
from PIL import Image

from serve.conftest import MISSING, Live, as_uri, asking, wait_until
from toys import picture

pytest.importorskip("fastapi", reason=MISSING)
pytest.importorskip("uvicorn", reason=MISSING)
openai = pytest.importorskip("openai", reason="OpenAI's client is not installed (pip install openai)")

PHOTO = picture((80, 60))


def address(live: Live) -> dict:
    """Settings of a client of this server: no second try, so that tests see the first answer."""
    return {"base_url": f"http://127.0.0.1:{live.port}/v1", "api_key": "anything", "max_retries": 0}


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(**address(live)) as made:
        yield made


def joined(chunks) -> tuple[list[str], list[str]]:
    """Texts and ends of all choices of a stream."""
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    return [texts[index] for index in sorted(texts)], [ends[index] for index in sorted(ends)]


def test_the_client_reads_an_answer_and_what_stands_beside_it(client, live):
    request = asking("What is it?", PHOTO)
    plain = live.post(request).json
    said = client.chat.completions.create(**request)
    assert (said.object, said.model) == ("chat.completion", "tiny")
    assert said.choices[0].message.content == plain["choices"][0]["message"]["content"]
    assert said.choices[0].finish_reason == plain["choices"][0]["finish_reason"]
    assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
    assert said.usage.prompt_tokens_details.image_tokens == 9
    assert said.usage.image_details[0]["size"] == [80, 60]
    assert said.opsin["sampling"]["max_tokens"] == 12
    models = client.models.list()
    assert [model.id for model in models] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 4096


def test_the_client_joins_streams_of_several_choices(client):
    request = asking("What now?", PHOTO, n=3, temperature=1.0, top_p=0.9, seed=4, max_tokens=30)
    more = {"extra_body": {"top_k": 40, "repetition_penalty": 1.1}}
    whole = client.chat.completions.create(**request, **more)
    expected = [choice.message.content for choice in whole.choices], [choice.finish_reason for choice in whole.choices]
    assert len(set(expected[0])) == 3
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**request, **more, **asked))
    assert joined(chunks) == expected
    assert chunks[-1].usage == whole.usage
    with client.chat.completions.stream(**request, **more, stream_options=asked["stream_options"]) as events:
        assert {event.type for event in events} == {"chunk", "content.delta", "content.done"}
        final = events.current_completion_snapshot  # `get_final_completion` refuses answers that `max_tokens` cut
    assert [choice.message.content for choice in final.choices] == expected[0]
    assert final.usage.total_tokens == whole.usage.total_tokens


def showing(data: bytes) -> dict:
    content = [{"type": "image_url", "image_url": {"url": as_uri(data)}}, {"type": "text", "text": "?"}]
    return asking(messages=[{"role": "user", "content": content}])


def large() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (6000, 6000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("request_", "kind", "code", "param"),
    [
        (asking(model="gpt-4o"), "NotFoundError", "model_not_found", "model"),
        (asking("word " * 2000), "BadRequestError", "context_length_exceeded", "messages"),
        (asking(max_tokens=5000), "BadRequestError", "context_length_exceeded", "messages"),
        (showing(b"no picture"), "BadRequestError", None, None),
        (showing(large()), "BadRequestError", "media_large", None),
        (asking(n=2), "BadRequestError", "invalid_request", "n"),
        (asking(logprobs=True), "BadRequestError", "unsupported_parameter", "logprobs"),
        (asking(extra_body={"tempreature": 1}), "BadRequestError", "unknown_parameter", "tempreature"),
    ],
    ids=["model", "prompt", "answer", "no picture", "large picture", "choices", "unsupported", "unknown"],
)
def test_refusals_are_the_clients_own_exceptions(client, request_, kind, code, param, stream):
    with pytest.raises(getattr(openai, kind)) as caught:
        client.chat.completions.create(**request_, stream=stream)
    error = caught.value
    assert code is None or error.code == code
    assert error.param == param
    assert error.body["message"] in str(error)


def test_keys_and_a_full_queue_have_exceptions_of_their_own(serving, tiny, pause):
    live = serving(tiny, api_key="s3cret", max_rows=1, max_queue=0)
    with openai.OpenAI(**address(live)) as stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"
    go = pause(live)

    async def crowd():
        async with openai.AsyncOpenAI(**{**address(live), "api_key": "s3cret"}) as client:
            first = asyncio.create_task(client.chat.completions.create(**asking()))
            await asyncio.to_thread(wait_until, lambda: live.service.inside == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                await client.chat.completions.create(**asking())
            patient = asyncio.create_task(client.with_options(max_retries=3).chat.completions.create(**asking()))
            await asyncio.to_thread(wait_until, lambda: live.service.statuses[429] == 2)
            go.set()
            return caught.value, await first, await patient

    error, first, patient = asyncio.run(crowd())
    assert (error.code, error.response.headers["retry-after"]) == ("queue_full", "1")
    assert patient.choices == first.choices


def test_what_goes_wrong_after_the_first_token_is_raised_from_the_stream(serving, tiny, pause):
    live = serving(tiny, timeout_seconds=0.6)
    pause(live, seconds=0.05).set()
    with openai.OpenAI(**address(live)) as client:
        pieces = []
        with pytest.raises(openai.APIError, match=r"longer than 0\.6 s") as caught:
            pieces.extend(client.chat.completions.create(**asking(max_tokens=1000, stream=True)))
        # `extend` keeps what came before an error.
        assert caught.value.code == "timeout"
        assert pieces
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**asking(max_tokens=1000))
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")


def test_a_dozen_at_once_are_answered_as_if_alone(live, client):
    requests = [asking(f"Question {number}", *[PHOTO] * (number % 2), max_tokens=8 + number) for number in range(12)]
    alone = [client.chat.completions.create(**request).choices[0].message.content for request in requests]

    async def ask(client, request, stream: bool) -> str:
        if not stream:
            return (await client.chat.completions.create(**request)).choices[0].message.content
        chunks = [chunk async for chunk in await client.chat.completions.create(**request, stream=True)]
        return joined(chunks)[0][0]

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(**address(live)) as client:
            return await asyncio.gather(
                *(ask(client, request, stream=number % 3 == 0) for number, request in enumerate(requests))
            )

    assert asyncio.run(all_at_once()) == alone
