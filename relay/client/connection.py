"""One session with a server: pipelined commands, replies in order, a streamed body that is held open before its dot.

An unsolicited reply is kept (``early_reply``) and never taken for the reply to a later command. Every failure is a
ClientError with the stage and, if there was one, the server's reply.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from relay.client.errors import ClientError, ConnectionGone, DeadlinePassed, MalformedReply, stage_of
from relay.client.reply_parser import ReplyParser, plain
from relay.client.server_limits import UNLIMITED, after_yes, extensions_in, server_limits
from relay.client.unread import unread
from relay.mail.destination import Destination
from relay.mail.esmtp import has_control
from relay.mail.reply import Reply

_WRITE_HIGH = 256 * 1024  # octets buffered in the transport before a writer waits
_MAX_UNASKED = 100  # unsolicited replies before the connection is closed
_TWO_LINES = "control character in an SMTP command"
_OF_MAIL = frozenset((b"MAIL", b"RCPT", b"DATA", b"."))


class Connection(asyncio.Protocol):
    """A session after its handshake. Made by ``connect``; used by one task at a time.

    Each line given to ``send`` owes one reply, and ``reply`` returns them in that order. After a 354 the caller calls
    ``begin_data``, writes the body and ends it with ``end_body``; after the last reply to the dot, ``end_data``.
    """

    __slots__ = (
        "_behind_dot",
        "_deadline",
        "_drain",
        "_extra",
        "_fault",
        "_is_ahead",
        "_loop",
        "_lost",
        "_owed",
        "_parser",
        "_patience",
        "_paused",
        "_ready",
        "_timer",
        "_timer_at",
        "_torn",
        "_transport",
        "_waiter",
        "created",
        "destination",
        "early_reply",
        "extensions",
        "hostname",
        "in_data",
        "introduced",
        "is_dirty",
        "last_used",
        "limits",
        "peer",
        "refusals",
        "transactions",
        "turned_away",
    )

    def __init__(
        self, destination: Destination, transport: asyncio.Transport, hello: Sequence[str], hostname: str
    ) -> None:
        """Take over a transport after its handshake. ``hello`` are the lines of the reply to EHLO after the first one.

        ``hostname`` is the name that was sent in EHLO.
        """
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self.destination = destination
        self.extensions: Mapping[str, str] = {}  # EHLO keyword in capitals -> parameters
        self.hostname = hostname
        self.limits = UNLIMITED
        self.peer: tuple[Any, ...] = transport.get_extra_info("peername") or ()
        self.created = self.last_used = time.monotonic()
        self.transactions = 0  # MAIL commands sent
        self.refusals = 0  # of MAIL, RCPT, DATA and dot since the last accepted message: servers slow down for them
        self.turned_away = False  # it said 421 to a command, or nothing: another host of the same name may be better
        self.in_data = False  # the server reads body text, so only the dot or a close may follow
        self.is_dirty = False  # a MAIL was sent, and neither was its dot answered with a yes nor a RSET sent
        self._is_ahead = False  # the next MAIL was sent behind the dot
        self._behind_dot = 0  # octets sent with the last dot, behind it
        self.introduced = b""  # the XCLIENT command in effect
        self._owed: deque[bytes] = deque()  # verbs whose replies have not arrived
        self._ready: deque[Reply] = deque()  # replies that arrived before they were awaited
        self._waiter: asyncio.Future[Reply] | None = None
        self._drain: asyncio.Future[None] | None = None
        self._deadline = self._patience = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._paused = self._lost = self._torn = False
        self._fault: str = ""  # why the server's output is no SMTP reply
        self.early_reply: Reply | None = None  # the first unsolicited: a 552 or 421 before the dot, a 421 while idle
        self._extra = 0  # unsolicited replies so far
        self._parser = ReplyParser()
        self.announce(hello)
        transport.set_write_buffer_limits(high=_WRITE_HIGH)
        transport.set_protocol(self)

    @property
    def is_open(self) -> bool:
        return not self._lost and not self._transport.is_closing()

    @property
    def is_usable(self) -> bool:
        """Whether a new transaction may start: open, no reply owed or unread, none unsolicited."""
        return not (
            self._owed
            or self._ready
            or self.in_data
            or self.early_reply
            or self._lost
            or not self._parser.is_between
            or self._transport.is_closing()
        )

    @property
    def is_encrypted(self) -> bool:
        return self._transport.get_extra_info("ssl_object") is not None

    @property
    def certificate(self) -> dict[str, Any]:
        """The server's certificate, as from ssl's getpeercert(); empty if it was not verified."""
        return self._transport.get_extra_info("peercert") or {}

    @property
    def replies_owed(self) -> int:
        """The number of replies that ``reply`` has still to return."""
        return len(self._owed) + len(self._ready)

    def command(self, line: bytes, *, timeout: float) -> asyncio.Future[Reply]:
        """Send a line; returns its reply as ``reply`` does. Raises what ``send`` and ``reply`` raise."""
        self.send(line)
        return self.reply(timeout=timeout)

    def send(self, *lines: bytes) -> None:
        """Send lines (each without CRLF) in one write; each owes a reply. Raises ConnectionGone, ValueError."""
        if any(map(has_control, lines)):
            raise ValueError(_TWO_LINES)
        if self.in_data and lines != (b".",):
            # The server would take it for body text, and the next dot would end a message made of two.
            raise RuntimeError("only the dot may be sent in the DATA phase")
        self._speak(lines[0], lines)
        self._transport.write(b"\r\n".join((*lines, b"")))

    def reply(self, _line: bytes = b"", *, timeout: float) -> asyncio.Future[Reply]:
        """Return the next reply that is owed, in a future, which costs less than a coroutine for each reply.

        Raises ConnectionGone and MalformedReply, and so does the future, which raises DeadlinePassed too. The line that
        it answers, which was sent before, may be named, as where ``command`` would send it.
        """
        future = self._loop.create_future()
        if self._ready:
            future.set_result(self._ready.popleft())
            return future
        if not self._owed or (self._waiter is not None and not self._waiter.done()):
            raise RuntimeError("another task awaits the reply" if self._owed else "no reply is owed")
        if self._lost or self._fault:
            raise self._gone(self._owed[0])
        self._waiter = future
        self._patience = timeout
        self._deadline = when = self._loop.time() + timeout
        if when < self._timer_at:  # one timer serves many replies: it is only moved if it would fire too late
            self._set_timer(when)
        return future

    def begin_data(self) -> None:
        """Note that the server replied 354: from now on it reads body text."""
        self.in_data = True

    def end_data(self) -> None:
        """Note that the dot has been answered: the server reads commands again."""
        self.in_data = False
        # After a refused dot, too: a Postfix with smtpd_end_of_data_restrictions has the transaction open still.
        self.is_dirty, self._is_ahead = self._is_ahead or self.refusals > 0, False

    async def write_body(self, chunk: bytes | memoryview, *, timeout: float) -> None:
        """Write body text unchanged, in at most ``timeout`` seconds for each 256 KiB. The chunk must not change later.

        Returns early, with part of it unwritten, when the server replies before the dot (see ``early_reply``). Raises
        ConnectionGone (whose ``reply`` is that early reply) and DeadlinePassed.
        """
        self._speak(b"body")
        self._torn = True  # until the transport has all of it: a dot after half a chunk would end half a message
        size = len(chunk)
        if size <= _WRITE_HIGH:
            self._transport.write(chunk)
            if self._paused or self._transport.is_closing():
                await self._drained(timeout)
        else:
            view = memoryview(chunk)
            for start in range(0, size, _WRITE_HIGH):
                if self.early_reply:
                    return
                self._transport.write(view[start : start + _WRITE_HIGH])
                if self._paused or self._transport.is_closing():
                    await self._drained(timeout)
        self._torn = False

    def end_body(self, last: bytes | memoryview = b"", *, replies: int = 1, then: Sequence[bytes] = ()) -> None:
        """Write the last of the body and the end-of-data line at once. Raises ClientError before anything is written.

        ``replies``: LMTP owes one for each recipient. ``then`` are commands of the next transaction, for a server with
        PIPELINING: RFC 2920 3.1 lets the content be the first "command" of a group.
        """
        if not self.in_data:
            raise RuntimeError("no DATA phase to end")
        if any(map(has_control, then)):
            raise ValueError(_TWO_LINES)
        self._speak(b".", (*(b".",) * replies, *then))
        behind = b"\r\n".join((*then, b"")) if then else b""
        self._is_ahead = bool(then)
        self._behind_dot = len(behind)
        self._transport.writelines((last, b".\r\n" + behind))

    async def quit(self, timeout: float = 2.0) -> None:
        """Send QUIT if the state allows it, then close. Raises nothing but CancelledError."""
        try:
            if not self.in_data:
                self.send(b"QUIT")
                while self.replies_owed:
                    await self.reply(timeout=timeout)
        except (ClientError, RuntimeError):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Close at once; data that the transport has not sent is dropped."""
        self._transport.abort()

    def announce(self, lines: Sequence[str]) -> None:
        """Note the extensions that a server announces in these lines of its reply to EHLO."""
        self.extensions = extensions_in(lines)
        self.limits = server_limits(self.extensions)

    # -- what asyncio calls --

    def data_received(self, data: bytes) -> None:
        if self._fault:
            return
        try:
            if self._parser.is_between and data[-2:] == b"\r\n" and (reply := plain(data[:-2])) is not None:
                self._deliver(reply)  # exactly one line, as nearly always
                return
            self._parser.feed(data, self._deliver)
        except ValueError as error:
            self._malformed(str(error))

    def eof_received(self) -> None:
        """Deliver a reply that ends without its last line; returning None closes the transport."""
        if self._fault:
            return
        try:
            reply = self._parser.finish()
            if reply is not None:
                self._deliver(reply)
        except ValueError as error:
            self._malformed(str(error))

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None and not self._lost:
            self._read_remains()
        self.eof_received()
        self._lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fail()
        self._wake_writer()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake_writer()

    # -- reading --

    def _deliver(self, reply: Reply) -> None:
        """Give a reply to who waits for it. Raises ValueError where it cannot be the one that is due."""
        if not self._owed:
            self._extra += 1
            self.early_reply = self.early_reply or reply
            if self._extra > _MAX_UNASKED:
                self._malformed("a flood of replies to nothing")
            self._wake_writer()
            return
        verb = self._owed.popleft()
        if reply.code >= 400:
            self.turned_away |= reply.code == 421
            self.refusals += verb in _OF_MAIL
        elif verb == b".":
            if (
                reply.code != 250 and not reply.takes_message
            ) or self._transport.get_write_buffer_size() > self._behind_dot:
                self._owed.appendleft(verb)  # a yes before the dot has left is to something else
                raise ValueError(f"no answer to the message: {reply.text}")
            self.refusals = 0
            self.limits = after_yes(self.limits, reply, self.destination)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(reply)
        else:
            self._ready.append(reply)

    def _fail(self, error: ClientError | None = None) -> None:
        """Raise an error in who waits for a reply, if anybody does."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(error or self._gone(self._owed[0]))

    def _malformed(self, why: str) -> None:
        self._fault = why
        self._fail()
        self._transport.abort()

    def _read_remains(self) -> None:
        """Read what has come before a failed write: a server that refuses a body replies, then closes.

        Not for TLS, which cannot be decrypted without the transport.
        """
        if not self.is_encrypted and (self._owed or self.in_data):
            for data in unread(self._transport):
                self.data_received(data)

    # -- waiting --

    def _speak(self, line: bytes, lines: Sequence[bytes] = ()) -> None:
        """Note the commands ``lines`` that owe a reply. Raises ClientError unless the server may be expected to."""
        is_amid = not (self._owed or self._parser.is_between)  # in half a reply, to nothing
        if is_amid or self.early_reply or self._fault or self._torn or self._lost or self._transport.is_closing():
            raise self._gone(line[:4])
        for each in lines:
            verb = each[:4].upper()
            self._owed.append(verb)
            if verb == b"MAIL":
                self.transactions += 1
                self.is_dirty = True
            elif verb == b"RSET":
                self.is_dirty = False

    def _gone(self, verb: bytes) -> ClientError:
        if self._fault:
            return MalformedReply(self._fault, stage=stage_of(verb))
        text = "the connection was closed"
        if self.is_open:
            text = "the body was not written in full" if self._torn else "the server spoke out of turn"
        return ConnectionGone(text, stage=stage_of(verb), reply=self.early_reply)

    async def _drained(self, timeout: float) -> None:
        self._drain = self._loop.create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._drain
        except TimeoutError:
            raise DeadlinePassed(f"no room to write for {timeout:g} s", stage="message body") from None
        finally:
            self._drain = None
        if self._lost:
            raise self._gone(b"body")

    def _wake_writer(self) -> None:
        if self._drain is not None and not self._drain.done():
            self._drain.set_result(None)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_at = self._loop.call_at(when, self._expire), when

    def _expire(self) -> None:
        self._timer, self._timer_at = None, math.inf
        if self._waiter is None or self._waiter.done():
            return
        if self._deadline > self._loop.time():
            self._set_timer(self._deadline)
        else:
            self.turned_away = True
            self._fail(DeadlinePassed(f"no reply within {self._patience:g} s", stage=stage_of(self._owed[0])))
