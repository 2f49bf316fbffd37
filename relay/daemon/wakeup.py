"""What wakes the supervisor: signals, children that have become ready, and what it watches for others.

The signal handlers do nothing: Python writes each signal's number to a pipe, so that a signal which comes before the
wait ends it at once. Children write their pids to another pipe. A fork closes what is the supervisor's.
"""

from __future__ import annotations

import math
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from relay.daemon.fork import SIGNALS
from relay.early_signals import ignore

_PID = struct.Struct("=i")


@dataclass(slots=True)
class Wakeup:
    """The descriptors that the supervisor waits for; ``watched`` are those of others, with what to call."""

    watched: dict[int, Callable[[], None]] = field(default_factory=dict)
    _signals: tuple[int, int] = (-1, -1)
    _ready: tuple[int, int] = (-1, -1)

    def catch_signals(self) -> dict[signal.Signals, object]:
        """Have signals wake the supervisor; returns their handlers of before."""
        self._signals, self._ready = os.pipe(), os.pipe()
        for descriptor in (*self._signals, *self._ready):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
        return {number: signal.signal(number, ignore) for number in SIGNALS}

    def restore_signals(self, before: Mapping[signal.Signals, object]) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave back
        signal.set_wakeup_fd(-1)
        for descriptor in (*self._signals, *self._ready):
            os.close(descriptor)

    def wait(self, until: float) -> tuple[bytes, frozenset[int], set[int]]:
        """Wait for any of it, at most until a monotonic time.

        Returns the signals that came, the pids of children that are ready, and the descriptors that can be read.
        """
        timeout = None if until == math.inf else max(0.0, until - time.monotonic()) * 1000
        poll = select.poll()  # select() knows no descriptor above 1023
        for descriptor in (self._signals[0], self._ready[0], *self.watched):
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(timeout)}
        signals = os.read(self._signals[0], 4096) if self._signals[0] in ready else b""
        pids = os.read(self._ready[0], 4096) if self._ready[0] in ready else b""
        found = frozenset(pid for (pid,) in _PID.iter_unpack(pids[: len(pids) // _PID.size * _PID.size]))
        return signals, found, ready

    # In a fork

    def tell_ready(self) -> None:
        """Tell the supervisor that this child does its work."""
        with suppress(OSError):
            os.write(self._ready[1], _PID.pack(os.getpid()))

    def leave(self) -> None:
        """Close what is the supervisor's."""
        signal.set_wakeup_fd(-1)
        for descriptor in (*self._signals, self._ready[0], *self.watched):
            os.close(descriptor)
