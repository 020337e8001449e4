"""What the routes share: the model, its encoder, the worker, and how many requests are inside."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from opsin.encode import Encoded, Encoder
from opsin.errors import MessageError
from opsin.generate.engine import Engine, Token
from opsin.media.image import image_size
from opsin.serve.errors import RequestError
from opsin.serve.request import ChatRequest, read_request
from opsin.serve.settings import Settings
from opsin.serve.worker import Event, Worker
from opsin.spec.native import Native
from opsin.weights import Model

CHARACTERS_PER_TOKEN = 16
"""No text has as many characters to the token, so longer ones are refused before tokenising, which takes its time."""
ENCODERS = 2
"""Threads that read requests and prepare pictures, so that neither the event loop nor the model waits for them."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A request that is ready to run."""

    request: ChatRequest
    prompt: Encoded


class Service:
    """Everything behind the routes."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.encoder = Encoder(model.config, model.tokenizer, image_mode=settings.image_mode, limits=settings.limits)
        self.worker = Worker(Engine(model.vlm, model.tokenizer, max_rows=settings.max_rows))
        self.pool = ThreadPoolExecutor(ENCODERS, thread_name_prefix="opsin-encode")
        self.inside = 0
        """Chat requests that have been let in and have not left."""
        self.started = int(time.time())
        self.draining = False
        self.statuses: Counter[int] = Counter()
        """Answers to chat requests by their HTTP status."""
        self.prompt_tokens = 0

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.model.config.decoder.max_positions

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among those inside. Raises RequestError where none is free."""
        most = self.settings.max_rows + self.settings.max_queue
        if self.inside >= most:
            raise RequestError(
                f"{self.inside} requests are inside, which is all that this server takes ({self.settings.max_rows} "
                f"answered at once and {self.settings.max_queue} waiting); try again later",
                status=429,
                code="queue_full",
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def prepare(self, body: bytes) -> Prepared:
        """Read a request and encode its prompt, in another thread. Raises errors with texts for the client."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, self._prepare, body)

    def _prepare(self, body: bytes) -> Prepared:
        config = self.model.config
        request = read_request(body, self.settings, resizes=isinstance(config.resolution, Native))
        conversation = request.conversation
        if conversation.videos and not config.reads_videos:
            raise MessageError("this model reads no videos; show it single frames as pictures", kind="no_videos")
        length = sum(len(message.text) for message in conversation.messages)
        if length > CHARACTERS_PER_TOKEN * self.context:
            raise RequestError(
                f"the text has {length} characters, at most {CHARACTERS_PER_TOKEN * self.context} are read: "
                f"{CHARACTERS_PER_TOKEN} for each of the {self.context} tokens that the model was trained for",
                code="context_length_exceeded",
                param="messages",
            )
        sizes = [
            image_size(picture, mode=self.settings.image_mode, limits=self.settings.limits, name=f"image {number}")
            for number, picture in enumerate(conversation.images, start=1)
        ]
        # The length is known from headers, before any picture is decoded.
        measure = self.encoder.measure(conversation, sizes, mode="prompt")
        wanted = 1 if request.max_tokens is None else request.max_tokens
        if measure.num_tokens + wanted > self.context:
            raise RequestError(
                f"the prompt takes {measure.num_tokens} tokens ({measure.num_image_tokens} of them for pictures) and "
                f"the answer may take {wanted}, together more than the {self.context} that the model was trained for. "
                "Shorten the text, leave out pictures, or lower max_tokens",
                code="context_length_exceeded",
                param="messages",
            )
        prompt = self.encoder.encode(conversation, mode="prompt")
        sampling = replace(
            request.sampling,
            max_new_tokens=min(request.sampling.max_new_tokens, self.context - prompt.num_tokens),
        )
        return Prepared(replace(request, sampling=sampling), prompt)

    @asynccontextmanager
    async def answering(self, prepared: Prepared) -> AsyncIterator[AsyncIterator[Token]]:
        """The tokens of all answers to a request, as they come. Leaving the context stops the work on them.

        Raises what went wrong with the request.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        async def tokens() -> AsyncIterator[Token]:
            left = prepared.request.sampling.num_sequences
            while left:
                event = await events.get()
                if not isinstance(event, Token):
                    raise event.error
                left -= event.answer is not None
                yield event

        if not self.worker.is_alive:
            raise RequestError("the model has stopped; the server must be started anew", status=503, code="failed")
        self.prompt_tokens += prepared.prompt.num_tokens
        job = self.worker.submit(prepared.prompt, prepared.request.sampling, listen)
        try:
            yield tokens()
        finally:
            self.worker.cancel(job)

    def close(self) -> None:
        """Give up what is not finished and end all threads."""
        self.draining = True
        self.worker.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)
