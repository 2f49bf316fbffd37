"""The end of a process as its threads hear of it: an event that also ends what a thread waits for besides.

A thread that waits for a descriptor or for Redis would see a plain event only when that is over.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
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


def _end(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_WR)
