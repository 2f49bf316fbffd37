"""How a process sends the events of its messages to the collector: without ever waiting, many in one datagram.

Events of some hundredths of a second go together. What the kernel does not take at once is sent a little later, up to
a bound; beyond it the oldest is dropped and counted. A process that is killed takes with it what it has not sent. The
socket is one of a pair that the supervisor has made before its forks: it has no name and no file, and outlives whoever
reads it. Nothing here raises.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from relay import log_lines, metrics
from relay.mail.ids import is_id
from relay.mail.stored import to_json
from relay.trace import events
from relay.trace.events import Wire

_PAUSE = 0.05  # seconds for which events are gathered
_AT_ONCE = 64  # events in a datagram
_MOST = 60_000  # octets of one; what is larger goes in parts
_KEPT = 2 << 20  # octets that wait for the kernel
_BUFFER = 1 << 20  # octets in the kernel, as far as it allows
# Lines of the mail log that tell of one message and that no event of its own does.
_NOTED = frozenset({
    "spooled", "unspooled", "not durable", "copy lost", "uncertain", "uncertain copied", "uncertain covered",
    "may repeat", "body missing", "failed copy expired", "requeued", "moved", "damaged record", "unreadable message",
})  # fmt: skip


def channel() -> tuple[socket.socket, socket.socket]:
    """Return the ends of a channel, to read and to write; all processes write to the same. Raises OSError."""
    reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (reading, writing):
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    return reading, writing


class Emitter:
    """Sends events over a channel. Any thread may note one; with a loop they are gathered."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: list[Wire] = []
        self._ready: deque[tuple[bytes, int]] = deque()  # datagrams, and how many events each has
        self._octets = 0
        self._is_due = False
        self._lock = threading.Lock()

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Gather events with this loop's timers from now on."""
        self._loop = loop

    def note(self, event: Wire) -> None:
        """Send an event soon."""
        self._events.append(event)
        if not self._is_due:
            self._is_due = True
            self._flush_soon()

    def _flush_soon(self) -> None:
        loop = self._loop
        if loop is not None:
            try:
                loop.call_soon_threadsafe(loop.call_later, _PAUSE, self.flush)
            except RuntimeError:  # it is closed
                self._loop = None
            else:
                return
        self.flush()

    def flush(self) -> None:
        """Send what has been gathered, as far as the kernel takes it."""
        with self._lock:
            self._is_due = False
            found, self._events = self._events, []
            for start in range(0, len(found), _AT_ONCE):
                self._pack(found[start : start + _AT_ONCE])
            self._send()
            has_more = bool(self._ready)
        if has_more and self._loop is not None and not self._is_due:
            self._is_due = True
            self._flush_soon()

    def _pack(self, group: Sequence[Wire]) -> None:
        try:
            data = to_json(group).encode("ascii")
        except (ValueError, TypeError, RecursionError):
            metrics.trace_dropped.inc(len(group))
            return
        if len(data) > _MOST and len(group) > 1:
            half = len(group) // 2
            self._pack(group[:half])
            self._pack(group[half:])
            return
        self._ready.append((data, len(group)))
        self._octets += len(data)
        while self._octets > _KEPT:
            self._drop()

    def _send(self) -> None:
        while self._ready:
            data, count = self._ready[0]
            try:
                self._sock.send(data)
            except (BlockingIOError, InterruptedError):
                if self._loop is None:  # nobody would come back to it
                    while self._ready:
                        self._drop()
                return
            except OSError:  # too large for this system, or no memory: another one may do
                self._drop()
                continue
            self._ready.popleft()
            self._octets -= len(data)
            del count

    def _drop(self) -> None:
        data, count = self._ready.popleft()
        self._octets -= len(data)
        metrics.trace_dropped.inc(count)


current: Emitter | None = None  # None: there is no trace, and events are not worth making


def take(sock: socket.socket | None) -> None:
    """Send this process's events over this channel from now on; None: there is no trace."""
    global current  # noqa: PLW0603 - one for each process, like its log
    current = None if sock is None else Emitter(sock)
    log_lines.on_message = None if sock is None else _of_log


def use(loop: asyncio.AbstractEventLoop) -> None:
    """Gather events by this loop's timers."""
    if current is not None:
        current.use(loop)


def flush() -> None:
    """Send what has been gathered, at the end of a process."""
    if current is not None:
        current.flush()


def _of_log(at: float, event: str, fields: Any) -> None:
    """Take a line of the mail log about one message."""
    message_id = fields.get("id")
    if current is not None and event in _NOTED and is_id(message_id):
        destination = fields.get("destination", "")
        about = ("reason", "to", "covered", "copies", "job")
        text = next((str(fields[name]) for name in about if fields.get(name)), "")
        current.note(events.noted(message_id, at, event, destination, text))
