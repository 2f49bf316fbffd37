"""MAIL, RCPT, DATA and BDAT of one client: the whole flow of a message, from ``mail`` to ``_finish``.

    MAIL, RCPT: the client gets the primary's replies. DATA: the body streams to the primary as it arrives, without
    the end-of-data line; the copy is staged; the final dot, held until then, is sent. By the primary's reply the copy
    is released, discarded or held as uncertain, and the client gets that reply. BDAT is the same in chunks.

The CommandLoop calls these methods and writes the replies they return; the Peer knows who the client is; an
IncomingBody receives the body. A failure becomes a Reply, or a SyntaxProblem that holds one. A client that disconnects
within its message raises ClientGone; a disconnect never cancels a method.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from relay import faultpoints, maillog, metrics
from relay.client.server_limits import server_limits
from relay.ledger.changes import Released
from relay.mail import headers
from relay.mail.envelope import Envelope
from relay.mail.esmtp import MAIL_EXTENSIONS, RCPT_EXTENSIONS, command_line, value
from relay.mail.origin import Identity
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from relay.mail.reply import Reply
from relay.smtpd import mail_features
from relay.smtpd.body import FULL, LARGE, TOO_LARGE, IncomingBody
from relay.smtpd.choosing import MAIL_OK, Choosing, Promised
from relay.smtpd.context import Context
from relay.smtpd.end_of_data import ClientGone, EndOfData, EndOfLines, Pace
from relay.smtpd.error_limits import ErrorLimits
from relay.smtpd.fleet import Fleet
from relay.smtpd.peer import Peer
from relay.smtpd.primary import NoReply, PrimaryTransaction
from relay.smtpd.protocol import ClientProtocol
from relay.smtpd.replies import Replies
from relay.smtpd.staging import NotDurable
from relay.smtpd.syntax import (
    LINE_LIMIT,
    SyntaxProblem,
    argument_text,
    carried,
    check,
    declared_size,
    meaningful,
    nothing_after,
    parse_chunk,
    parse_path,
    split_command,
)
from relay.trace import emitter, events

_ENTRY = 200  # octets of memory that an address takes besides its text
INTERNAL = Reply.of(451, "4.3.0 Internal error, try again later")
_GO_AHEAD = Reply.of(354, "End data with <CR><LF>.<CR><LF>")
_HELLO_FIRST = Reply.of(503, "5.5.1 HELO or EHLO first")
_MAIL_FIRST = Reply.of(503, "5.5.1 MAIL first")
_NO_RECIPIENTS = Reply.of(554, "5.5.1 No valid recipients")
_IN_CHUNKS = Reply.of(503, "5.5.1 This message comes by BDAT")
_NO_ANSWER = Reply.of(451, "4.4.2 The primary server did not answer, try again later")
_NOT_DURABLE = Reply.of(451, "4.3.1 The copy cannot be stored at the moment, try again later")


class MailTransaction:
    """The mail transactions of one client, one at a time."""

    def __init__(self, context: Context, protocol: ClientProtocol, peer: Peer, error_limits: ErrorLimits) -> None:
        self._context = context
        self._settings = context.settings.smtp
        self._protocol = protocol
        self._peer = peer
        self._error_limits = error_limits
        self._transaction: PrimaryTransaction | None = None
        self._snapshot = context.snapshot  # of the roles, in a transaction and before its MAIL is answered
        self._has_snapshot = False
        self._choosing: Choosing | None = None  # in a transaction, where there are routes
        self._refuser = ""  # who has refused MAIL, where that is not the snapshot's primary
        self._sender = ""
        self._parameters: tuple[str, ...] = ()
        self._recipients: list[Recipient] = []
        self._identity: Identity = ()
        self._heard = Replies()
        self._body: IncomingBody | None = None
        self._message_id = ""
        self._counted = 0  # octets of the envelope, as added to the shared counters
        self.is_lost = False  # it is unknown where the next command begins, so the session must end
        self.in_data = False
        self.was_served = False  # a message came to its end
        self._may_be_told = (
            False  # a refusal of this transaction was logged: a flood of them fills neither log nor trace
        )
        self.is_concluding = False  # all of the message is here: from now on nothing but its end ends it
        self._was_refused = False  # MAIL or a later command: what a pipelining client sent behind it is no error

    @property
    def in_transaction(self) -> bool:
        return self._transaction is not None or self._awaits_recipient

    @property
    def _awaits_recipient(self) -> bool:
        """Whether MAIL has been answered by us, since the recipient decides who is the primary."""
        return self._choosing is not None and self._transaction is None

    @property
    def patience(self) -> float:
        """Seconds that the client may take for its next command."""
        settings = self._settings
        if self._transaction is None:
            return settings.idle_timeout
        if self._body is None:
            return settings.lease_idle_timeout
        return min(settings.lease_idle_timeout, self._body.pace.seconds)

    def forget(self) -> None:
        """End the transaction, if any, without a message; if its body has begun, by closing the primary connection."""
        transaction, self._transaction = self._transaction, None
        if self._body is not None:
            if not self._heard.is_told:
                self._tell(events.BROKEN_OFF, None)
        elif self._heard.has_untold_refusals and self._may_be_told:
            self._message_id = self._context.ids.next()
            self._tell(events.REFUSED, self._heard.refused[-1][1], refused_at="RCPT")
        self._heard, self._may_be_told = Replies(), False
        if transaction is not None:
            if self._body is None:
                transaction.end()
            else:
                transaction.abandon()
        if self._body is not None:
            self._body.close()
            self._body = None
        self._give_back()
        self._choosing = None
        self._recipients = []
        self._context.counters.add_octets(-self._counted)
        self._counted = 0
        self.in_data = self._was_refused = self.is_concluding = False
        self._peer.end_transaction()

    def _give_back(self) -> None:
        if self._has_snapshot:
            self._has_snapshot = False
            self._snapshot.give_back()

    def out_of_order(self, reply: Reply) -> Reply:
        """Count a bad sequence of commands, mildly if the client may have pipelined it; returns ``reply``."""
        if self._was_refused:
            self._error_limits.exceed()
        else:
            self._error_limits.bad += 1
        return reply

    # --- the envelope -----------------------------------------------------------------------------------------

    async def mail(self, argument: str) -> Reply:
        client = self._peer
        if not client.helo:
            return self.out_of_order(_HELLO_FIRST)
        if self._transaction is not None or self._choosing is not None:
            return self.out_of_order(Reply.of(503, "5.5.1 Nested MAIL command"))
        self._was_refused = True  # until the primary accepts it
        sender, given = parse_path(argument, "FROM")
        self._sender, self._recipients = sender, []
        check(given, MAIL_EXTENSIONS, client.offered)
        size = declared_size(given)
        if (refusal := client.objection()) is not None:
            return self._refused("MAIL", refusal, is_own=True)
        if self._settings.max_message_bytes and size > self._settings.max_message_bytes:
            return self._refused("MAIL", TOO_LARGE, is_own=True)
        if self._context.counters.octets + size > self._settings.max_bytes_in_flight:
            return self._refused("MAIL", FULL, is_own=True)

        self._identity = client.identity()
        self._snapshot, self._has_snapshot = self._context.snapshot.take(), True
        self._parameters, self._refuser = given, ""
        try:
            if (fleet := self._context.fleet) is None:
                self._transaction, reply = await self._snapshot.primary.begin(self._commands, self._identity)
            else:
                reply = await self._begin(fleet)
        finally:
            if self._transaction is None and self._choosing is None:
                self._give_back()
        self._was_refused = self._transaction is None and self._choosing is None
        if self._was_refused:
            self._refused("MAIL", reply)
        else:
            self._count(len(argument))
        self._heard.mail = reply
        return reply

    async def _begin(self, fleet: Fleet) -> Reply:
        """Begin a transaction; returns the primary's reply to MAIL, or ours where a recipient has to come first."""
        choosing = Choosing(fleet, self._snapshot, self._sender, self._peer.address, self._protocol.local)
        ahead = None if choosing.settled else self._recipient_ahead()
        if choosing.settled is None and ahead is None:
            self._choosing = choosing
            return MAIL_OK
        self._choosing = choosing
        try:
            self._transaction, reply = await choosing.begin(ahead, self._commands, self._identity)
        finally:
            if self._transaction is None:
                self._choosing, self._refuser = None, choosing.primary.destination.name
        return reply

    def _commands(self, available: Mapping[str, str]) -> list[bytes]:
        """Return MAIL for a server with these extensions, and what is certain to follow it."""
        mail = command_line("MAIL FROM", self._sender, carried(self._parameters, MAIL_EXTENSIONS, available))
        return [mail, *self._look_ahead(available)]

    async def _choose(self, choosing: Choosing, recipient: Recipient) -> Reply | None:
        """See that this recipient's primary has the transaction; returns the reply to RCPT where that cannot be."""
        if self._transaction is not None:
            return choosing.objection(recipient, counted=True)
        address, given = recipient

        def commands(available: Mapping[str, str]) -> list[bytes]:
            mail = command_line("MAIL FROM", self._sender, carried(self._parameters, MAIL_EXTENSIONS, available))
            if "PIPELINING" not in available:
                return [mail]
            first = command_line("RCPT TO", address, carried(given, RCPT_EXTENSIONS, available))
            return [mail, first, *self._look_ahead(available, behind=recipient)]

        self._transaction, reply = await choosing.begin(recipient, commands, self._identity)
        return reply if self._transaction is None else None

    async def rcpt(self, argument: str) -> Reply:
        if self._transaction is None and self._choosing is None:
            return self.out_of_order(_MAIL_FIRST)
        if self._body is not None:
            return self.out_of_order(_IN_CHUNKS)
        recipient = self._recipient(argument)
        address, given = recipient
        is_own = True
        if not self._is_for_us(recipient):
            reply = Reply.of(554, "5.7.1 Relaying to this domain is not allowed")
        elif len(self._recipients) >= self._most_recipients:
            reply = Reply.of(452, "4.5.3 Too many recipients")
        elif self._context.counters.octets + len(argument) > self._settings.max_bytes_in_flight:
            reply = FULL
        elif self._choosing is not None and (refusal := await self._choose(self._choosing, recipient)) is not None:
            reply = refusal
        else:
            is_own = False
            transaction = self._transaction
            assert transaction is not None  # noqa: S101 - begun above at the latest
            reply = await transaction.rcpt(
                command_line("RCPT TO", address, carried(given, RCPT_EXTENSIONS, transaction.extensions))
            )
            if reply.is_positive:
                self._recipients.append(recipient)
                self._heard.rcpt.append(reply)
                self._count(len(argument))
        metrics.increment(metrics.recipients, metrics.reply_class(reply.code))(1)
        if not reply.is_positive:
            self._error_limits.exceed()
            self._heard.refuse(address, reply, is_own=is_own)
            self._log_refused(f"RCPT <{address}>", reply)
        return reply

    def _count(self, octets: int) -> None:
        """Count the approximate memory of an address in the envelope."""
        self._counted += octets + _ENTRY
        self._context.counters.add_octets(octets + _ENTRY)

    def _refused(self, command: str, reply: Reply, *, is_own: bool = False) -> Reply:
        """Count and log a refused MAIL or DATA; returns ``reply``."""
        self._error_limits.idle()
        self._log_refused(command, reply)
        if self._may_be_told:
            self._message_id = self._context.ids.next()
            self._tell(events.OWN if is_own else events.REFUSED, reply, refused_at=command)
            self._heard, self._may_be_told = Replies(), False
        return reply

    def _log_refused(self, command: str, reply: Reply) -> None:
        if self._error_limits.may_be_logged():
            self._may_be_told = True
            maillog.command_refused(self._peer.address, command, reply)

    def _tell(self, outcome: str, reply: Reply | None, *, refused_at: str = "") -> None:
        """Tell the trace of the end of a message, or of a transaction that never had one."""
        if emitter.is_on():
            self._heard.tell(outcome, self._envelope(0), self._primary_name, reply, refused_at=refused_at)

    def log_the_rest(self) -> None:
        """Log how many refusals have no line of their own."""
        if count := self._error_limits.unlogged():
            maillog.commands_refused(self._peer.address, count)

    def _recipient(self, argument: str) -> Recipient:
        """Parse the argument of RCPT. Raises SyntaxProblem."""
        address, given = parse_path(argument, "TO")
        check(given, RCPT_EXTENSIONS, self._peer.offered)
        if not address:
            raise SyntaxProblem(501, "5.1.3 A recipient needs an address")
        return Recipient(address, meaningful(given))

    @property
    def _most_recipients(self) -> int:
        primary = self._snapshot.primary if self._choosing is None else self._choosing.primary
        return min(self._settings.max_recipients, primary.most_recipients)

    def _recipient_ahead(self) -> Recipient | None:
        """Return the first recipient that the client has pipelined behind its MAIL, if it is one of ours."""
        if self._protocol.read_buffer.is_empty:
            return None
        with suppress(SyntaxProblem):
            for line in self._protocol.read_buffer.lines_ahead():
                verb, argument = split_command(line)
                if verb != b"RCPT" or len(line) > LINE_LIMIT or not line.endswith(b"\r\n"):
                    return None
                recipient = self._recipient(argument_text(argument))
                return recipient if self._is_for_us(recipient) else None
        return None

    def _look_ahead(self, available: Mapping[str, str], behind: Recipient | None = None) -> list[bytes]:
        """Return the commands that the client has pipelined behind its MAIL, to be sent ahead to a PIPELINING primary.

        Each is still processed in its turn, and by then the primary's reply is on its way: three round trips become
        one. Only commands that are certain to be passed on go ahead; at the first other one this stops.
        """
        if self._protocol.read_buffer.is_empty or "PIPELINING" not in available:
            return []
        commands: list[bytes] = []
        limits, domains = server_limits(available), {behind.domain} if behind else set()
        most = min(self._most_recipients, limits.recipients) - len(domains)
        with suppress(SyntaxProblem):  # replied to in its turn
            for line in self._protocol.read_buffer.lines_ahead():
                verb, argument = split_command(line)
                if len(line) > LINE_LIMIT or not line.endswith(b"\r\n"):
                    break
                if verb == b"DATA" and not argument and (commands or behind):
                    commands.append(b"DATA")
                    break
                if verb != b"RCPT" or len(commands) >= most:
                    break
                recipient = self._recipient(argument_text(argument))
                domains.add(recipient.domain)
                if not self._is_for_us(recipient) or len(domains) > limits.domains:
                    break
                if self._choosing is not None and self._choosing.objection(recipient) is not None:
                    break
                address, given = recipient
                commands.append(command_line("RCPT TO", address, carried(given, RCPT_EXTENSIONS, available)))
        return commands

    def _is_for_us(self, recipient: Recipient) -> bool:
        """Return whether mail for this recipient is relayed; Postmaster needs no domain (RFC 5321 4.5.1).

        Not with a route in the local part: a primary that trusts the relay would forward it, as an open relay.
        """
        allowed = self._settings.allowed_domains
        if not allowed or recipient.address.lower() == "postmaster":
            return True
        local = recipient.address.rpartition("@")[0]
        return recipient.domain in allowed and not any(mark in local for mark in "@%!")

    # --- a message --------------------------------------------------------------------------------------------

    async def data(self, argument: str) -> Reply:
        nothing_after("DATA", argument)
        if self._body is not None:
            return self.out_of_order(_IN_CHUNKS)
        opened = await self._open(stuffed=True)
        if isinstance(opened, Reply):
            return opened
        try:
            await self._protocol.push(_GO_AHEAD)
            finder = EndOfLines() if self._peer.may_end_lines_with_lf else EndOfData()
            while not finder.found:
                await opened.take(finder.feed(await self._octets(opened.pace)))
            if finder.rest:
                self._protocol.read_buffer.unread(finder.rest)
            return self._noted(await self._conclude(opened))
        finally:
            self.forget()

    async def bdat(self, argument: str) -> Reply:
        """Take one chunk (RFC 3030 2). Its octets are read even if it is refused: they must not pass for commands."""
        try:
            size, is_last = parse_chunk(argument)
        except SyntaxProblem:
            self.is_lost = True
            raise
        opened: IncomingBody | Reply
        if "CHUNKING" not in self._peer.offered:
            opened = self.out_of_order(Reply.of(503, "5.5.1 CHUNKING was not offered"))
        elif self._body is not None:
            opened = self._body
            opened.pace.count(0, self._protocol.waited)  # the time between two chunks counts too
        else:
            opened = await self._open(stuffed=False)
        smtp = self._settings
        pace = opened.pace if isinstance(opened, IncomingBody) else Pace(smtp.idle_timeout, smtp.min_data_rate)
        left = size
        while left:
            piece = await self._octets(pace, left)
            left -= len(piece)
            if isinstance(opened, IncomingBody):
                await opened.take(piece)
        if isinstance(opened, Reply):
            return opened
        if not is_last and opened.refusal is None:
            if not size:
                self._error_limits.idle()
            return Reply.of(250, f"2.0.0 {size} octets received")
        try:
            return self._noted(await self._conclude(opened))
        finally:
            self.forget()
            self._was_refused = not is_last  # more chunks may be on their way

    async def _open(self, *, stuffed: bool) -> IncomingBody | Reply:
        """Send DATA to the primary; returns the body to be received, or the reply that refuses it."""
        transaction = self._transaction
        if transaction is None:
            if self._awaits_recipient:
                self._error_limits.idle()
                return _NO_RECIPIENTS
            return self.out_of_order(_MAIL_FIRST)
        full = self._context.counters.octets > self._settings.max_bytes_in_flight
        if full or not self._recipients:
            await transaction.withdraw()
            self._error_limits.idle()
            return FULL if self._recipients else _NO_RECIPIENTS
        reply = await transaction.data()
        if reply.code != 354:
            self._refused("DATA", reply)
            self.forget()
            self._was_refused = True
            return reply
        self.in_data = True
        self._message_id = self._context.ids.next()
        self._body = IncomingBody(
            self._settings,
            self._context.counters,
            transaction,
            self._trace(),
            stuffed=stuffed,
            crlf_only=self._peer.crlf_only,
        )
        return self._body

    async def _octets(self, pace: Pace, most: int = -1) -> bytes:
        """Return the next octets of the body, at most ``most``. Raises ClientGone."""
        piece = await self._protocol.read_chunk(pace.seconds, most)
        if not piece:
            raise ClientGone
        pace.count(len(piece), self._protocol.waited)
        return piece

    async def _conclude(self, incoming: IncomingBody) -> Reply:
        """End a message: make the copies durable, then send the primary the dot; returns the reply for the client."""
        self.was_served = self.is_concluding = True
        body = await incoming.complete()
        named = headers.name_of(body)
        message = Message(self._envelope(len(body), named.text), body)
        transaction, relay = self._transaction, self._context.settings.relay
        if incoming.refusal is not None or transaction is None:
            refusal = incoming.refusal or INTERNAL
            metrics.messages.labels("own").inc()
            maillog.refused(message.envelope, refusal)
            outcome = events.REFUSED if incoming.is_by_primary else events.OWN
            self._heard.tell(outcome, message.envelope, self._primary_name, refusal)
            return refusal
        envelope, staged = message.envelope, await self._stage(message)
        if staged is None or (not staged and relay.require_durable_copies and envelope.destinations):
            self._heard.tell(events.OWN, envelope, self._primary_name, _NOT_DURABLE)
            return _NOT_DURABLE
        digest = await self._digest(envelope.sender, body, named) if staged else ""
        del body, message  # frees memory: the primary may take ten minutes to answer
        return await self._finish(transaction, envelope, digest, staged=staged)

    def _noted(self, reply: Reply) -> Reply:
        """Count the end of a message that was not accepted: a client could send such for ever; returns ``reply``.

        That nothing can be stored is no fault of the client's.
        """
        if not reply.is_positive and reply is not _NOT_DURABLE:
            self._error_limits.idle()
        return reply

    async def _stage(self, message: Message) -> bool | None:
        """Make the copies durable before the primary may accept; returns whether they are.

        False: there are no copies, or neither Redis nor the spool can be written. None: this process lacks descriptors,
        memory or threads, so the client gets a temporary refusal.
        """
        if not message.envelope.destinations:
            return False
        begun = self._protocol.loop.time()
        faultpoints.reach("before staging")
        try:
            self._heard.stage = await self._context.staging.stage(message)
        except NotDurable as error:
            maillog.not_durable(message.envelope, str(error))
            return None if error.is_own else False
        faultpoints.reach("staged")
        self._heard.stage_seconds = seconds = self._protocol.loop.time() - begun
        metrics.stage_seconds.observe(seconds)
        return True

    @staticmethod
    async def _digest(sender: str, body: bytes, named: headers.Named) -> str:
        if len(body) <= LARGE:
            return headers.equality_digest(sender, body, named)
        return await asyncio.to_thread(headers.equality_digest, sender, body, named)

    async def _finish(self, transaction: PrimaryTransaction, envelope: Envelope, digest: str, *, staged: bool) -> Reply:
        """Send the held dot; release, discard or hold the copy by the primary's reply, and return that reply."""
        staging = self._context.staging
        begun = self._protocol.loop.time()
        try:
            reply = await transaction.finish()
        except NoReply as trouble:
            if staged:
                staging.hold(envelope.id, digest)
            metrics.messages.labels("uncertain").inc()
            maillog.uncertain(envelope, self._context.settings.relay.uncertain_hold, str(trouble))
            seconds, why = self._protocol.loop.time() - begun, Reply.of(451, str(trouble))
            self._heard.tell(events.UNCERTAIN, envelope, self._primary_name, why, seconds=seconds)
            return _NO_ANSWER
        seconds = self._protocol.loop.time() - begun
        faultpoints.reach("primary answered")
        metrics.primary_seconds.observe(seconds)
        metrics.increment(metrics.messages, metrics.reply_class(reply.code))(1)
        if reply.is_positive:
            if staged:
                addresses = tuple(r.address for r in envelope.recipients)
                await staging.release(Released(envelope.id, envelope.destinations, digest, addresses))
                faultpoints.reach("released")
            elif envelope.destinations:
                metrics.copies_lost.inc()
                maillog.copy_lost(envelope)
            self._error_limits.bring_a_message()
            self.log_the_rest()
            metrics.increment(metrics.bytes_accepted)(envelope.size)
            mail_features.note(envelope)
            is_late = self._protocol.is_gone
            to = [r.address for r in envelope.recipients] if self._context.settings.log.addresses else ()
            primary = self._choosing.accepted(envelope.route) if self._choosing is not None else ""
            maillog.accepted(envelope, reply, seconds, late=is_late, to=to, primary=primary)
            outcome = events.ACCEPTED
        else:
            if staged:
                staging.discard(envelope.id)
            maillog.refused(envelope, reply)
            is_late, outcome = False, events.REFUSED
        self._heard.tell(outcome, envelope, self._primary_name, reply, seconds=seconds, is_late=is_late)
        return reply

    @property
    def _primary_name(self) -> str:
        if self._choosing is None:
            return self._refuser or self._snapshot.primary.destination.name
        return self._choosing.primary.destination.name

    def _envelope(self, size: int, message_id: str = "") -> Envelope:
        copies, promised, route = self._copies()
        return Envelope(
            id=self._message_id,
            sender=self._sender,
            recipients=tuple(self._recipients),
            received_at=self._context.staging.now(),
            size=size,
            parameters=self._parameters,
            client_address=self._peer.address,
            client_helo=self._peer.helo,
            destinations=copies,
            identity=self._identity if self._peer.is_spoken_for else (),
            promised=promised,
            message_id=message_id,
            route=route,
        )

    def _copies(self) -> tuple[tuple[str, ...], Promised, str]:
        """Decide for good who gets a copy: their names, (name, recipient indices) if not all, and the routes."""
        if self._choosing is not None:
            return self._choosing.copies(self._recipients)
        names, promised = [], []
        for backup in self._snapshot.backups:
            wanted = tuple(i for i, r in enumerate(self._recipients) if backup.wants(r)) if backup.domains else None
            if wanted is None or wanted:
                names.append(backup.name)
            if wanted and len(wanted) < len(self._recipients):
                promised.append((backup.name, wanted))
        return tuple(names), tuple(promised), ""

    def _trace(self) -> bytes:
        client = self._peer
        protocol = headers.protocol_keyword(
            extended=client.extended,
            tls=self._protocol.tls,
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
