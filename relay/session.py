"""One client's conversation: the whole flow of a message reads here, from ``_mail`` to ``_finish``.

    MAIL, RCPT -> the primary's replies are the client's; DATA -> the body streams on to the primary while it
    comes, all but the end-of-data line; the copy is staged; the held dot goes out; by the primary's reply the
    copy is released, discarded, or held as uncertain; the client hears that reply. BDAT is the same in chunks.

The wire is a Channel's, who the client is an Introduction's, what comes as a message a Reception's. Trouble becomes
a Reply; what is not foreseen becomes 451. A client that hangs up never cancels us: it shows as the end of input.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from relay import faults, headers, introduction, maillog, metrics
from relay.channel import BUFFER, Channel
from relay.credentials import Credentials
from relay.data import ClientGone, EndOfData, Pace
from relay.envelope import Envelope, IdSource, Message, Recipient, Reply
from relay.identity import Identity
from relay.intake import Intake, NotDurable
from relay.introduction import Introduction
from relay.ledger import Released
from relay.occupancy import Seat
from relay.parameters import (
    MAIL_EXTENSIONS,
    RCPT_EXTENSIONS,
    SyntaxProblem,
    carried,
    check,
    declared_size,
    parse_chunk,
    parse_path,
    value,
)
from relay.primary import NoReply, Primary, Transaction
from relay.reception import FULL, TOO_LARGE, Reception
from relay.settings import Settings

_LINE_LIMIT = 4096  # octets of a command line; RFC 5321 4.5.3.1.4 with room for ORCPT and ENVID
_BAD_LIMIT = 20  # commands that make no sense, then goodbye
_IDLE_LIMIT = 100  # commands that bring no message; from then on each is one that makes no sense
_EXCESS_LIMIT = 1000  # recipients over the limit that are merely told so; a client may send all it has at once
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")

_OK = Reply.of(250, "2.0.0 Ok")
_GO_AHEAD = Reply.of(354, "End data with <CR><LF>.<CR><LF>")
_HELLO_FIRST = Reply.of(503, "5.5.1 HELO or EHLO first")
_MAIL_FIRST = Reply.of(503, "5.5.1 MAIL first")
_NESTED = Reply.of(503, "5.5.1 Not within a mail transaction")
_NO_RECIPIENTS = Reply.of(554, "5.5.1 No valid recipients")
_IN_CHUNKS = Reply.of(503, "5.5.1 This message comes by BDAT")
_INTERNAL = Reply.of(451, "4.3.0 Internal error, try again later")
_TOO_MANY_ERRORS = Reply.of(421, "4.7.0 Too many errors, goodbye")
_SHUTDOWN = Reply.of(421, "4.3.2 Service shutting down, try again later")
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
    credentials: Credentials = field(default_factory=Credentials)
    sessions: set[Session] = field(default_factory=set)
    stopping: bool = False

    def connection(self, *, tls: bool = False) -> Channel:
        """Make the protocol of a client's connection; with ``tls`` it begins with the handshake."""
        smtp = self.settings.smtp
        seconds = min(smtp.idle_timeout, smtp.lease_idle_timeout)
        return Channel(lambda channel: Session(self, channel).converse(implicit_tls=tls), write_seconds=seconds)


class Session:
    """The conversation with one client."""

    def __init__(self, front: Front, channel: Channel) -> None:
        self._front = front
        self._settings = front.settings.smtp
        self._channel = channel
        self._client = Introduction(front, channel)
        self._in_data = False
        self._crlf_only = self._settings.bare_newline == "refuse"
        self._over = False  # after the next reply
        self._bad = 0
        self._excess = 0  # recipients over the limit
        self._idle = 0  # commands since the last message
        self._refused = False  # the last MAIL, or what followed: a pipelining client goes on all the same
        self._transaction: Transaction | None = None
        self._sender = ""
        self._parameters: tuple[str, ...] = ()
        self._recipients: list[Recipient] = []
        self._identity: Identity = ()
        self._reception: Reception | None = None
        self._message_id = ""

    # --- the loop ---------------------------------------------------------------------------------------------

    async def converse(self, *, implicit_tls: bool) -> None:
        """Be there for this client until it leaves."""
        front, channel = self._front, self._channel
        front.sessions.add(self)
        front.seat.add_client(1)
        try:
            greeting = await self._client.arrive(implicit_tls=implicit_tls)
            if greeting is None:
                return
            await channel.push(greeting)
            while (line := await channel.read_line(self._patience, introduction.AUTH_LINE)) is not None:
                reply = await self._answer(line)
                if reply is not None:
                    await channel.push(reply)
                    if self._over or reply.code == 421:
                        break
                if front.stopping and self._transaction is None:
                    await channel.push(_SHUTDOWN)
                    break
        except ClientGone:
            pass
        finally:
            self._forget()
            self._client.leave()
            front.sessions.discard(self)
            front.seat.add_client(-1)

    def stop(self, *, impatient: bool) -> None:
        """End an idle conversation now; one in a transaction after it, or, impatient, before its DATA."""
        if self._channel.waiting and (self._transaction is None or (impatient and not self._in_data)):
            self._channel.dismiss(_SHUTDOWN)

    @property
    def _patience(self) -> float:
        """How long the client may take for its next command."""
        settings = self._settings
        if self._transaction is None:
            return settings.idle_timeout
        if self._reception is None:
            return settings.lease_idle_timeout
        return min(settings.lease_idle_timeout, self._reception.pace.seconds)

    async def _answer(self, line: bytes) -> Reply | None:
        """Return the reply to one command, None when it has been given: where the unforeseen becomes a reply."""
        try:
            command, argument = self._read(line)
            reply = await command(self, argument)
        except SyntaxProblem as problem:
            self._bad += 1
            reply = problem.reply
        except ClientGone:
            raise
        except Exception as error:
            maillog.session_error(self._client.address, error)
            metrics.session_errors.inc()
            self._forget()
            return _INTERNAL
        return reply if self._bad < _BAD_LIMIT else _TOO_MANY_ERRORS

    def _read(self, line: bytes) -> tuple[_Command, str]:
        """Return the command of a line, and its argument. Raises SyntaxProblem."""
        verb, _, argument = line.rstrip(b"\r\n").partition(b" ")
        verb = verb.upper()
        command = _COMMANDS.get(verb)
        if not line or (len(line) > _LINE_LIMIT and verb != b"AUTH"):
            raise SyntaxProblem(500, "5.5.2 Line too long")
        if command is None:
            raise _unknown(verb)
        text = argument.decode("utf-8", "surrogateescape")
        if not text.isprintable() and _CONTROL.search(argument):
            raise SyntaxProblem(501, "5.5.2 Control character in a command")
        if self._crlf_only and not line.endswith(b"\r\n"):
            raise SyntaxProblem(500, "5.5.2 A command must end with CRLF")
        if verb in _IDLE:
            self._idle += 1
            self._bad += self._idle > _IDLE_LIMIT
        return command, text.strip(" ")

    def _out_of_order(self, reply: Reply) -> Reply:
        """Count a command in the wrong place, but not what a pipelining client could not know better."""
        self._bad += not self._refused
        return reply

    def _forget(self) -> None:
        """End the transaction, if any, without a message; one whose body has begun by a close."""
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            if self._reception is None:
                transaction.end()
            else:
                transaction.abandon()
        if self._reception is not None:
            self._reception.close()
            self._reception = None
        self._recipients = []
        self._in_data = self._refused = False
        self._client.end_transaction()

    # --- commands ---------------------------------------------------------------------------------------------

    async def _hello(self, name: str, *, extended: bool) -> Reply:
        reply = await self._client.hello(name, extended=extended)
        self._forget()
        return reply

    async def _introduce(
        self, argument: str, command: Callable[[Introduction, str], Awaitable[Reply | None]]
    ) -> Reply | None:
        """Take what may only come between messages: STARTTLS, AUTH, XFORWARD, XCLIENT."""
        if self._transaction is not None:
            return self._out_of_order(_NESTED)
        return await command(self._client, argument)

    async def _noop(self, _: str) -> Reply:
        return _OK

    async def _rset(self, argument: str) -> Reply:
        _nothing_after("RSET", argument)
        self._forget()
        return _OK

    async def _quit(self, argument: str) -> Reply:
        _nothing_after("QUIT", argument)
        self._over = True
        return Reply.of(221, "2.0.0 Bye")

    async def _vrfy(self, argument: str) -> Reply:
        if not argument:
            raise SyntaxProblem(501, "5.5.4 Syntax: VRFY address")
        return Reply.of(252, "2.1.5 Cannot verify, but will pass the message on")

    async def _help(self, _: str) -> Reply:
        return Reply.of(214, "2.0.0 " + " ".join(verb.decode() for verb in _COMMANDS))

    async def _mail(self, argument: str) -> Reply:
        client = self._client
        if not client.helo:
            return self._out_of_order(_HELLO_FIRST)
        if self._transaction is not None:
            return self._out_of_order(Reply.of(503, "5.5.1 Nested MAIL command"))
        self._refused = True  # until it is not
        sender, given = parse_path(argument, "FROM")
        check(given, MAIL_EXTENSIONS, client.offered)
        size = declared_size(given)
        if (refusal := client.objection()) is not None:
            maillog.command_refused(client.address, "MAIL", refusal)
            return refusal
        if self._settings.max_message_bytes and size > self._settings.max_message_bytes:
            return TOO_LARGE
        if self._front.seat.octets + size > self._settings.max_bytes_in_flight:
            return FULL

        def command(available: Mapping[str, str]) -> bytes:
            return _wire("MAIL FROM", sender, carried(given, MAIL_EXTENSIONS, available))

        self._identity = client.identity()
        self._transaction, reply = await self._front.primary.begin(command, self._identity)
        self._refused = self._transaction is None
        if self._refused:
            maillog.command_refused(client.address, "MAIL", reply)
        self._sender, self._parameters, self._recipients = sender, given, []
        return reply

    async def _rcpt(self, argument: str) -> Reply:
        transaction = self._transaction
        if transaction is None:
            return self._out_of_order(_MAIL_FIRST)
        if self._reception is not None:
            return self._out_of_order(_IN_CHUNKS)
        address, given = parse_path(argument, "TO")
        check(given, RCPT_EXTENSIONS, self._client.offered)
        recipient = Recipient(address, given)
        if not address:
            raise SyntaxProblem(501, "5.1.3 A recipient needs an address")
        if not self._is_for_us(recipient):
            reply = Reply.of(554, "5.7.1 Relaying to this domain is not allowed")
        elif len(self._recipients) >= min(self._settings.max_recipients, self._front.primary.most_recipients):
            reply = Reply.of(452, "4.5.3 Too many recipients")
            self._excess += 1
            self._bad += self._excess > _EXCESS_LIMIT
        else:
            reply = await transaction.rcpt(
                _wire("RCPT TO", address, carried(given, RCPT_EXTENSIONS, transaction.extensions))
            )
            if reply.is_positive:
                self._recipients.append(recipient)
        metrics.recipients.labels(metrics.reply_class(reply.code)).inc()
        if not reply.is_positive:
            maillog.command_refused(self._client.address, f"RCPT <{address}>", reply)
        return reply

    def _is_for_us(self, recipient: Recipient) -> bool:
        """Whether mail for this recipient is relayed; Postmaster needs no domain (RFC 5321 4.5.1).

        A local part that holds a route would be sent on by a primary that trusts us: then we were an open relay.
        """
        allowed = self._settings.allowed_domains
        if not allowed or recipient.address.lower() == "postmaster":
            return True
        local = recipient.address.rpartition("@")[0]
        return recipient.domain in allowed and not any(mark in local for mark in "@%!")

    # --- a message --------------------------------------------------------------------------------------------

    async def _data(self, argument: str) -> Reply:
        _nothing_after("DATA", argument)
        if self._reception is not None:
            return self._out_of_order(_IN_CHUNKS)
        opened = await self._open(stuffed=True)
        if isinstance(opened, Reply):
            return opened
        try:
            await self._channel.push(_GO_AHEAD)
            finder = EndOfData()
            while not finder.found:
                await opened.take(finder.feed(await self._octets(opened.pace)))
            if finder.rest:
                self._channel.unread(finder.rest)
            return await self._conclude(opened)
        finally:
            self._forget()

    async def _bdat(self, argument: str) -> Reply:
        """Take one chunk (RFC 3030 2). Its octets are read whatever the answer is, or they would pass for commands."""
        try:
            size, is_last = parse_chunk(argument)
        except SyntaxProblem:
            self._over = True  # nobody knows where the next command begins
            raise
        opened: Reception | Reply
        if "CHUNKING" not in self._client.offered:
            opened = self._out_of_order(Reply.of(503, "5.5.1 CHUNKING was not offered"))
        elif self._reception is not None:
            opened = self._reception
            opened.pace.count(0, self._channel.waited)  # between two chunks the clock runs on
        else:
            opened = await self._open(stuffed=False)
        smtp = self._settings
        pace = opened.pace if isinstance(opened, Reception) else Pace(smtp.idle_timeout, smtp.min_data_rate)
        left = size
        while left:
            piece = await self._octets(pace, left)
            left -= len(piece)
            if isinstance(opened, Reception):
                await opened.take(piece)
        if isinstance(opened, Reply):
            return opened
        if not is_last and opened.refusal is None:
            return Reply.of(250, f"2.0.0 {size} octets received")
        try:
            return await self._conclude(opened)
        finally:
            self._forget()
            self._refused = not is_last  # the other chunks may be on their way

    async def _open(self, *, stuffed: bool) -> Reception | Reply:
        """Ask the primary for the body; returns who receives it, or the reply that there will be none."""
        transaction = self._transaction
        if transaction is None:
            return self._out_of_order(_MAIL_FIRST)
        if not self._recipients:
            return _NO_RECIPIENTS
        if self._front.seat.octets > self._settings.max_bytes_in_flight:
            return FULL
        reply = await transaction.data()
        if reply.code != 354:
            self._forget()
            self._refused = True
            maillog.command_refused(self._client.address, "DATA", reply)
            return reply
        self._in_data = True
        self._message_id = self._front.ids.next()
        self._reception = Reception(self._settings, self._front.seat, transaction, self._trace(), stuffed=stuffed)
        return self._reception

    async def _octets(self, pace: Pace, most: int = BUFFER) -> bytes:
        """Return what has come of a body. Raises ClientGone."""
        piece = await self._channel.read_chunk(pace.seconds, min(most, BUFFER))
        if not piece:
            raise ClientGone
        pace.count(len(piece), self._channel.waited)
        return piece

    async def _conclude(self, reception: Reception) -> Reply:
        """The end of a message: make the copies durable, then give the primary its dot and the client its answer."""
        self._idle = 0
        body = await reception.complete()
        message = Message(self._envelope(len(body)), body)
        transaction, relay = self._transaction, self._front.settings.relay
        if reception.refusal is not None or transaction is None:
            refusal = reception.refusal or _INTERNAL
            metrics.messages.labels("own").inc()
            maillog.refused(message.envelope, refusal)
            return refusal
        staged = await self._stage(message)
        if not staged and relay.require_durable_copies and message.envelope.destinations:
            return _NOT_DURABLE
        return await self._finish(transaction, message, staged)

    async def _stage(self, message: Message) -> bool:
        """Make the copies durable before the primary may accept. False: there are none, or nowhere to keep them."""
        if not message.envelope.destinations:
            return False
        begun = self._channel.loop.time()
        faults.reach("before staging")
        try:
            await self._front.intake.stage(message)
        except NotDurable as error:
            maillog.not_durable(message.envelope, str(error))
            return False
        faults.reach("staged")
        metrics.stage_seconds.observe(self._channel.loop.time() - begun)
        return True

    async def _finish(self, transaction: Transaction, message: Message, staged: bool) -> Reply:
        """Send the held dot, and do with the copy what the primary's answer says."""
        envelope, intake = message.envelope, self._front.intake
        digest = headers.equality_digest(envelope.sender, message.body) if staged else ""
        begun = self._channel.loop.time()
        try:
            reply = await transaction.finish()
        except NoReply as trouble:
            if staged:
                intake.hold(envelope.id, digest)
            metrics.messages.labels("uncertain").inc()
            maillog.uncertain(envelope, self._front.settings.relay.uncertain_hold, str(trouble))
            return _NO_ANSWER
        seconds = self._channel.loop.time() - begun
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
            maillog.accepted(envelope, reply, seconds, late=self._channel.is_gone)
        else:
            if staged:
                intake.discard(envelope.id)
            maillog.refused(envelope, reply)
        return reply

    def _envelope(self, size: int) -> Envelope:
        copies = tuple(b.name for b in self._front.settings.backups if any(b.wants(r) for r in self._recipients))
        return Envelope(
            id=self._message_id,
            sender=self._sender,
            recipients=tuple(self._recipients),
            received_at=self._front.intake.now(),
            size=size,
            parameters=self._parameters,
            client_address=self._client.address,
            client_helo=self._client.helo,
            destinations=copies,
            identity=self._identity if self._client.is_spoken_for else (),
        )

    def _trace(self) -> bytes:
        client = self._client
        protocol = headers.protocol_keyword(
            extended=client.extended,
            tls=self._channel.tls,
            authenticated=bool(client.user),
            utf8=value(self._parameters, "SMTPUTF8") is not None,
        )
        return headers.received_line(
            helo=client.helo,
            address=client.address,
            domain=self._settings.domain,
            protocol=protocol,
            message_id=self._message_id,
        )


_Command = Callable[[Session, str], Awaitable[Reply | None]]


def _between(command: Callable[[Introduction, str], Awaitable[Reply | None]]) -> _Command:
    return lambda session, argument: session._introduce(argument, command)


# ruff: noqa: SLF001 - the table belongs to the class
_COMMANDS: Mapping[bytes, _Command] = {
    b"HELO": lambda session, name: session._hello(name, extended=False),
    b"EHLO": lambda session, name: session._hello(name, extended=True),
    b"STARTTLS": _between(Introduction.starttls),
    b"AUTH": _between(Introduction.auth),
    b"XFORWARD": _between(Introduction.xforward),
    b"XCLIENT": _between(Introduction.xclient),
    b"MAIL": Session._mail,
    b"RCPT": Session._rcpt,
    b"DATA": Session._data,
    b"BDAT": Session._bdat,
    b"RSET": Session._rset,
    b"NOOP": Session._noop,
    b"QUIT": Session._quit,
    b"VRFY": Session._vrfy,
    b"HELP": Session._help,
}
_IDLE = (b"HELO", b"EHLO", b"RSET", b"NOOP", b"VRFY", b"HELP", b"XFORWARD", b"XCLIENT")
_UNIMPLEMENTED = (b"EXPN", b"SEND", b"SOML", b"SAML", b"TURN", b"ETRN")
_OTHER_PROTOCOLS = (b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT")  # a browser made to talk to us


def _unknown(verb: bytes) -> SyntaxProblem:
    if verb in _OTHER_PROTOCOLS:
        return SyntaxProblem(421, "4.7.0 This is SMTP, goodbye")
    if verb in _UNIMPLEMENTED:
        return SyntaxProblem(502, "5.5.1 Command not implemented")
    return SyntaxProblem(500, "5.5.2 Command not recognized")


def _nothing_after(verb: str, argument: str) -> None:
    if argument:
        raise SyntaxProblem(501, f"5.5.4 Syntax: {verb}")


def _wire(verb: str, address: str, parameters: list[str]) -> bytes:
    return " ".join((f"{verb}:<{address}>", *parameters)).encode("utf-8", "surrogateescape")
