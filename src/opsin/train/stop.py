"""Stopping a run from outside without losing a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Asks a run to stop after the step it is in, to save, and to say how to go on."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The signal that asked, where one did."""
        self._event = threading.Event()

    @property
    def made(self) -> bool:
        """Whether the run should stop."""
        return self._event.is_set()

    def make(self) -> None:
        """Ask."""
        self._event.set()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, the first Ctrl-C or SIGTERM makes a request, and a second one acts as usual.

    Only the main thread may handle signals; anywhere else this changes nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        request.make()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
