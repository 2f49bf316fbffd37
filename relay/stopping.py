"""The end of a process as its threads hear of it: an event that also ends what a thread waits for besides.

A thread that waits for a descriptor or for Redis would see a plain event only when that is over. A signal handler must
not set an event at all: it may have interrupted the wait that holds the event's lock, and would wait for itself.
"""

from __future__ import annotations

import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress


class StopEvent(threading.Event):
    """Set once, and not by a signal handler."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def set(self) -> None:
        super().set()
        with self._lock:
            for call in self._calls:
                call()

    @contextmanager
    def calling(self, call: Callable[[], None]) -> Iterator[None]:
        """Have a function called by whoever sets it, or at once where that is done; it must not raise, nor wait."""
        with self._lock:
            self._calls.append(call)
        try:
            if self.is_set():
                call()
            yield
        finally:
            with self._lock:
                self._calls.remove(call)

    @contextmanager
    def readable(self) -> Iterator[socket.socket]:
        """Yield a socket that can be read from once it is set, for a select()."""
        ours, theirs = socket.socketpair()
        with ours, theirs, self.calling(lambda: _end(theirs)):
            yield ours


class StopSignal:
    """A stop by one of these signals, which the main thread waits for between other things; takes no lock of Python."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.is_set = False
        self._came: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in numbers:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        self.is_set = True
        self._came.put(number)

    def wait(self, seconds: float) -> None:
        """Wait for it, but no longer."""
        if not self.is_set:
            with suppress(queue.Empty):
                self._came.get(timeout=seconds)


def _end(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_WR)
