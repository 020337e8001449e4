"""The one thread in which the model runs. Requests reach it by a queue and hear from it by call-backs."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from opsin.encode import Encoded
from opsin.errors import OpsinError
from opsin.generate.engine import Engine, Failure, Token
from opsin.generate.sampling import Sampling

Event = Token | Failure
Listener = Callable[[Event], None]


@dataclass(eq=False)
class Job:
    """A prompt on its way through the worker."""

    prompt: Encoded
    sampling: Sampling
    listener: Listener
    """Called in the worker's thread with every event; a failure, or the last answer, is the last of them."""
    left: int
    """Answers that have not ended."""
    ticket: int | None = None
    cancelled: bool = False


class Worker:
    """Runs an engine in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.num_tokens = 0
        """Drawn so far, also for answers that nobody waited for."""
        self._orders: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._run, name="opsin-model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, prompt: Encoded, sampling: Sampling, listener: Listener) -> Job:
        """Line a prompt up; for any thread. What is wrong with it comes as a failure."""
        job = Job(prompt, sampling, listener, left=sampling.num_sequences)
        self._orders.put(("submit", job))
        return job

    def cancel(self, job: Job) -> None:
        """Stop working on a job; for any thread, at any time, any number of times. Its listener hears no more."""
        if not job.cancelled:
            job.cancelled = True
            self._orders.put(("cancel", job))

    def stop(self, *, seconds: float = 5) -> None:
        """Give up all jobs and end the thread, waiting so long for the step that it is in."""
        self._orders.put(("stop", None))
        if self._thread.is_alive():
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            # With nothing to do, wait for the next order; otherwise take those that have come, and go on.
            block = self.engine.is_idle
            while True:
                try:
                    order, job = self._orders.get(block=block)
                except queue.Empty:
                    break
                block = False
                if job is None:
                    return
                self._take(order, job)
            for event in self.engine.step():
                self._tell(event)

    def _take(self, order: str, job: Job) -> None:
        if order == "cancel":
            if job.ticket is not None and self._jobs.pop(job.ticket, None) is not None:
                self.engine.cancel(job.ticket)
            return
        if job.cancelled:
            return
        try:
            job.ticket = self.engine.submit(job.prompt, job.sampling)
        except OpsinError as error:
            job.listener(Failure(-1, error))
            return
        self._jobs[job.ticket] = job

    def _tell(self, event: Event) -> None:
        self.num_tokens += isinstance(event, Token)
        job = self._jobs.get(event.ticket)
        if job is None:
            return
        if isinstance(event, Failure):
            job.left = 0
        else:
            job.left -= event.answer is not None
        if not job.left:
            del self._jobs[event.ticket]
        if not job.cancelled:
            job.listener(event)
