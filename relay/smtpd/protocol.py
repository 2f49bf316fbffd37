"""The asyncio protocol of one client: lines and chunks in, replies out, deadlines, TLS.

The CommandLoop decides what to read and answer. A disconnect cancels nothing: reads return the end of input (None for a
line, b"" for a chunk), and writes are dropped. Input received before a reset is dropped too, since nobody would read
the reply. The event loop may report a disconnect late, or never if it happens during the TLS handshake: so every wait
has a deadline, and at the deadline the connection is aborted and treated as lost.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from relay.mail.reply import Reply, wire
from relay.smtpd.read_buffer import ReadBuffer

_HANDSHAKE_SECONDS = 30.0
_GOODBYE_SECONDS = 5.0  # for the client's side of a close, such as its TLS close_notify
_TIMEOUT = Reply.of(421, "4.4.2 Timeout while waiting for you")
_GONE = "the client has gone"
_MOST_HELD = 100  # replies written at once; then it is checked whether the client reads them
_MOST_IN_A_ROW = 3 * (_MOST_HELD + 1)  # commands of one client, a few milliseconds; then other clients have a turn
_TLS_ERRORS = (ssl.SSLError, ConnectionError, TimeoutError, OSError)

T = TypeVar("T")


class DeadlineWatch:
    """Looks at the deadlines of all clients of a process, with one timer: one for each costs more than a command."""

    def __init__(self) -> None:
        self._clients: set[ClientProtocol] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, client: ClientProtocol) -> None:
        """Look at a client's deadlines until it is discarded."""
        self._clients.add(client)
        if self._timer is None:
            self._timer = client.loop.call_later(client.watch_every, self._look, client.loop, client.watch_every)

    def discard(self, client: ClientProtocol) -> None:
        self._clients.discard(client)

    def _look(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._timer = loop.call_later(seconds, self._look, loop, seconds) if self._clients else None
        for client in tuple(self._clients):
            client.look_at_deadlines()


class ClientProtocol(asyncio.Protocol):
    """One client's connection; starts ``run`` when connected, and closes the connection when ``run`` returns."""

    def __init__(
        self,
        run: Callable[[ClientProtocol], Coroutine[Any, Any, None]],
        *,
        write_seconds: float,
        count: Callable[[int], None] = lambda _: None,
        watch: DeadlineWatch | None = None,
    ) -> None:
        """``count`` is called with the change in the number of octets received and not yet read."""
        loop = asyncio.get_running_loop()
        self.loop = loop
        self.transport: Any = None
        self.read_buffer = ReadBuffer(loop, count)
        self.data_received = self.read_buffer.feed  # type: ignore[method-assign]  # one call less for each packet
        self._writable: asyncio.Future[None] | None = None  # while writing is paused: done when it resumes
        self._command_loop: asyncio.Task[None] | None = None
        self._run = run
        self._write_seconds = write_seconds  # how long a client may leave our replies unread
        self.watch_every = write_seconds / 4
        self._watch = watch or DeadlineWatch()
        self._deadline = 0.0
        self._asked_at = 0.0  # when the wait for input began
        self._deaf_at = math.inf
        self._lost: asyncio.Future[None] = loop.create_future()  # done when the connection is lost
        self._handshake: asyncio.Task[Any] | None = None
        self._in_a_row = 0
        self._held: list[bytes] = []  # replies to pipelined commands, to be written at once
        self._awaited: asyncio.Future[Any] | None = None  # what the client has to send next
        self.tls = False
        self.peer: tuple[str, int] = ("", 0)

    @property
    def local(self) -> tuple[str, int]:
        """Our own address that the client has connected to; ("", 0) where that is not known any more."""
        found = self.transport.get_extra_info("sockname") if self.transport is not None else None
        return (found[0].removeprefix("::ffff:").partition("%")[0], found[1]) if isinstance(found, tuple) else ("", 0)

    # --- what asyncio calls -----------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Start the command loop."""
        self.transport = transport
        self.read_buffer.follow(transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = (peer[0].removeprefix("::ffff:").partition("%")[0], peer[1])
        self._watch.add(self)
        self._command_loop = self.loop.create_task(self._run(self))
        self._command_loop.add_done_callback(self._end)

    def connection_lost(self, error: Exception | None) -> None:
        """End the input; the command loop ends by itself, once it has finished what must not be interrupted."""
        self.transport = None
        self.read_buffer.follow(None)
        if error is not None:
            self.read_buffer.clear()
        self.read_buffer.end()
        if self._handshake is not None:
            self._handshake.cancel()  # asyncio does not
        if not self._lost.done():
            self._lost.set_result(None)
        self.resume_writing()

    def pause_writing(self) -> None:
        """Make ``push`` wait: the client reads too slowly."""
        if self._writable is None:
            self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None:
            writable.set_result(None)

    def eof_received(self) -> bool:
        """Keep our side open if TLS does not forbid it: the client may still read the reply to its last command."""
        self.read_buffer.end()
        return not self.tls

    def _end(self, command_loop: asyncio.Task[None]) -> None:
        self._watch.discard(self)
        self._close()
        self.read_buffer.end()
        self.read_buffer.clear()
        if not command_loop.cancelled():
            command_loop.result()  # an exception goes to the event loop's handler

    # --- out --------------------------------------------------------------------------------------------------

    @property
    def is_gone(self) -> bool:
        return self.transport is None

    @property
    def is_deaf(self) -> bool:
        """Whether the client has left our replies unread for at least ``_GOODBYE_SECONDS``."""
        return self.loop.time() >= self._deaf_at - self._write_seconds + _GOODBYE_SECONDS

    @property
    def is_silent(self) -> bool:
        """Whether we have been waiting for the client's next octet for at least ``_GOODBYE_SECONDS``."""
        return self.waiting and self.loop.time() >= self._asked_at + _GOODBYE_SECONDS

    @property
    def is_securing(self) -> bool:
        """Whether TLS is being negotiated."""
        return self._handshake is not None

    async def push(self, reply: Reply) -> None:
        """Write a reply, and wait while the client reads too slowly."""
        if self.put(reply):
            await self.catch_up()

    def put(self, reply: Reply) -> bool:
        """Write a reply; after a disconnect it is dropped. Returns whether the client has to ``catch_up``.

        While the next command has already arrived, replies are collected and written at once, at the latest when this
        task waits for something: a write costs more than most commands.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return False
        if (
            self.read_buffer.data
            and self.read_buffer.has_line
            and len(self._held) < _MOST_HELD
            and not transport.get_write_buffer_size()
        ):
            if not self._held:
                self.loop.call_soon(self._flush)
            self._held.append(wire(reply))
            return False
        if self._held:
            self._write(reply)
        else:
            transport.write(wire(reply))
        return self._writable is not None and transport.get_write_buffer_size() > 0

    async def catch_up(self) -> None:
        """Wait while the client reads too slowly."""
        if self._writable is not None:
            self._deaf_at = self.loop.time() + self._write_seconds
            try:
                await asyncio.wait([self._writable])
            finally:
                self._deaf_at = math.inf

    def dismiss(self, reply: Reply) -> None:
        """Write a last reply and close; unread input is dropped, and a reader gets the end of input."""
        if self.transport is not None:
            self._write(reply)
            self._close()
        self.read_buffer.clear()
        self.read_buffer.end()

    def _write(self, reply: Reply) -> None:
        if self._held:
            self._held.append(wire(reply))
            self._flush()
        else:
            self.transport.write(wire(reply))

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held and self.transport is not None and not self.transport.is_closing():
            self.transport.write(b"".join(held))

    def _close(self) -> None:
        if self._held:
            self._flush()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    async def close(self) -> None:
        """Close, and wait until the connection is gone; until then the client counts as connected."""
        if self._lost.done():
            return
        self._close()
        transport, seconds = self.transport, _GOODBYE_SECONDS
        if transport is not None and transport.get_write_buffer_size():
            seconds = self._write_seconds
            self._deaf_at = self.loop.time() + seconds
        elif not self.tls:  # nothing has to be waited for: the loop reports it in its next turn
            await self._lost
            return
        overdue = self.loop.call_later(seconds, self.abort)
        try:
            await self._lost
        finally:
            overdue.cancel()

    def abort(self) -> None:
        """Abort the connection and treat it as lost, without waiting for the event loop to report it."""
        self.read_buffer.clear()  # nobody would read the replies
        transport = self.transport
        if transport is not None:
            transport.abort()
        self.connection_lost(None)

    def cancel(self) -> None:
        """Cancel the command loop, whatever it waits for, and close."""
        if self._command_loop is not None:
            self._command_loop.cancel()

    # --- in ---------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether input is waited for; only then may a deadline or a shutdown end the session."""
        return self._awaited is not None and not self._awaited.done()

    @property
    def waited(self) -> float:
        """How many seconds the client took for what has just been read."""
        return max(0.0, self.loop.time() - self._asked_at)

    def line_at_hand(self) -> bytes | None:
        """Return the next line if all of it is here, and other clients have had their turn; b"" if it is too long."""
        self._in_a_row += 1
        if self._in_a_row > _MOST_IN_A_ROW:  # one client may have pipelined a hundred thousand
            return None
        self._asked_at = math.inf
        return self.read_buffer.next_line()

    def line(self, seconds: float) -> Awaitable[bytes | None]:
        """Return the next line, b"" if it is too long, None at the end of input, to be awaited; after ``seconds``, 421.

        To be called when there is none at hand.
        """
        if self._in_a_row > _MOST_IN_A_ROW:
            return self._line_after_others(seconds)
        self._in_a_row = 0
        awaited = self._awaited = self.read_buffer.line()
        self._asked_at = now = self.loop.time()
        self._deadline = now + seconds
        return awaited

    async def _line_after_others(self, seconds: float) -> bytes | None:
        await asyncio.sleep(0)
        self._in_a_row = 0
        line = await self.line(seconds)
        self._in_a_row = 1
        return line

    async def read_line(self, seconds: float, limit: int) -> bytes | None:
        """Return the next line as ``line`` does, b"" if longer than ``limit``."""
        line = self.line_at_hand() if self.read_buffer.data else None
        if line is None:
            line = await self.line(seconds)
        return b"" if line is not None and len(line) > limit else line

    def chunk(self, seconds: float, most: int = -1) -> Awaitable[bytes]:
        """Return what has arrived, at most ``most`` octets, b"" at the end of input, to be awaited."""
        awaited = self._awaited = self.read_buffer.chunk(most)
        self._asked_at = now = self.loop.time()
        self._deadline = now + seconds
        return awaited

    async def pause(self, seconds: float) -> None:
        """Wait ``seconds``, or until the connection is lost."""
        await asyncio.wait([self._lost], timeout=seconds)

    # --- TLS --------------------------------------------------------------------------------------------------

    async def start_tls(self, context: ssl.SSLContext, first: Reply | None = None, *, keep: bool = False) -> str:
        """Write ``first`` and negotiate TLS; returns "", or the reason of the failure, and then the connection is lost.

        Plain text received after STARTTLS is dropped: it must not count as received under TLS (RFC 3207 4.2). With
        ``keep`` (implicit TLS) it is the beginning of the handshake.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return _GONE
        transport.pause_reading()  # everything from now on belongs to TLS
        self.read_buffer.follow(None)  # during the handshake the read buffer must not pause the transport
        early = self.read_buffer.clear()
        if first is not None:
            self._write(first)
        self._handshake = self.loop.create_task(self._negotiate(transport, context))
        if early and keep:
            await asyncio.sleep(0)  # lets the task start: its protocol gets connected, then ``early``, then reading
            self.loop.call_soon(_feed, transport, early)
        # The loop's own time-out is not enough: it misses a connection that was lost just before.
        done, _ = await asyncio.wait([self._handshake], timeout=_HANDSHAKE_SECONDS + _GOODBYE_SECONDS)
        handshake, self._handshake = self._handshake, None
        try:
            secured = handshake.result() if done and not handshake.cancelled() else None
        except _TLS_ERRORS as error:
            reason = str(getattr(error, "reason", "") or type(error).__name__)
        else:
            if secured is not None and not self._lost.done():
                self.resume_writing()  # a pause was for the plain transport
                self.transport = secured
                self.read_buffer.follow(secured)
                self.tls = True
                return ""
            handshake.cancel()
            reason = _GONE
        transport.abort()
        self.abort()
        return reason

    async def _negotiate(self, transport: Any, context: ssl.SSLContext) -> Any:
        if transport.is_closing():  # since writing ``first``: the loop would wait for ever
            return None
        return await self.loop.start_tls(
            transport,
            self,
            context,
            server_side=True,
            ssl_handshake_timeout=_HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=_GOODBYE_SECONDS,
        )

    # --- deadlines --------------------------------------------------------------------------------------------

    def look_at_deadlines(self) -> None:
        """Say 421 to a client that sends nothing in time, and abort the connection of one that reads nothing."""
        if self.waiting and self.loop.time() >= self._deadline:
            self._watch.discard(self)
            self.dismiss(_TIMEOUT)
        elif self.loop.time() >= self._deaf_at and self.transport is not None:
            self._watch.discard(self)
            self.abort()


def _feed(transport: Any, data: bytes) -> None:
    """Pass octets to the TLS protocol as if the transport had just read them (asyncio.BufferedProtocol)."""
    protocol = transport.get_protocol()
    while data:
        room = protocol.get_buffer(len(data))
        size = min(len(room), len(data))
        room[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]
