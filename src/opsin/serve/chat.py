"""`POST /v1/chat/completions`: one request from its first byte to the last of its answer."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from opsin.generate.decode import Answer
from opsin.generate.engine import Token
from opsin.serve.answer import Reply
from opsin.serve.errors import RequestError, told
from opsin.serve.send import Sender
from opsin.serve.service import Service
from opsin.serve.settings import MIB

log = logging.getLogger("opsin.serve")

LAST_WORDS_SECONDS = 1.0
"""How long a client that reads too slowly may take for the event that says so."""


class ClientGone(Exception):
    """Nobody is there any more to be answered."""


class ChatCompletions:
    """The endpoint, as an ASGI application: it listens for the client's leaving while it works."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        started = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + self.service.settings.timeout_seconds
        sender, reply = Sender(send), _Progress()
        try:
            if self.service.draining:
                raise RequestError("the server is shutting down", status=503, code="shutting_down")
            with self.service.place():
                body = await self._body(Headers(scope=scope), receive)
                await _while_connected(receive, self._answer(body, sender, reply, deadline))
        except ClientGone:
            self.service.statuses[499] += 1
            log.info("client left after %.2f s", time.perf_counter() - started)
            return
        except RequestError as error:
            await sender.refuse(error)
        except asyncio.CancelledError:  # by a server that stops; the client has been told
            if not self.service.draining or sender.status is None:
                raise
        status = sender.status or 500
        self.service.statuses[status] += 1
        log.info("%d in %.2f s, %d + %d tokens", status, time.perf_counter() - started, reply.prompt_tokens, reply.new)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        settings = self.service.settings
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Also what keeps foreign web pages out: browsers send this type across sites only where it is allowed.
            raise RequestError("the request must have the header 'Content-Type: application/json'", status=415)
        too_large = RequestError(
            f"the request is larger than {settings.max_body_bytes / MIB:g} MiB, the most that is read; shrink its "
            "pictures",
            status=413,
            code="request_too_large",
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > settings.max_body_bytes:
            raise too_large
        chunks, size, more = [], 0, True
        try:
            async with asyncio.timeout(settings.body_timeout_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    more = message.get("more_body", False)
                    if size > settings.max_body_bytes:
                        raise too_large
        except TimeoutError:
            raise RequestError(
                f"the request did not arrive within {settings.body_timeout_seconds:g} s", status=408, code="timeout"
            ) from None
        return b"".join(chunks)

    async def _answer(self, body: bytes, sender: Sender, progress: "_Progress", deadline: float) -> None:
        """Send the answer, or what went wrong with it: as HTTP before the first byte, as an event after it."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._send_answer(body, sender, progress)
            return
        except TimeoutError:
            seconds = f"{self.service.settings.timeout_seconds:g} s"
            if progress.new:
                message = f"the answer took longer than {seconds} and was stopped after {progress.new} tokens"
                error = RequestError(message, status=504, code="timeout")
            else:
                message = f"the request waited for {seconds} without its turn coming; try again later"
                error = RequestError(message, status=503, code="queue_timeout")
        except Exception as problem:
            error = told(problem)
            if error.status == 500:
                log.error("a request failed", exc_info=problem)
        except asyncio.CancelledError:
            if self.service.draining:
                await _last_words(sender, RequestError("the server stopped", status=503, code="shutting_down"))
            raise
        await _last_words(sender, error)

    async def _send_answer(self, body: bytes, sender: Sender, progress: "_Progress") -> None:
        service = self.service
        prepared = await service.prepare(body)
        progress.prompt_tokens = prepared.prompt.num_tokens
        reply = Reply(
            prepared, name=service.settings.name, config=service.model.config, tokenizer=service.model.tokenizer
        )
        answers: list[Answer] = []
        async with service.answering(prepared) as tokens:
            async for token in progress.count(tokens):
                if prepared.request.stream:
                    if sender.status is None:  # only now: until the first token, an error is an error of HTTP
                        await sender.open_events()
                        await sender.event(reply.opening())
                    if token.text:
                        await sender.event(reply.piece(token.sequence, token.text))
                    if token.answer is not None:
                        await sender.event(reply.end(token.answer))
                if token.answer is not None:
                    answers.append(token.answer)
        if not prepared.request.stream:
            await sender.json(reply.whole(answers))
            return
        if prepared.request.include_usage:
            await sender.event(reply.usage_chunk(answers))
        await sender.close_events(done=True)


async def _last_words(sender: Sender, error: RequestError) -> None:
    """Tell a client of an error, at whatever point of the answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            if sender.status is None:
                await sender.refuse(error)
            elif sender.is_streaming:
                await sender.event(error.body)
                await sender.close_events(done=False)


class _Progress:
    """How far a request has come."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.new = 0

    async def count(self, tokens: AsyncIterator[Token]) -> AsyncIterator[Token]:
        """The tokens, counted."""
        async for token in tokens:
            self.new += 1
            yield token


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, unless the client leaves first: it is then broken off. Raises ClientGone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
