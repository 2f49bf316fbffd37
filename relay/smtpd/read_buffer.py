"""What a client has sent and nobody has read yet: lines and chunks of it, for the one task that reads.

asyncio's StreamReader does the same at three times the price, and cannot be looked into: the commands that a client
has sent ahead (RFC 2920) can. It is also a stream as aiosmtpd's reader of PROXY headers wants it. What is more than a
few commands is counted where mail in memory is, since every client may have as much.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

_UNCOUNTED = 1 << 14  # octets; a client's commands are seldom more
BUFFER = 1 << 16  # octets; at twice this the client is not read from, and no line is longer


class ReadBuffer:
    """Octets in, by ``feed`` and ``end``; lines and chunks out. What is read after the end is empty."""

    __slots__ = ("_at", "_count", "_counted", "_data", "_ended", "_loop", "_paused", "_transport", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop, count: Callable[[int], None] = lambda _: None) -> None:
        """``count`` is told how many octets more, or less, are in memory."""
        self._loop = loop
        self._count = count
        self._counted = 0
        self._data = b""
        self._at = 0  # what is before has been read
        self._ended = self._paused = False
        self._transport: Any = None
        self._waiter: asyncio.Future[None] | None = None

    # --- in ---------------------------------------------------------------------------------------------------

    def follow(self, transport: Any) -> None:
        """Say whose reading stops while too much is here."""
        self._transport = transport
        self._paused = False

    def feed(self, data: bytes) -> None:
        """Take what has come; behind the end nothing does, though TLS hands it over while it closes."""
        if self._ended:
            return
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0
        if self._counted or len(self._data) > _UNCOUNTED:
            self._recount()
        self._wake()
        if len(self._data) > 2 * BUFFER and not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True

    def end(self) -> None:
        """Nothing more will come."""
        self._ended = True
        self._wake()

    def unread(self, data: bytes) -> None:
        """Put octets back in front."""
        self._data, self._at = data + self._data[self._at :], 0
        self._recount()

    def clear(self) -> bytes:
        """Forget what is here; returns it."""
        data, self._data, self._at = self._data[self._at :], b"", 0
        self._recount()
        return data

    def _recount(self) -> None:
        size = len(self._data) - self._at
        octets = size if size > _UNCOUNTED else 0
        if octets != self._counted:
            self._count(octets - self._counted)
            self._counted = octets

    # --- out --------------------------------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        return self._at == len(self._data)

    @property
    def has_line(self) -> bool:
        return self._at < len(self._data) and self._data.find(b"\n", self._at) >= 0

    def lines_ahead(self) -> Iterator[bytes]:
        """Yield the whole lines that are here, and leave them."""
        at = self._at
        while end := self._data.find(b"\n", at) + 1:
            yield self._data[at:end]
            at = end

    async def line(self) -> bytes | None:
        """Return the next line, b"" for one longer than the buffer, None at the end of input."""
        too_long = False
        while (end := self._data.find(b"\n", self._at) + 1) == 0:
            if len(self._data) - self._at > BUFFER:
                self.clear()
                too_long = True
            if not await self._more():
                return None
        line = self._take(end)
        return b"" if too_long or len(line) > BUFFER else line

    async def read(self, n: int = -1) -> bytes:
        """Return what is here, at most so many octets; waits for the first."""
        if self._at == len(self._data) and not await self._more():
            return b""
        size = len(self._data) - self._at
        return self._take(self._at + (size if n < 0 else min(n, size)))

    async def readexactly(self, n: int) -> bytes:
        """Return so many octets. Raises asyncio.IncompleteReadError."""
        while len(self._data) - self._at < n:
            if not await self._more():
                raise asyncio.IncompleteReadError(self.clear(), n)
        return self._take(self._at + n)

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """Return all up to a separator. Raises asyncio.IncompleteReadError; a header has no end that is so far away."""
        while (end := self._data.find(separator, self._at)) < 0:
            if len(self._data) - self._at > BUFFER or not await self._more():
                raise asyncio.IncompleteReadError(self.clear(), None)
        return self._take(end + len(separator))

    def _take(self, end: int) -> bytes:
        data = self._data
        if end == len(data):
            taken = data[self._at :] if self._at else data
            self._data, self._at = b"", 0
        else:
            taken, self._at = data[self._at : end], end
        if self._counted:
            self._recount()
        if self._paused and len(self._data) - self._at <= BUFFER:
            self._resume()
        return taken

    def _resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    async def _more(self) -> bool:
        """Wait until something has come; False at the end of input."""
        if self._ended:
            return False
        if self._paused:
            self._resume()
        self._waiter = self._loop.create_future()
        before = len(self._data) - self._at
        try:
            await self._waiter
        finally:
            self._waiter = None
        return len(self._data) - self._at > before

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
