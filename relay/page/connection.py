"""One HTTP connection: uvicorn's, with the deadlines and limits that it lacks.

A head has to be there within some seconds and octets, a body too, and who does not take an answer is disconnected:
none of these has a deadline in uvicorn. An event stream may last; all else has an end. After the last answer the
connection lingers, so that octets that a client has sent behind its request do not cut the answer off. Where there are
too many connections, the one that has been silent for longest makes room for the next.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_OCTETS = 16384  # of request line and headers: a browser sends the cookies of all that is on this host
HEAD_SECONDS = 5.0
BODY_SECONDS = 15.0  # from the head to the last octet of the body
ANSWER_SECONDS = 60.0  # from the head to the last octet of the answer taken, but for event streams
STUCK_SECONDS = 10.0  # without an octet taken
LINGER_SECONDS = 1.0
MOST = 128  # connections at once

_FRESH_SECONDS = 0.5  # for the request to come behind the connection
_SLICE = 4096  # octets that are parsed at once, so that the limit holds however much arrives at once
STREAM = "smtpdup.stream"  # in the scope of a request whose answer is a stream of events


class _Transport:
    """A transport whose close waits for what the client still sends, see HttpConnection.linger."""

    def __init__(self, transport: asyncio.Transport, connection: HttpConnection) -> None:
        self._transport = transport
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._connection.linger()

    def is_closing(self) -> bool:
        return self._connection.is_lingering or self._transport.is_closing()


class HttpConnection(H11Protocol):
    """A client's connection, of which the server looks several times a second whether it is overdue."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_lingering = False
        self._real: asyncio.Transport | None = None
        self._head_since = time.monotonic()
        self._seen: object = None  # the last request that was looked at, and when it came
        self._asked_at = 0.0
        self._silent_since = self._head_since
        self._left: tuple[int, float] = (0, 0.0)  # octets that the client has yet to take, and since when so many

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being made, or has not been taken."""
        return self._is_asked or bool(self._real and self._real.get_write_buffer_size())

    @property
    def _is_asked(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_stream(self) -> bool:
        """Whether the answer is a stream of events, which lasts."""
        return self._is_asked and STREAM in self.cycle.scope

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        self._real = transport
        super().connection_made(cast("asyncio.Transport", _Transport(transport, self)))
        if len(self.connections) > MOST:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        if not self._is_asked and not self.conn.trailing_data[0]:
            self._head_since = time.monotonic()  # its first octet
        for start in range(0, len(data), _SLICE):
            if not self.is_lingering:
                super().data_received(data[start : start + _SLICE])

    def eof_received(self) -> bool | None:  # type: ignore[override]  # uvicorn's says None
        """Answer a client that has closed its side behind its request."""
        if self.is_lingering or not self._is_asked or self.is_stream:
            return None
        self.cycle.keep_alive = False
        return True

    def on_response_complete(self) -> None:
        self._silent_since = self._head_since = time.monotonic()
        super().on_response_complete()

    def linger(self) -> None:
        """Send what is left and the end, then read until the client closes too."""
        real = self._real
        if real is None or self.is_lingering or real.is_closing():
            return
        self._unset_keepalive_if_required()
        self.is_lingering = True
        self._silent_since = time.monotonic()
        self.flow.resume_reading()
        if real.can_write_eof():
            real.write_eof()
        else:
            real.close()

    def abort(self) -> None:
        """Disconnect at once."""
        if self._real is not None:
            self._real.abort()

    def look(self, now: float) -> None:
        """Disconnect a client that is overdue."""
        real = self._real
        if real is None:
            return
        if self.cycle is not self._seen:
            self._seen, self._asked_at = self.cycle, now
        left = real.get_write_buffer_size()
        if left != self._left[0]:
            self._left = (left, now)
        if left and now - self._left[1] >= STUCK_SECONDS:
            self.abort()
        elif self.is_lingering:
            if not left and now - max(self._silent_since, self._left[1]) >= LINGER_SECONDS:
                self.abort()
        elif not self._is_asked:
            if now - self._head_since >= HEAD_SECONDS or self._owes_body(now, BODY_SECONDS):
                self.abort()
        elif self._owes_body(now, BODY_SECONDS) or (now - self._asked_at >= ANSWER_SECONDS and not self.is_stream):
            self.abort()

    def _owes_body(self, now: float, seconds: float) -> bool:
        return self.conn.their_state is h11.SEND_BODY and now - self._asked_at >= seconds

    def _rank(self, now: float) -> int:
        """Return how much it may stay: whoever has just come may be about to ask."""
        if not self.is_busy:
            return 3 if now - self._silent_since < _FRESH_SECONDS else 0
        if self._owes_body(now, _FRESH_SECONDS):
            return 1
        return 2 if self.is_stream else 4

    def _make_room(self) -> None:
        """Disconnect one: the silent first, then who owes a form, then who has a stream; the oldest of them."""
        now = time.monotonic()
        others = [c for c in self.connections if isinstance(c, HttpConnection) and c is not self]
        oldest = min(others, key=lambda c: (c._rank(now), c._silent_since), default=None)  # noqa: SLF001  (its own kind)
        if oldest is not None:
            self.connections.discard(oldest)
            oldest.abort()
