"""One client's conversation: the whole flow of a message reads here, in ``_data``.

    MAIL, RCPT -> the primary's replies are the client's; DATA -> the body streams on to the primary while it
    comes, all but the end-of-data line; the copy is staged; the held dot goes out; by the primary's reply the
    copy is released, discarded, or held as uncertain; the client hears that reply.

A subclass of aiosmtpd's SMTP, which keeps the transport, STARTTLS and AUTH; the command loop, the syntax of
MAIL and RCPT and the reading of DATA are ours. Trouble becomes a Reply; what is not foreseen becomes 451, and
only the session writes to the client. A client that hangs up never cancels us: it shows as the end of input.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiosmtpd.smtp import SMTP

from relay import faults, headers, maillog, metrics
from relay.data import ClientGone, EndOfData, unread
from relay.envelope import Envelope, IdSource, Message, Recipient, Reply
from relay.intake import Intake, NotDurable
from relay.ledger import Released
from relay.occupancy import Seat
from relay.parameters import (
    MAIL_EXTENSIONS,
    RCPT_EXTENSIONS,
    SyntaxProblem,
    carried,
    offers,
    parse_path,
    refuse_unknown,
    value,
)
from relay.primary import NoReply, Primary, Transaction
from relay.settings import Settings

_LINE_LIMIT = 4096  # octets of a command line; RFC 5321 4.5.3.1.4 with room for ORCPT and ENVID
_BUFFER = 1 << 16
_BAD_LIMIT = 20  # commands that we cannot make sense of, then goodbye
_OWN_LINES_LIMIT = 5  # Received lines of our own: a forward that lawfully comes back passes

_OK = Reply.of(250, "2.0.0 Ok")
_GO_AHEAD = Reply.of(354, "End data with <CR><LF>.<CR><LF>")
_MAIL_FIRST = Reply.of(503, "5.5.1 MAIL first")
_INTERNAL = Reply.of(451, "4.3.0 Internal error, try again later")
_SHUTDOWN = Reply.of(421, "4.3.2 Service shutting down, try again later")
_TIMEOUT = Reply.of(421, "4.4.2 Timeout while waiting for you")
_CROWDED = Reply.of(421, "4.3.2 Too many connections, try again later")
_FULL = Reply.of(452, "4.3.1 Too much mail at once, try again later")
_NO_ANSWER = Reply.of(451, "4.4.2 The primary server did not answer, try again later")
_NOT_DURABLE = Reply.of(451, "4.3.1 The copy cannot be stored at the moment, try again later")


@dataclass(slots=True)
class Front:
    """What the sessions of one relay process share."""

    settings: Settings
    primary: Primary
    intake: Intake
    ids: IdSource
    seat: Seat
    sessions: set[Session] = field(default_factory=set)
    stopping: bool = False


class Session(SMTP):
    """The conversation with one client."""

    def __init__(self, front: Front) -> None:
        # aiosmtpd's own constructor scans classes for 130 us a connection; what its other methods need is set here.
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_BUFFER, loop=loop)
        asyncio.StreamReaderProtocol.__init__(self, reader, client_connected_cb=self._cb_client_connected, loop=loop)
        self.loop = loop
        self.transport: Any = None
        self._front = front
        self._settings = front.settings.smtp
        self._peer = ""
        self._deadline = 0.0
        self._watchdog: asyncio.TimerHandle | None = None
        self._waiting = False  # for the client; only then may a deadline or a shutdown end the conversation
        self._in_data = False
        self._octets = 0  # of the message being received, as counted in our seat
        self._bad = 0
        self._helo_name = ""
        self._extended = False
        self._offered: frozenset[str] = frozenset()
        self._transaction: Transaction | None = None
        self._sender = ""
        self._parameters: tuple[str, ...] = ()
        self._recipients: list[Recipient] = []

    # --- the connection: what asyncio calls -------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        """Start the conversation."""
        asyncio.StreamReaderProtocol.connection_made(self, transport)
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self._peer = peer[0].removeprefix("::ffff:") if isinstance(peer, tuple) else ""
        self._front.sessions.add(self)
        self._handler_coroutine = self.loop.create_task(self._converse())

    def connection_lost(self, error: Exception | None) -> None:
        """Tell the reader; the conversation ends by itself, after what must not be broken off."""
        asyncio.StreamReaderProtocol.connection_lost(self, None)
        self.transport = None

    def eof_received(self) -> bool:
        """Keep our side open: the reply to the last command may still be wanted."""
        self._reader.feed_eof()
        return True

    def stop(self, *, impatient: bool) -> None:
        """End an idle conversation now; one in a transaction after it, or, impatient, before its DATA."""
        if self._waiting and (self._transaction is None or (impatient and not self._in_data)):
            self._dismiss(_SHUTDOWN)

    def _dismiss(self, reply: Reply) -> None:
        if self.transport is not None:
            self.transport.write(reply.wire)
            self.transport.close()
        self._reader.feed_eof()

    def _watch(self) -> None:
        """Look at the deadline now and then: cheaper than a timer for every command."""
        if self._waiting and self.loop.time() >= self._deadline:
            self._watchdog = None
            self._dismiss(_TIMEOUT)
        else:
            often = min(self._settings.idle_timeout, self._settings.lease_idle_timeout) / 4
            self._watchdog = self.loop.call_later(often, self._watch)

    def _wait(self, seconds: float) -> None:
        self._deadline = self.loop.time() + seconds
        self._waiting = True

    async def push(self, reply: Reply) -> None:  # type: ignore[override]  # a Reply instead of text
        """Write a reply. That the client has gone is found out at the next read."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(reply.wire)
            if self.transport.get_write_buffer_size():
                try:
                    await self._writer.drain()
                except ConnectionError:
                    self._reader.feed_eof()

    # --- the loop ---------------------------------------------------------------------------------------------

    async def _converse(self) -> None:
        try:
            self._front.seat.add_client(1)
            refusal = self._unwelcome()
            if refusal is not None:
                metrics.connections_refused.inc()
                self._dismiss(refusal)
                return
            metrics.connections.inc()
            self._watch()
            await self.push(Reply.of(220, f"{self._settings.domain} ESMTP smtp-dup"))
            while (line := await self._read_line()) is not None:
                reply = await self._answer(line)
                await self.push(reply)
                if reply.code in (221, 421):
                    break
                if self._front.stopping and self._transaction is None:
                    await self.push(_SHUTDOWN)
                    break
        except ClientGone:
            pass
        finally:
            self._forget()
            if self._watchdog is not None:
                self._watchdog.cancel()
            self._front.sessions.discard(self)
            self._front.seat.add_client(-1)
            if self.transport is not None:
                self.transport.close()

    def _unwelcome(self) -> Reply | None:
        if self._front.stopping:
            return _SHUTDOWN
        if self._front.seat.clients > self._settings.max_connections:
            return _CROWDED
        if self._peer and not self._settings.allows(self._peer):
            reply = Reply.of(554, "5.7.1 Client address not allowed")
            maillog.command_refused(self._peer, "connect", reply)
            return reply
        return None

    async def _read_line(self) -> bytes | None:
        """Return the next command line, b"" for one that is too long, None at the end of input."""
        holds = self._transaction is not None
        self._wait(self._settings.lease_idle_timeout if holds else self._settings.idle_timeout)
        too_long = False
        try:
            while True:
                try:
                    line = await self._reader.readuntil(b"\n")
                except asyncio.LimitOverrunError as overrun:
                    await self._reader.read(overrun.consumed)
                    too_long = True
                except asyncio.IncompleteReadError:
                    return None
                else:
                    return b"" if too_long or len(line) > _LINE_LIMIT else line
        finally:
            self._waiting = False

    async def _answer(self, line: bytes) -> Reply:
        """Return the reply to one command: the only place where the unforeseen becomes a reply."""
        if not line:
            return self._nonsense(Reply.of(500, "5.5.2 Line too long"))
        verb, _, argument = line.rstrip(b"\r\n").partition(b" ")
        command = _COMMANDS.get(verb.upper())
        if command is None:
            return self._nonsense(Reply.of(500, "5.5.2 Command not recognized"))
        try:
            return await command(self, argument.strip().decode("utf-8", "surrogateescape"))
        except SyntaxProblem as problem:
            return self._nonsense(problem.reply)
        except ClientGone:
            raise
        except Exception as error:
            maillog.session_error(self._peer, error)
            metrics.session_errors.inc()
            self._abandon()
            return _INTERNAL

    def _nonsense(self, reply: Reply) -> Reply:
        self._bad += 1
        return reply if self._bad < _BAD_LIMIT else Reply.of(421, "4.7.0 Too many errors, goodbye")

    def _forget(self) -> None:
        """End the transaction, if any, without a message."""
        if self._transaction is not None:
            self._transaction.end()
            self._transaction = None
        self._recipients = []

    def _abandon(self) -> None:
        """End the transaction in whatever state it is, by a close."""
        if self._transaction is not None:
            self._transaction.abandon()
        self._forget()

    # --- commands ---------------------------------------------------------------------------------------------

    async def _helo(self, name: str) -> Reply:
        if not name:
            raise SyntaxProblem(501, "5.5.4 Syntax: HELO hostname")
        self._forget()
        self._helo_name, self._extended, self._offered = name, False, frozenset()
        return Reply.of(250, self._settings.domain)

    async def _ehlo(self, name: str) -> Reply:
        if not name:
            raise SyntaxProblem(501, "5.5.4 Syntax: EHLO hostname")
        self._forget()
        lines, offered = offers(await self._front.primary.announced(), self._settings.max_message_bytes)
        self._helo_name, self._extended, self._offered = name, True, offered
        return Reply.of(250, self._settings.domain, *lines)

    async def _noop(self, _: str) -> Reply:
        return _OK

    async def _rset(self, argument: str) -> Reply:
        if argument:
            raise SyntaxProblem(501, "5.5.4 Syntax: RSET")
        self._forget()
        return _OK

    async def _quit(self, argument: str) -> Reply:
        if argument:
            raise SyntaxProblem(501, "5.5.4 Syntax: QUIT")
        return Reply.of(221, "2.0.0 Bye")

    async def _vrfy(self, argument: str) -> Reply:
        if not argument:
            raise SyntaxProblem(501, "5.5.4 Syntax: VRFY address")
        return Reply.of(252, "2.1.5 Cannot verify, but will pass the message on")

    async def _help(self, _: str) -> Reply:
        return Reply.of(214, "2.0.0 " + " ".join(verb.decode() for verb in _COMMANDS))

    async def _mail(self, argument: str) -> Reply:
        if not self._helo_name:
            return self._nonsense(Reply.of(503, "5.5.1 HELO or EHLO first"))
        if self._transaction is not None:
            return self._nonsense(Reply.of(503, "5.5.1 Nested MAIL command"))
        sender, given = parse_path(argument, "FROM")
        refuse_unknown(given, MAIL_EXTENSIONS, self._offered)
        size = value(given, "SIZE")
        if size is not None and not (size.isascii() and size.isdigit()):
            raise SyntaxProblem(501, "5.5.4 SIZE must be a number")
        if size and self._settings.max_message_bytes and int(size) > self._settings.max_message_bytes:
            return Reply.of(552, "5.3.4 Message is larger than this relay takes")
        if self._is_full(int(size or 0)):
            return _FULL
        if (value(given, "BODY") or "7BIT").upper() not in ("7BIT", "8BITMIME"):
            raise SyntaxProblem(501, "5.5.4 BODY must be 7BIT or 8BITMIME")

        def command(available: Mapping[str, str]) -> bytes:
            return _wire("MAIL FROM", sender, carried(given, MAIL_EXTENSIONS, available))

        self._transaction, reply = await self._front.primary.begin(command)
        if self._transaction is None:
            maillog.command_refused(self._peer, "MAIL", reply)
        self._sender, self._parameters, self._recipients = sender, given, []
        return reply

    async def _rcpt(self, argument: str) -> Reply:
        transaction = self._transaction
        if transaction is None:
            return self._nonsense(_MAIL_FIRST)
        address, given = parse_path(argument, "TO")
        refuse_unknown(given, RCPT_EXTENSIONS, self._offered)
        recipient = Recipient(address, given)
        if not address:
            raise SyntaxProblem(501, "5.1.3 A recipient needs an address")
        if self._settings.allowed_domains and recipient.domain not in self._settings.allowed_domains:
            reply = Reply.of(554, "5.7.1 Relaying to this domain is not allowed")
        elif len(self._recipients) >= self._settings.max_recipients:
            reply = Reply.of(452, "4.5.3 Too many recipients")
        else:
            reply = await transaction.rcpt(
                _wire("RCPT TO", address, carried(given, RCPT_EXTENSIONS, transaction.extensions))
            )
            if reply.is_positive:
                self._recipients.append(recipient)
        metrics.recipients.labels(metrics.reply_class(reply.code)).inc()
        if not reply.is_positive:
            maillog.command_refused(self._peer, f"RCPT <{address}>", reply)
        return reply

    async def _data(self, argument: str) -> Reply:
        """The flow of a message."""
        if argument:
            raise SyntaxProblem(501, "5.5.4 Syntax: DATA")
        transaction = self._transaction
        if transaction is None:
            return self._nonsense(_MAIL_FIRST)
        if not self._recipients:
            return Reply.of(554, "5.5.1 No valid recipients")
        if self._is_full(0):
            return _FULL
        reply = await transaction.data()
        if reply.code != 354:
            self._forget()
            maillog.command_refused(self._peer, "DATA", reply)
            return reply
        self._in_data = True
        await self.push(_GO_AHEAD)
        message_id = self._front.ids.next()
        try:
            body, refusal = await self._stream(transaction, self._trace(message_id))
            message = Message(self._envelope(message_id, len(body)), body)
            refusal = refusal or self._loop_guard(body)
            if refusal is not None:
                transaction.abandon()
                metrics.messages.labels("own").inc()
                maillog.refused(message.envelope, refusal)
                return refusal
            staged = await self._stage(message)
            if not staged and self._front.settings.relay.require_durable_copies and message.envelope.destinations:
                transaction.abandon()
                return _NOT_DURABLE
            return await self._finish(transaction, message, staged)
        except BaseException:
            transaction.abandon()
            raise
        finally:
            self._in_data = False
            self._front.seat.add_octets(-self._octets)
            self._octets = 0
            self._transaction = None
            self._recipients = []

    async def _stream(self, transaction: Transaction, trace: bytes) -> tuple[bytes, Reply | None]:
        """Pass the body on while it comes, and keep it. After a refusal the rest is read and dropped."""
        kept: list[bytes] = [trace]
        refusal: Reply | None = None
        forward = [trace]  # leaves with the first chunk of the body
        async for chunk in self._chunks():
            refusal = refusal or self._too_much(len(chunk))
            if refusal is not None:
                transaction.abandon()
                kept.clear()
                continue
            kept.append(chunk)
            refusal = await transaction.write([b"".join((*forward, chunk))] if forward else [chunk])
            forward = []
        if forward and refusal is None:
            refusal = await transaction.write(forward)
        return b"".join(kept), refusal

    def _too_much(self, octets: int) -> Reply | None:
        """Count what is kept of the message; says so when that is more than it or the house may have."""
        limit = self._settings.max_message_bytes
        if limit and self._octets + octets > limit:
            return Reply.of(552, "5.3.4 Message is larger than this relay takes")
        if self._is_full(octets):
            return _FULL
        self._octets += octets
        self._front.seat.add_octets(octets)
        return None

    def _is_full(self, octets: int) -> bool:
        return self._front.seat.octets + octets > self._settings.max_bytes_in_flight

    async def _chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes, each chunk with a deadline of its own. Raises ClientGone."""
        finder = EndOfData()
        while not finder.found:
            self._wait(self._settings.idle_timeout)
            chunk = await self._reader.read(_BUFFER)
            self._waiting = False
            if not chunk:
                raise ClientGone
            body = finder.feed(chunk)
            if finder.rest:
                unread(self._reader, finder.rest)
            if body:
                yield body

    async def _stage(self, message: Message) -> bool:
        """Make the copies durable before the primary may accept. False: there are none, or nowhere to keep them."""
        if not message.envelope.destinations:
            return False
        begun = self.loop.time()
        faults.reach("before staging")
        try:
            await self._front.intake.stage(message)
        except NotDurable as error:
            maillog.not_durable(message.envelope, str(error))
            return False
        faults.reach("staged")
        metrics.stage_seconds.observe(self.loop.time() - begun)
        return True

    async def _finish(self, transaction: Transaction, message: Message, staged: bool) -> Reply:
        """Send the held dot, and do with the copy what the primary's answer says."""
        envelope, intake = message.envelope, self._front.intake
        digest = headers.equality_digest(envelope.sender, message.body) if staged else ""
        begun = self.loop.time()
        try:
            reply = await transaction.finish()
        except NoReply as trouble:
            if staged:
                intake.hold(envelope.id, digest)
            metrics.messages.labels("uncertain").inc()
            maillog.uncertain(envelope, self._front.settings.relay.uncertain_hold, str(trouble))
            return _NO_ANSWER
        seconds = self.loop.time() - begun
        faults.reach("primary answered")
        metrics.primary_seconds.observe(seconds)
        metrics.messages.labels(metrics.reply_class(reply.code)).inc()
        if reply.is_positive:
            if staged:
                addresses = tuple(r.address for r in envelope.recipients)
                await intake.release(Released(envelope.id, envelope.destinations, digest, addresses))
                faults.reach("released")
            elif envelope.destinations:
                metrics.copies_lost.inc()
                maillog.copy_lost(envelope)
            metrics.bytes_accepted.inc(envelope.size)
            maillog.accepted(envelope, reply, seconds, late=self.transport is None)
        else:
            if staged:
                intake.discard(envelope.id)
            maillog.refused(envelope, reply)
        return reply

    def _envelope(self, message_id: str, size: int) -> Envelope:
        copies = tuple(b.name for b in self._front.settings.backups if any(b.wants(r) for r in self._recipients))
        return Envelope(
            id=message_id,
            sender=self._sender,
            recipients=tuple(self._recipients),
            received_at=self._front.intake.now(),
            size=size,
            parameters=self._parameters,
            client_address=self._peer,
            client_helo=self._helo_name,
            destinations=copies,
        )

    def _trace(self, message_id: str) -> bytes:
        utf8 = value(self._parameters, "SMTPUTF8") is not None
        protocol = headers.protocol_keyword(extended=self._extended, tls=False, authenticated=False, utf8=utf8)
        return headers.received_line(
            helo=self._helo_name,
            address=self._peer,
            domain=self._settings.domain,
            protocol=protocol,
            message_id=message_id,
        )

    def _loop_guard(self, body: bytes) -> Reply | None:
        hops, own = headers.count_hops(body, self._settings.domain)
        if hops - 1 > self._settings.max_hops or own - 1 > _OWN_LINES_LIMIT:
            return Reply.of(554, "5.4.6 Too many hops, mail forwarding loop")
        return None


_COMMANDS: Mapping[bytes, Callable[[Session, str], Awaitable[Reply]]] = {
    b"HELO": Session._helo,  # noqa: SLF001 - the table belongs to the class
    b"EHLO": Session._ehlo,  # noqa: SLF001
    b"MAIL": Session._mail,  # noqa: SLF001
    b"RCPT": Session._rcpt,  # noqa: SLF001
    b"DATA": Session._data,  # noqa: SLF001
    b"RSET": Session._rset,  # noqa: SLF001
    b"NOOP": Session._noop,  # noqa: SLF001
    b"QUIT": Session._quit,  # noqa: SLF001
    b"VRFY": Session._vrfy,  # noqa: SLF001
    b"HELP": Session._help,  # noqa: SLF001
}


def _wire(verb: str, address: str, parameters: list[str]) -> bytes:
    return " ".join((f"{verb}:<{address}>", *parameters)).encode("utf-8", "surrogateescape")
