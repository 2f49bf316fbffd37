"""The relay's end of a connection to one worker: copies go out in one write a turn of the loop, or not at all.

The worker's limits bound what is under way. A living worker tells them again soon after copies have come: one that
does not, since it is stopped or overloaded, gets no more until it does. What the kernel does not take at once is not
handed over, and left to its job; where it has taken a part of a copy, the connection is closed, so that no copy ever
comes later than the job that is made for it.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Sequence

from relay import faultpoints, maillog
from relay.handover.frames import BadFrame, HandedCopy, Hello, Limits, read_hello, read_limits

_RECEIVED = 4096
_PAUSE = 0.5  # seconds for which a worker that has not read what it was sent gets nothing
_SILENCE = 1.5  # seconds in which a worker says that copies have come
_BUFFER = 1 << 20  # octets in the kernel, as far as it allows

Ids = Sequence[str]


class WorkerLine:
    """A connection to a worker; ``hello`` is None until it has said who it is, and the line is of no use."""

    def __init__(
        self,
        name: str,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_handed: Callable[[str, Ids], None],
        on_refused: Callable[[Hello, Sequence[HandedCopy]], None],
        ledger: str,
    ) -> None:
        """A worker whose Redis is not this ``ledger`` gets nothing.

        ``on_handed`` is told of copies that are with the worker, ``on_refused`` of those that will never be.
        """
        self.name = name
        self.hello: Hello | None = None
        self.is_open = True
        self._sock, self._loop = sock, loop
        self._on_handed, self._on_refused = on_handed, on_refused
        self._ledger = ledger
        self._limits = Limits(0, 0)
        self._copies = self._octets = 0  # sent in all, and reserved
        self._pauses_until = 0.0
        self._unheard_since = math.inf  # when it was sent the first copy since it was heard last
        self._waiting: list[HandedCopy] = []
        self._received = bytearray()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        loop.add_reader(sock, self._read)

    def room_for(self, size: int) -> int:
        """Return how many copies the worker takes, 0 if none of this size."""
        now = self._loop.time()
        if not self.is_open or now < self._pauses_until or now - self._unheard_since > _SILENCE:
            return 0
        if self._octets + size > self._limits.octets:
            return 0
        return max(0, self._limits.copies - self._copies)

    def reserve(self, size: int) -> None:
        """Count a copy that is about to be released, with a lease of the worker's, as sent."""
        self._copies += 1
        self._octets += size

    def give_up(self, size: int) -> None:
        """Take back what was reserved."""
        self._copies -= 1
        self._octets -= size

    def send(self, copy: HandedCopy) -> None:
        """Hand a copy over with the others of this turn."""
        self._waiting.append(copy)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Hang up; nothing is handed over any more."""
        if self.is_open:
            self.is_open = False
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _flush(self) -> None:
        faultpoints.reach("before hand-over")
        copies, self._waiting = self._waiting, []
        packed = [copy.packed() for copy in copies]
        taken = self._write(b"".join(packed))
        handed, end = 0, 0
        for octets in packed:
            end += len(octets)
            if end > taken:
                break
            handed += 1
        if taken and taken < end:
            self.close()  # it has a part of a copy, or is behind: no other can follow
        for copy in copies[handed:]:
            self.give_up(len(copy.record))
        hello = self.hello
        if hello is None:  # never with copies: who has said nothing has no room
            return
        if handed:
            self._unheard_since = min(self._unheard_since, self._loop.time())
            self._on_handed(hello.destination, [copy.id for copy in copies[:handed]])
            faultpoints.reach("handed over")
        if handed < len(copies):
            self._on_refused(hello, copies[handed:])

    def _write(self, octets: bytes) -> int:
        """Return how much the kernel has taken."""
        if not self.is_open:
            return 0
        try:
            return self._sock.send(octets)
        except (BlockingIOError, InterruptedError):
            self._pauses_until = self._loop.time() + _PAUSE
            return 0
        except OSError:
            self.close()
            return 0

    def _read(self) -> None:
        try:
            octets = self._sock.recv(_RECEIVED)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            octets = b""
        if not octets:
            self.close()
            return
        self._received += octets
        try:
            if self.hello is None:
                self.hello = read_hello(self._received)
            if self.hello is not None:
                limits = read_limits(self._received)
                if limits is not None and self.hello.ledger == self._ledger:
                    self._limits, self._unheard_since = limits, math.inf
        except BadFrame as error:
            maillog.notice("error", "hand-over", socket=self.name, reason=str(error))
            self.close()
