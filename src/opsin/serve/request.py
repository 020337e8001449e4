"""From the bytes of a request to a conversation and the settings of its answers.

Every field is known: used, allowed where it changes nothing, or refused. `messages` reads what is said and shown.
"""

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ConfigDict, ValidationError

from opsin.errors import nearest
from opsin.generate.sampling import Sampling
from opsin.media.source import shorten
from opsin.serve.errors import RequestError
from opsin.serve.messages import read_messages
from opsin.serve.settings import Settings
from opsin.spec.base import Spec, describe
from opsin.text.messages import Conversation
from opsin.text.parse import parse

MAX_DEPTH = 32
"""Lists and objects inside one another; a chat needs six."""

NOT_FOR_US = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier")
"""Fields that say nothing about the answer. They are accepted and not used."""

ONLY: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "best_of": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "echo": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}
"""Fields that other servers know and this one cannot follow, and the values (null besides) that ask for nothing."""


class StreamOptions(Spec):
    """Of a streamed answer."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against eavesdroppers; there is none, which the protocol allows."""


class ProcessorOptions(Spec):
    """How pictures are prepared, by vLLM's name `mm_processor_kwargs`."""

    model_config = ConfigDict(strict=True)

    max_pixels: int | None = None


class Fields(Spec):
    """The fields of a request that are used."""

    model_config = ConfigDict(strict=True)

    messages: list[Any]
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    mm_processor_kwargs: ProcessorOptions | None = None


@dataclass(frozen=True)
class ChatRequest:
    """A request that was understood."""

    conversation: Conversation
    sampling: Sampling
    max_tokens: int | None
    """Longest answer, where the request says it."""
    stream: bool
    include_usage: bool
    """In a streamed answer, a last chunk with the usage."""
    notes: tuple[str, ...] = ()
    """What was asked for and does not count."""


def read_request(body: bytes, settings: Settings, *, resizes: bool) -> ChatRequest:
    """Understand a request. Raises RequestError, or an error of the library, with a text for the client.

    resizes: whether the model reads pictures at their own size, so that `max_pixels` means something.
    """
    fields = _fields(_json(body))
    if fields.model is not None and fields.model != settings.name:
        raise RequestError(
            f"there is no model {shorten(fields.model, 80)!r} here; this server has {settings.name!r}",
            status=404,
            code="model_not_found",
            param="model",
        )
    if fields.stream_options is not None and not fields.stream:
        raise RequestError("stream_options are for streamed answers; set stream to true", param="stream_options")
    max_tokens = _max_tokens(fields)
    sampling = _sampling(fields, settings, max_tokens)
    messages, notes = read_messages(fields.messages, settings)
    record: dict[str, Any] = {"messages": messages}
    if fields.mm_processor_kwargs is not None and fields.mm_processor_kwargs.max_pixels is not None:
        if not resizes:
            raise RequestError(
                "max_pixels means nothing to this model, which shows every picture at sizes of its own; leave it out",
                param="mm_processor_kwargs",
            )
        record["chat_template_kwargs"] = {"max_pixels": fields.mm_processor_kwargs.max_pixels}
    include_usage = bool(fields.stream_options and fields.stream_options.include_usage)
    conversation = parse(record, where="messages")
    return ChatRequest(conversation, sampling, max_tokens, bool(fields.stream), include_usage, notes)


def _json(body: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise RequestError(f"{constant} is no number of JSON", code="invalid_json")

    try:
        data = json.loads(body.decode(), parse_constant=refuse)
    except RecursionError:
        raise _too_deep() from None
    except RequestError:
        raise
    except ValueError:  # no UTF-8, no JSON, a number with thousands of digits
        raise RequestError("the request is not valid JSON in UTF-8", code="invalid_json") from None
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for each in level
            for item in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
            if isinstance(item, dict | list)
        ]
        if not level:
            return data
    raise _too_deep()


def _too_deep() -> RequestError:
    return RequestError(f"lists and objects stand more than {MAX_DEPTH} deep in one another", code="invalid_json")


def _fields(data: Any) -> Fields:
    if not isinstance(data, dict):
        raise RequestError("the request must be an object with 'messages'", code="invalid_json")
    used: dict[str, Any] = {}
    for name, value in data.items():
        if name in Fields.model_fields:
            used[name] = value
        elif name in ONLY:
            if value is not None and value not in ONLY[name]:
                allowed = " or ".join(["null", *(json.dumps(each) for each in ONLY[name])])
                raise RequestError(
                    f"{name!r} is not supported: this server cannot follow it, and will not act as if it did. Leave it "
                    f"out, or send {allowed}",
                    code="unsupported_parameter",
                    param=name,
                )
        elif name not in NOT_FOR_US:
            known = (*Fields.model_fields, *ONLY, *NOT_FOR_US)
            shown = shorten(name, 80)
            raise RequestError(f"unknown field {shown!r}{nearest(shown, known)}", code="unknown_parameter", param=shown)
    try:
        return Fields.model_validate(used)
    except ValidationError as error:
        problem = error.errors()[0]
        raise RequestError(describe(error, Fields), code="invalid_type", param=str(problem["loc"][0])) from None


def _max_tokens(fields: Fields) -> int | None:
    both = fields.max_tokens, fields.max_completion_tokens
    if None not in both and both[0] != both[1]:
        raise RequestError(
            f"max_tokens is {both[0]} and max_completion_tokens, its newer name, {both[1]}; send one",
            param="max_completion_tokens",
        )
    limit = both[0] if both[1] is None else both[1]
    if limit is not None and limit < 1:
        raise RequestError(f"max_tokens is {limit}; it must be at least 1", param="max_tokens")
    return limit


def _sampling(fields: Fields, settings: Settings, max_tokens: int | None) -> Sampling:
    """Raises RequestError or GenerationError for settings that mean nothing."""
    number = 1 if fields.n is None else fields.n
    if not 1 <= number <= min(settings.max_choices, settings.max_rows):
        most = min(settings.max_choices, settings.max_rows)
        raise RequestError(f"n is {number}; it must be from 1 to {most}", param="n")
    temperature = 0.0 if fields.temperature is None else fields.temperature
    if number > 1 and temperature == 0:
        raise RequestError(
            f"n is {number}, but at temperature 0 all answers would be the same; set a temperature, or leave n out",
            param="n",
        )
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    # At temperature 0 the likeliest token is taken, which neither cuts off; clients send them by habit.
    drawn = temperature != 0
    top_k = fields.top_k if fields.top_k not in (-1, 0) else None  # what other servers call all
    return Sampling(
        max_new_tokens=settings.default_max_tokens if max_tokens is None else max_tokens,
        temperature=temperature,
        top_p=fields.top_p if drawn else None,
        top_k=top_k if drawn else None,
        repetition_penalty=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
        seed=fields.seed,
        num_sequences=number,
        stop_strings=stop,
    )
