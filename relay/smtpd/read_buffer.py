"""The input of a client that has not been read yet; one task reads lines and chunks from it.

asyncio's StreamReader costs three times as much and does not show the pipelined commands (RFC 2920) in its buffer. What
is waited for is cut out as it arrives, so that the reader needs no coroutine and wakes up once. This class also has the
methods that aiosmtpd's reader of PROXY headers needs. Input beyond a few commands is counted as mail in memory, since
every client may send that much. Reading raises nothing but IncompleteReadError, for PROXY headers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

_UNCOUNTED = 1 << 14  # octets; commands seldom take more
BUFFER = 1 << 16  # octets; the longest line; at twice this, reading from the client pauses
_CHUNK, _LINE, _REST_OF_LINE, _ANYTHING = -1, -2, -3, -4  # what is waited for, where it is not so many octets


class ReadBuffer:
    """Takes octets by ``feed`` and ``end``; gives lines and chunks, and nothing more after the end."""

    __slots__ = ("_at", "_count", "_counted", "_ended", "_loop", "_paused", "_transport", "_waiter", "_wanted", "data")

    def __init__(self, loop: asyncio.AbstractEventLoop, count: Callable[[int], None] = lambda _: None) -> None:
        """``count`` is called with the change in the number of octets in memory."""
        self._loop = loop
        self._count = count
        self._counted = 0
        self.data = b""  # empty when nothing is unread
        self._at = 0  # where the unread octets of ``data`` begin
        self._ended = self._paused = False
        self._transport: Any = None
        self._waiter: asyncio.Future[Any] | None = None
        self._wanted = _LINE  # by the waiter

    # --- in ---------------------------------------------------------------------------------------------------

    def follow(self, transport: Any) -> None:
        """Set the transport whose reading is paused while the buffer is full."""
        self._transport = transport
        self._paused = False

    def feed(self, data: bytes) -> None:
        """Append received octets; after the end they are dropped (TLS still delivers some while it closes)."""
        if self._ended:
            return
        size, waiter = len(data), self._waiter
        if self.data:
            data = self.data[self._at :] + data
            size = len(data)
        elif waiter is not None and (
            self._wanted == _CHUNK or (self._wanted == _LINE and data.find(b"\n") + 1 == size <= BUFFER)
        ):
            self._waiter = None  # all of it is waited for, as a command in a packet of its own: the common case
            if not waiter.done():
                waiter.set_result(data)
                return
        self.data, self._at = data, 0
        if self._counted or size > _UNCOUNTED:
            self._recount()
        if self._waiter is not None:
            self._serve()
            size = len(self.data) - self._at
        if size > 2 * BUFFER and not self._paused and self._transport is not None:
            self._transport.pause_reading()
            self._paused = True

    def end(self) -> None:
        """Mark the end of input."""
        self._ended = True
        if self._waiter is not None:
            self._serve()

    def unread(self, data: bytes) -> None:
        """Put octets back in front of the unread ones."""
        self.data, self._at = data + self.data[self._at :], 0
        self._recount()

    def clear(self) -> bytes:
        """Remove the unread octets; returns them."""
        data, self.data, self._at = self.data[self._at :], b"", 0
        self._recount()
        return data

    def _recount(self) -> None:
        size = len(self.data) - self._at
        octets = size if size > _UNCOUNTED else 0
        if octets != self._counted:
            self._count(octets - self._counted)
            self._counted = octets

    # --- out --------------------------------------------------------------------------------------------------

    @property
    def has_line(self) -> bool:
        return self.data.find(b"\n", self._at) >= 0

    def lines_ahead(self) -> Iterator[bytes]:
        """Yield the complete unread lines, without removing them."""
        at = self._at
        while end := self.data.find(b"\n", at) + 1:
            yield self.data[at:end]
            at = end

    def next_line(self) -> bytes | None:
        """Return the next line if all of it is here, b"" if longer than ``BUFFER``; else None."""
        end = self.data.find(b"\n", self._at) + 1
        if not end:
            return None
        if end == len(self.data) and not self._at and not self._counted:  # one command in one packet: the common case
            line, self.data = self.data, b""
            return line
        line = self._take(end)
        return line if len(line) <= BUFFER else b""

    def line(self) -> asyncio.Future[bytes | None]:
        """Return the next line in a future: b"" if longer than ``BUFFER``, None at the end of input."""
        waiter = self._waiter = self._loop.create_future()
        self._wanted = _LINE
        if self.data or self._ended:
            self._serve()
        return waiter

    def chunk(self, most: int = _CHUNK) -> asyncio.Future[bytes]:
        """Return the unread octets, at most ``most``, in a future; it waits for the first, b"" at the end of input."""
        waiter = self._waiter = self._loop.create_future()
        self._wanted = most
        if self.data or self._ended:
            self._serve()
        return waiter

    async def read(self, n: int = _CHUNK) -> bytes:
        """Return a chunk, as the method of a stream."""
        return await self.chunk(n)

    async def readexactly(self, n: int) -> bytes:
        """Return exactly ``n`` octets. Raises asyncio.IncompleteReadError at the end of input."""
        while len(self.data) - self._at < n:
            if not await self._more():
                raise asyncio.IncompleteReadError(self.clear(), n)
        return self._take(self._at + n)

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """Return the octets up to and with a separator.

        Raises asyncio.IncompleteReadError at the end of input, or if there is none within ``BUFFER`` octets.
        """
        while (end := self.data.find(separator, self._at)) < 0:
            if len(self.data) - self._at > BUFFER or not await self._more():
                raise asyncio.IncompleteReadError(self.clear(), None)
        return self._take(end + len(separator))

    def _take(self, end: int) -> bytes:
        data = self.data
        if end == len(data):
            taken = data[self._at :] if self._at else data
            self.data, self._at = b"", 0
        else:
            taken, self._at = data[self._at : end], end
        if self._counted:
            self._recount()
        if self._paused and len(self.data) - self._at <= BUFFER:
            self._resume()
        return taken

    def _resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    async def _more(self) -> bool:
        """Wait for more input; returns False at the end of input."""
        before = len(self.data) - self._at
        if not self._ended:
            waiter = self._waiter = self._loop.create_future()
            self._wanted = _ANYTHING
            if self._paused:
                self._resume()
            await waiter
        return len(self.data) - self._at > before

    def _serve(self) -> None:
        """Give the waiter what it wants, if that is here or the input has ended."""
        waiter, wanted = self._waiter, self._wanted
        if waiter is not None and not waiter.done():  # nor cancelled
            size = len(self.data) - self._at
            found: bytes | None = None
            if wanted in (_LINE, _REST_OF_LINE):
                found = self._whole_line(is_rest=wanted == _REST_OF_LINE)
                if found is None and not self._ended:
                    return
            elif wanted != _ANYTHING:
                found = self._take(self._at + (size if wanted < 0 else min(wanted, size)))
            waiter.set_result(found)
        self._waiter = None

    def _whole_line(self, *, is_rest: bool) -> bytes | None:
        """Return the next line, or None if it is not all here; ``is_rest``: the end of one that is too long."""
        found = self.next_line() if self.data else None
        if found is not None:
            return b"" if is_rest else found
        if len(self.data) - self._at > BUFFER:
            self.clear()
            self._wanted = _REST_OF_LINE
        if self._paused:
            self._resume()
        return None
