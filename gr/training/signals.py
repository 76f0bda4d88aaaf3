"""SIGTERM, SIGUSR1 (a scheduler's warning) and Ctrl-C ask for a stop; the trainer decides when."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupted(Exception):
    """A stop was asked for inside ``StopSignal.interruptible``."""


ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_open: list[StopSignal] = []


def ask_to_stop(number: int = signal.SIGUSR1) -> None:
    """What a signal does, for programs that train in a thread: there no signal arrives."""
    for stop in _open:
        stop.requested = number


class StopSignal:
    """While entered, SIGTERM, SIGUSR1 and SIGINT set a flag instead of ending the process; a second SIGINT interrupts
    at once.

    Outside the main thread (a notebook's executor, a Ray worker) signals cannot be handled; ``ask_to_stop`` sets the
    flag.

    Attributes:
        requested: Number of the signal received, 0 for none.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, object] = {}
        self._interruptible = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in ASKING:
                self._previous[number] = signal.signal(number, self._handle)
        _open.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        _open.remove(self)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextlib.contextmanager
    def interruptible(self, enabled: bool = True) -> Iterator[None]:
        """Work that may be dropped half-way: a stop raises ``Interrupted`` out of it, at once."""
        if enabled and self.requested:
            raise Interrupted
        self._interruptible = enabled
        try:
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        if self._interruptible:
            self._interruptible = False
            raise Interrupted
