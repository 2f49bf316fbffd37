"""The asyncio protocol of one client: lines and chunks in, replies out, deadlines, TLS.

What is read and answered is up to the CommandLoop. A client that disconnects cancels nothing: it shows as the end of
input (None for a line, b"" for a chunk), and what is written to it is dropped. What it sent before a reset is dropped,
too, since it can hear no answer. The event loop may report its end late, or, in the middle of a change to TLS, never:
so every wait has a deadline, and a client past it is aborted and taken for gone without asking the event loop.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

from relay.mail.reply import Reply
from relay.smtpd.read_buffer import ReadBuffer

_HANDSHAKE_SECONDS = 30.0
_GOODBYE_SECONDS = 5.0  # for the client's side of a close: TLS ends with a word from both
_TIMEOUT = Reply.of(421, "4.4.2 Timeout while waiting for you")
_GONE = "the client has gone"
_MOST_HELD = 100  # replies; then it is seen whether the client reads them
_MOST_IN_A_ROW = 3 * (_MOST_HELD + 1)  # commands of one client, some milliseconds' work; then it is the others' turn
_TLS_ERRORS = (ssl.SSLError, ConnectionError, TimeoutError, OSError)


class ClientProtocol(asyncio.Protocol):
    """One client's connection; ``run`` is started with it; the connection is closed when that returns."""

    def __init__(
        self,
        run: Callable[[ClientProtocol], Coroutine[Any, Any, None]],
        *,
        write_seconds: float,
        count: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``count`` is told how many octets more, or less, of the client's are in memory."""
        loop = asyncio.get_running_loop()
        self.loop = loop
        self.transport: Any = None
        self.read_buffer = ReadBuffer(loop, count)
        self._writable: asyncio.Future[None] | None = None  # while the transport wants no more: done when it does
        self._command_loop: asyncio.Task[None] | None = None
        self._run = run
        self._write_seconds = write_seconds  # for a client that does not read what we say
        self._watch_every = write_seconds / 4
        self._watchdog: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._deaf_at = math.inf
        self._lost = loop.create_future()  # done when the connection is no more
        self._handshake: asyncio.Task[Any] | None = None
        self._in_a_row = 0
        self._held: list[bytes] = []  # replies to commands that came together, to leave together
        self.waited = 0.0  # seconds, for what came last
        self.waiting = False  # for the client; only then may a deadline or a shutdown end the session
        self.tls = False
        self.peer: tuple[str, int] = ("", 0)

    # --- what asyncio calls -----------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Start the command_loop."""
        self.transport = transport
        self.read_buffer.follow(transport)
        peer = transport.get_extra_info("peername")
        if isinstance(peer, tuple):
            self.peer = (peer[0].removeprefix("::ffff:").partition("%")[0], peer[1])
        self._watch()
        self._command_loop = self.loop.create_task(self._run(self))
        self._command_loop.add_done_callback(self._end)

    def data_received(self, data: bytes) -> None:
        self.read_buffer.feed(data)

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the reader; the command loop ends by itself, after what must not be broken off."""
        self.transport = None
        self.read_buffer.follow(None)
        if error is not None:
            self.read_buffer.clear()
        self.read_buffer.end()
        if self._handshake is not None:
            self._handshake.cancel()  # nobody else would tell it
        if not self._lost.done():
            self._lost.set_result(None)
        self.resume_writing()

    def pause_writing(self) -> None:
        """Have who writes wait: the client does not read as fast."""
        if self._writable is None:
            self._writable = self.loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None:
            writable.set_result(None)

    def eof_received(self) -> bool:
        """Keep our side open where that can be done: the reply to the last command may still be wanted."""
        self.read_buffer.end()
        return not self.tls

    def _end(self, command_loop: asyncio.Task[None]) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._close()
        self.read_buffer.end()
        self.read_buffer.clear()
        if not command_loop.cancelled():
            command_loop.result()  # what it raises goes to the event loop's handler

    # --- out --------------------------------------------------------------------------------------------------

    @property
    def is_gone(self) -> bool:
        return self.transport is None

    @property
    def is_deaf(self) -> bool:
        """Whether the client has not read what we say for some seconds."""
        return self.loop.time() >= self._deaf_at - self._write_seconds + _GOODBYE_SECONDS

    @property
    def is_securing(self) -> bool:
        """Whether TLS is being negotiated."""
        return self._handshake is not None

    async def push(self, reply: Reply) -> None:
        """Write a reply. A client that has disconnected shows at the next read.

        While the next command is here already, replies leave together, at the latest when we wait for something: a
        client that pipelines reads them at once, and each write costs more than most commands.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self.read_buffer.has_line and len(self._held) < _MOST_HELD and not transport.get_write_buffer_size():
            if not self._held:
                self.loop.call_soon(self._flush)
            self._held.append(reply.wire)
            return
        self._write(reply)
        if transport.get_write_buffer_size() and self._writable is not None:
            self._deaf_at = self.loop.time() + self._write_seconds
            try:
                await asyncio.wait([self._writable])
            finally:
                self._deaf_at = math.inf

    def dismiss(self, reply: Reply) -> None:
        """Write a last reply and close; a reader finds the end of input, whatever has been received."""
        if self.transport is not None:
            self._write(reply)
            self._close()
        self.read_buffer.clear()
        self.read_buffer.end()

    def _write(self, reply: Reply) -> None:
        if self._held:
            self._held.append(reply.wire)
            self._flush()
        else:
            self.transport.write(reply.wire)

    def _flush(self) -> None:
        held, self._held = self._held, []
        if held and self.transport is not None and not self.transport.is_closing():
            self.transport.write(b"".join(held))

    def _close(self) -> None:
        self._flush()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()

    async def close(self) -> None:
        """Close; returns when the connection is gone, and until then the client counts as connected."""
        if self._lost.done():
            return
        self._close()
        seconds = _GOODBYE_SECONDS
        if self.transport is not None and self.transport.get_write_buffer_size():
            seconds = self._write_seconds
            self._deaf_at = self.loop.time() + seconds
        await asyncio.wait([self._lost], timeout=seconds)
        if not self._lost.done():
            self.abort()

    def abort(self) -> None:
        """Abort the connection, and take it for gone whatever the event loop says."""
        self.read_buffer.clear()  # nobody will hear the answers
        transport = self.transport
        if transport is not None:
            transport.abort()
        self.connection_lost(None)

    # --- in ---------------------------------------------------------------------------------------------------

    async def read_line(self, seconds: float, limit: int) -> bytes | None:
        """Return the next line, b"" for one that is too long, None at the end of input; all of it in the time given."""
        if self.read_buffer.has_line:
            await self._let_others()
        begun = self.loop.time()
        self._deadline = begun + seconds
        self.waiting = True
        line = await self.read_buffer.line()
        self.waiting = False
        self.waited = self.loop.time() - begun
        return b"" if line is not None and len(line) > limit else line

    async def read_chunk(self, seconds: float, most: int = -1) -> bytes:
        """Return what has come, at most so many octets; b"" at the end of input."""
        begun = self.loop.time()
        self._deadline = begun + seconds
        self.waiting = True
        chunk = await self.read_buffer.read(most)
        self.waiting = False
        self.waited = self.loop.time() - begun
        return chunk

    async def pause(self, seconds: float) -> None:
        """Wait, but not for a client that has gone."""
        await asyncio.wait([self._lost], timeout=seconds)

    async def _let_others(self) -> None:
        """Let the others have their turn: what a client has sent at once may be a hundred thousand commands."""
        self._in_a_row += 1
        if self._in_a_row > _MOST_IN_A_ROW:
            self._in_a_row = 1
            await asyncio.sleep(0)

    # --- TLS --------------------------------------------------------------------------------------------------

    async def start_tls(self, context: ssl.SSLContext, first: Reply | None = None, *, keep: bool = False) -> str:
        """Say ``first`` and negotiate TLS; returns "" or why it failed, and then the connection is of no more use.

        What came in plain text after the command is dropped: it must not count as if it had come under TLS (RFC 3207
        4.2). With ``keep``, where there was no plain text, it is the beginning of the handshake.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            return _GONE
        transport.pause_reading()  # all that comes from now on goes to TLS
        self.read_buffer.follow(None)  # until the handshake is over its transport is not ours to stop
        early = self.read_buffer.clear()
        if first is not None:
            self._write(first)
        self._handshake = self.loop.create_task(self._negotiate(transport, context))
        if early and keep:
            await asyncio.sleep(0)  # the task has asked for what connects its protocol, and then for reading to go on
            self.loop.call_soon(_feed, transport, early)
        # The loop's own limit cannot be relied on: it does not reach a connection that was lost a moment before.
        done, _ = await asyncio.wait([self._handshake], timeout=_HANDSHAKE_SECONDS + _GOODBYE_SECONDS)
        handshake, self._handshake = self._handshake, None
        try:
            secured = handshake.result() if done and not handshake.cancelled() else None
        except _TLS_ERRORS as error:
            reason = str(getattr(error, "reason", "") or type(error).__name__)
        else:
            if secured is not None and not self._lost.done():
                self.resume_writing()  # what the plain transport had too much of is its own
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
        if transport.is_closing():  # with the reply a moment ago: the loop would wait for ever for its end
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

    def _watch(self) -> None:
        """Look at the deadline now and then: cheaper than a timer for every command."""
        if self.waiting and self.loop.time() >= self._deadline:
            self._watchdog = None
            self.dismiss(_TIMEOUT)
        elif self.loop.time() >= self._deaf_at and self.transport is not None:
            self._watchdog = None
            self.abort()
        else:
            self._watchdog = self.loop.call_later(self._watch_every, self._watch)


def _feed(transport: Any, data: bytes) -> None:
    """Give octets to the TLS protocol as if the transport had just read them (asyncio.BufferedProtocol)."""
    protocol = transport.get_protocol()
    while data:
        room = protocol.get_buffer(len(data))
        size = min(len(room), len(data))
        room[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]
