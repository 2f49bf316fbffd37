"""MAIL, RCPT, DATA and BDAT of one client: the replies to each, and the flow of a message up to its final dot.

    MAIL, RCPT: the client gets the primary's replies. DATA: the body streams to the primary as it arrives, without
    the end-of-data line; FinalDot does the rest. BDAT is the same in chunks.

The CommandLoop calls these methods and writes the replies they return; the Peer knows who the client is; the
OpenEnvelope with its PrimaryChoice knows who is to have the message; an IncomingBody receives the body. A failure
becomes a Reply, or a SyntaxProblem that holds one. A client that disconnects within its message raises ClientGone; a
disconnect never cancels a method.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from functools import partial

from relay import metrics
from relay.mail import headers
from relay.mail.esmtp import MAIL_EXTENSIONS, value
from relay.mail.recipient import Recipient
from relay.mail.reply import Reply
from relay.smtpd.body import FULL, TOO_LARGE, IncomingBody
from relay.smtpd.context import Context
from relay.smtpd.end_of_data import ClientGone, EndOfData, EndOfLines, Pace
from relay.smtpd.error_limits import ErrorLimits
from relay.smtpd.final_dot import FinalDot
from relay.smtpd.forked_dot import ForkedDot
from relay.smtpd.forked_transaction import ForkedTransaction, OpenTransaction, turn
from relay.smtpd.look_ahead import LookAhead
from relay.smtpd.open_envelope import OpenEnvelope
from relay.smtpd.peer import Peer
from relay.smtpd.primary_choice import ELSEWHERE, OnePrimary, PrimaryByRoute, PrimaryChoice
from relay.smtpd.primary_transaction import PrimaryTransaction
from relay.smtpd.protocol import ClientProtocol
from relay.smtpd.recipients import NOT_RELAYED, is_relayed, parse_recipient, rcpt_command
from relay.smtpd.syntax import SyntaxProblem, check, declared_size, nothing_after, parse_chunk, parse_path
from relay.smtpd.transaction_report import TransactionReport

INTERNAL = Reply.of(451, "4.3.0 Internal error, try again later")
_GO_AHEAD = Reply.of(354, "End data with <CR><LF>.<CR><LF>")
_HELLO_FIRST = Reply.of(503, "5.5.1 HELO or EHLO first")
_MAIL_FIRST = Reply.of(503, "5.5.1 MAIL first")
_MAIL_OK = Reply.of(250, "2.1.0 Ok")
_NO_RECIPIENTS = Reply.of(554, "5.5.1 No valid recipients")
_IN_CHUNKS = Reply.of(503, "5.5.1 This message comes by BDAT")


class MailTransaction:
    """The mail transactions of one client, one at a time."""

    def __init__(self, context: Context, protocol: ClientProtocol, peer: Peer, error_limits: ErrorLimits) -> None:
        self._context = context
        self._settings = context.settings.smtp
        self._protocol = protocol
        self._peer = peer
        self._error_limits = error_limits
        self._look_ahead = LookAhead(protocol.read_buffer, peer, self._settings)
        self.report = TransactionReport(context, peer, error_limits)
        self._final_dot = FinalDot(context, protocol, error_limits, self.report)
        self._envelope: OpenEnvelope | None = None  # since MAIL was accepted
        self._transaction: OpenTransaction | None = None  # None within an envelope: the recipient decides whose
        self._body: IncomingBody | None = None
        self.is_lost = False  # it is unknown where the next command begins, so the session must end
        self.in_data = False
        self.was_served = False  # a message came to its end
        self.is_concluding = False  # all of the message is here: from now on nothing but its end ends it
        self._was_refused = False  # MAIL or a later command: what a pipelining client sent behind it is no error

    @property
    def in_transaction(self) -> bool:
        return self._envelope is not None

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
        envelope, self._envelope = self._envelope, None
        transaction, self._transaction = self._transaction, None
        body, self._body = self._body, None
        if envelope is not None:
            self.report.end(envelope, in_body=body is not None)
        if transaction is not None:
            if body is None:
                transaction.end()
            else:
                transaction.abandon()
        if body is not None:
            body.close()
        if envelope is not None:
            envelope.close()
        self.in_data = self._was_refused = self.is_concluding = False
        self._peer.end_transaction()

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
        if self._envelope is not None:
            return self.out_of_order(Reply.of(503, "5.5.1 Nested MAIL command"))
        self._was_refused = True  # until the primary accepts it
        sender, given = parse_path(argument, "FROM")
        size = 0
        if given:
            check(given, MAIL_EXTENSIONS, client.offered)
            size = declared_size(given)
        envelope = OpenEnvelope(sender, given, client, self._choice(sender), self._context.counters)
        try:
            choice, first = envelope.choice, None
            reply = refusal = client.objection() or self._objection(size)
            if reply is None and choice.awaits_recipient:
                first = self._look_ahead.recipient()
                reply = _MAIL_OK if first is None else None
            if reply is None:
                commands = partial(self._commands, envelope)
                self._transaction, reply = await choice.begin(first, commands, envelope.identity)
            self._was_refused = not 200 <= reply.code < 300
            if self._was_refused:
                self._refused("MAIL", reply, envelope, is_own=refusal is not None)
        except BaseException:
            envelope.close()
            raise
        if self._was_refused:
            envelope.close()
        else:
            envelope.count(len(argument))
            self._envelope, self.report.replies.mail = envelope, reply
        return reply

    def _choice(self, sender: str) -> PrimaryChoice:
        context = self._context
        if context.route_primaries is None:
            return OnePrimary(context.snapshot)
        return PrimaryByRoute(
            context.route_primaries, context.snapshot, sender, self._peer.address, self._protocol.local
        )

    def _objection(self, size: int) -> Reply | None:
        """Return the refusal of a message of this size, 0 where it is not known."""
        if self._settings.max_message_bytes and size > self._settings.max_message_bytes:
            return TOO_LARGE
        return FULL if self._context.counters.octets + size > self._settings.max_bytes_in_flight else None

    def _commands(self, envelope: OpenEnvelope, available: Mapping[str, str]) -> list[bytes]:
        """Return MAIL for a server with these extensions, and what is certain to follow it."""
        mail = envelope.mail_command(available)
        if not self._protocol.read_buffer.data:  # nothing follows yet: the client waits for the reply
            return [mail]
        return [mail, *self._look_ahead.commands(envelope.choice, available)]

    def _refused(self, command: str, reply: Reply, envelope: OpenEnvelope, *, is_own: bool = False) -> None:
        """Count and report a refused MAIL or DATA."""
        self._error_limits.idle()
        self.report.command_refused(command, reply, envelope, is_own=is_own)

    async def rcpt(self, argument: str) -> Reply:
        envelope = self._envelope
        if envelope is None:
            return self.out_of_order(_MAIL_FIRST)
        if self._body is not None:
            return self.out_of_order(_IN_CHUNKS)
        recipient = parse_recipient(argument, self._peer.offered)
        choice, refusal = envelope.choice, self._limit_met(envelope, recipient, len(argument))
        if refusal is not None:
            pass
        elif self._transaction is None:
            refusal = await self._begin_for(envelope, recipient)
        elif (refusal := choice.objection(recipient)) is not None:
            refusal = await self._elsewhere(envelope, recipient, refusal)
        reply, transaction = refusal, self._transaction
        if reply is None:
            assert transaction is not None  # noqa: S101 - begun above at the latest
            reply = await transaction.rcpt(rcpt_command(recipient, transaction.extensions))
            if 200 <= reply.code < 300:
                envelope.recipients.append(recipient)
                envelope.count(len(argument))
                self.report.replies.rcpt.append(reply)
                metrics.increment(metrics.recipients, "accepted")(1)
                return reply
        metrics.increment(metrics.recipients, metrics.reply_class(reply.code))(1)
        self._error_limits.exceed()
        self.report.recipient_refused(recipient.address, reply, is_own=refusal is not None)
        return reply

    def _limit_met(self, envelope: OpenEnvelope, recipient: Recipient, octets: int) -> Reply | None:
        """Return the refusal of a recipient by a rule of ours."""
        allowed = self._settings.allowed_domains
        if allowed and not is_relayed(recipient, allowed):
            return NOT_RELAYED
        if len(envelope.recipients) >= min(self._settings.max_recipients, envelope.choice.primary.most_recipients):
            return Reply.of(452, "4.5.3 Too many recipients")
        return FULL if self._context.counters.octets + octets > self._settings.max_bytes_in_flight else None

    async def _begin_for(self, envelope: OpenEnvelope, recipient: Recipient) -> Reply | None:
        """Begin at the primary of the first recipient; returns the reply to RCPT where that cannot be."""

        def commands(available: Mapping[str, str]) -> list[bytes]:
            mail = envelope.mail_command(available)
            if "PIPELINING" not in available:
                return [mail]
            further = self._look_ahead.commands(envelope.choice, available, behind=recipient)
            return [mail, rcpt_command(recipient, available), *further]

        self._transaction, reply = await envelope.choice.begin(recipient, commands, envelope.identity)
        return reply if self._transaction is None else None

    async def _elsewhere(self, envelope: OpenEnvelope, recipient: Recipient, refusal: Reply) -> Reply | None:
        """See to a recipient who needs another primary; returns the reply to RCPT where it cannot be had here."""
        choice, transaction = envelope.choice, self._transaction
        if refusal is not ELSEWHERE or transaction is None or not isinstance(choice, PrimaryByRoute):
            return refusal
        if not envelope.recipients and isinstance(transaction, PrimaryTransaction):  # nobody is in it as yet
            self._transaction = None
            transaction.end()
            return await self._begin_for(envelope, recipient)

        def commands(available: Mapping[str, str]) -> list[bytes]:
            mail = envelope.mail_command(available)
            return [mail, rcpt_command(recipient, available)] if "PIPELINING" in available else [mail]

        self._transaction, reply = await turn(
            choice, transaction, envelope.recipients, recipient, commands, envelope.identity
        )
        return reply

    # --- a message --------------------------------------------------------------------------------------------

    async def data(self, argument: str) -> Reply:
        if argument:
            nothing_after("DATA", argument)
        if self._body is not None:
            return self.out_of_order(_IN_CHUNKS)
        opened = await self._open(stuffed=True)
        if isinstance(opened, Reply):
            return opened
        try:
            protocol, pace = self._protocol, opened.pace
            if protocol.put(_GO_AHEAD):
                await protocol.catch_up()
            finder = EndOfLines() if self._peer.may_end_lines_with_lf else EndOfData()
            while not finder.found:
                piece = await protocol.chunk(pace.seconds)
                if not piece:
                    raise ClientGone
                pace.count(len(piece), protocol.waited)
                if opened.take(finder.feed(piece)):
                    await opened.pass_on()
            if finder.rest:
                protocol.read_buffer.unread(finder.rest)
            return await self._conclude(opened)
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
            if isinstance(opened, IncomingBody) and opened.take(piece):
                await opened.pass_on()
        if isinstance(opened, Reply):
            return opened
        if not is_last and opened.refusal is None:
            if not size:
                self._error_limits.idle()
            return Reply.of(250, f"2.0.0 {size} octets received")
        try:
            return await self._conclude(opened)
        finally:
            self.forget()
            self._was_refused = not is_last  # more chunks may be on their way

    async def _open(self, *, stuffed: bool) -> IncomingBody | Reply:
        """Send DATA to the primary; returns the body to be received, or the reply that refuses it."""
        envelope, transaction = self._envelope, self._transaction
        if envelope is None:
            return self.out_of_order(_MAIL_FIRST)
        if transaction is None:
            self._error_limits.idle()
            return _NO_RECIPIENTS
        full = self._context.counters.octets > self._settings.max_bytes_in_flight
        if full or not envelope.recipients:
            await transaction.withdraw()
            self._error_limits.idle()
            return FULL if envelope.recipients else _NO_RECIPIENTS
        reply = await transaction.data()
        if reply.code != 354:
            self._refused("DATA", reply, envelope)
            self.forget()
            self._was_refused = True
            return reply
        self.in_data = True
        envelope.id = self._context.ids.next()
        self._body = IncomingBody(
            self._settings,
            self._context.counters,
            transaction,
            self._received_line(envelope),
            stuffed=stuffed,
            crlf_only=self._peer.crlf_only,
        )
        return self._body

    async def _octets(self, pace: Pace, most: int = -1) -> bytes:
        """Return the next octets of the body, at most ``most``. Raises ClientGone."""
        piece = await self._protocol.chunk(pace.seconds, most)
        if not piece:
            raise ClientGone
        pace.count(len(piece), self._protocol.waited)
        return piece

    def _conclude(self, body: IncomingBody) -> Awaitable[Reply]:
        """End the message; returns the reply for the client, to be awaited."""
        assert self._envelope is not None  # noqa: S101 - a body has one
        self.was_served = self.is_concluding = True
        dot, transaction = self._final_dot, self._transaction
        if isinstance(transaction, ForkedTransaction) and len(transaction.legs) > 1:
            dot = ForkedDot(self._context, self._protocol, self._error_limits, self.report, transaction)
        return dot.send(body, self._envelope)

    def _received_line(self, envelope: OpenEnvelope) -> bytes:
        client = self._peer
        protocol = headers.protocol_keyword(
            extended=client.extended,
            tls=self._protocol.tls,
            authenticated=bool(client.user),
            utf8=bool(envelope.parameters) and value(envelope.parameters, "SMTPUTF8") is not None,
        )
        return headers.received_line(
            helo=client.helo,
            address=client.address,
            domain=self._settings.domain,
            protocol=protocol,
            message_id=envelope.id,
        )
