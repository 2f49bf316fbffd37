"""The end of a message: its copies are made durable, then the primary gets the final dot, held until then.

By the primary's reply the copies are released, discarded or held as uncertain, and the client gets that reply. Nothing
here ends early because the client has gone: the primary may have the message. Where the copies cannot be stored, the
primary's reply stands and the lost copies are logged, unless the settings require durable copies.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from prometheus_client import Counter

from relay import faultpoints, maillog, metrics
from relay.ledger.changes import Released
from relay.mail import headers
from relay.mail.envelope import Envelope
from relay.mail.record import Message
from relay.mail.reply import Reply
from relay.smtpd import mail_features
from relay.smtpd.body import LARGE, IncomingBody
from relay.smtpd.context import Context
from relay.smtpd.error_limits import ErrorLimits
from relay.smtpd.open_envelope import OpenEnvelope
from relay.smtpd.primary_transaction import NoReply
from relay.smtpd.protocol import ClientProtocol
from relay.smtpd.staging import NotDurable
from relay.smtpd.transaction_report import TransactionReport
from relay.trace import events

if TYPE_CHECKING:
    from relay.smtpd.forked_transaction import OpenTransaction

_NOT_DURABLE = Reply.of(451, "4.3.1 The copy cannot be stored at the moment, try again later")
_NO_ANSWER = Reply.of(451, "4.4.2 The primary server did not answer, try again later")


class FinalDot:
    """Ends the messages of one client."""

    def __init__(
        self, context: Context, protocol: ClientProtocol, error_limits: ErrorLimits, report: TransactionReport
    ) -> None:
        self._context = context
        self._protocol = protocol
        self._error_limits = error_limits
        self._report = report

    async def send(self, incoming: IncomingBody, opened: OpenEnvelope) -> Reply:
        """Make the copies durable, then send the primary the dot; returns the reply for the client."""
        body = await incoming.complete()
        named, replies = headers.name_of(body), self._report.replies
        primary = opened.choice.answering
        message = Message(opened.sealed(self._context.staging.now(), len(body), named.text), body)
        envelope = message.envelope
        if (refusal := incoming.refusal) is not None:
            self._error_limits.idle()
            metrics.messages.labels("own").inc()
            maillog.refused(envelope, refusal)
            outcome = events.REFUSED if incoming.is_by_primary else events.OWN
            replies.tell(outcome, envelope, primary, refusal)
            return refusal
        staged = await self._stage(message)
        is_required = self._context.settings.relay.require_durable_copies and envelope.destinations
        if staged is None or (not staged and is_required):
            replies.tell(events.OWN, envelope, primary, _NOT_DURABLE)
            return _NOT_DURABLE  # no fault of the client's
        digest = ""
        if staged and len(body) <= LARGE:
            digest = headers.equality_digest(envelope.sender, body, named)
        elif staged:
            digest = await asyncio.to_thread(headers.equality_digest, envelope.sender, body, named)
        del body, message  # frees memory: the primary may take ten minutes to answer
        return await self._finish(incoming.transaction, envelope, primary, digest, staged=staged)

    async def _stage(self, message: Message) -> bool | None:
        """Make the copies durable before the primary may accept; returns whether they are.

        False: there are no copies, or neither Redis nor the spool can be written. None: this process lacks descriptors,
        memory or threads, so the client gets a temporary refusal.
        """
        if not message.envelope.destinations:
            return False
        begun = self._protocol.loop.time()
        faultpoints.reach("before staging")
        replies = self._report.replies
        try:
            replies.stage = await self._context.staging.stage(message)
        except NotDurable as error:
            maillog.not_durable(message.envelope, str(error))
            return None if error.is_own else False
        faultpoints.reach("staged")
        replies.stage_seconds = seconds = self._protocol.loop.time() - begun
        metrics.observer(metrics.stage_seconds)(seconds)
        return True

    async def _finish(
        self, transaction: OpenTransaction, envelope: Envelope, primary: str, digest: str, *, staged: bool
    ) -> Reply:
        """Send the held dot; release, discard or hold the copies by the primary's reply, and return that reply."""
        staging, replies = self._context.staging, self._report.replies
        begun = self._protocol.loop.time()
        try:
            reply = await transaction.finish()
        except NoReply as trouble:
            self._error_limits.idle()
            if staged:
                staging.hold(envelope.id, digest)
            metrics.messages.labels("uncertain").inc()
            maillog.uncertain(envelope, self._context.settings.relay.uncertain_hold, str(trouble))
            seconds, why = self._protocol.loop.time() - begun, Reply.of(451, str(trouble))
            replies.tell(events.UNCERTAIN, envelope, primary, why, seconds=seconds)
            return _NO_ANSWER
        seconds = self._protocol.loop.time() - begun
        faultpoints.reach("primary answered")
        metrics.observer(metrics.primary_seconds)(seconds)
        if envelope.route:
            self._time_of_servers(primary, seconds)
        if 200 <= reply.code < 300:
            metrics.increment(metrics.messages, "accepted")(1)
            if staged:
                addresses = tuple([r.address for r in envelope.recipients])
                await staging.release(Released(envelope.id, envelope.destinations, digest, addresses))
                faultpoints.reach("released")
            elif envelope.destinations:
                metrics.copies_lost.inc()
                maillog.copy_lost(envelope)
            self._accepted(envelope, primary, reply, seconds)
        else:
            metrics.increment(metrics.messages, metrics.reply_class(reply.code))(1)
            self._error_limits.idle()
            if staged:
                staging.discard(envelope.id)
            self._count_by_route(metrics.route_refused, envelope, primary)
            maillog.refused(envelope, reply)
            replies.tell(events.REFUSED, envelope, primary, reply, seconds=seconds)
        return reply

    def _accepted(self, envelope: Envelope, primary: str, reply: Reply, seconds: float) -> None:
        """Count, log and tell of a message that the primary has."""
        self._error_limits.bring_a_message()
        if self._error_limits.lines:
            self._report.log_the_rest()
        metrics.increment(metrics.bytes_accepted)(envelope.size)
        mail_features.note(envelope)
        if envelope.route:
            self._count_by_route(metrics.route_messages, envelope, primary)
        is_late = self._protocol.is_gone
        to = [r.address for r in envelope.recipients] if self._context.settings.log.addresses else ()
        by = primary if envelope.route else ""
        maillog.accepted(envelope, reply, seconds, late=is_late, to=to, primary=by)
        self._report.replies.tell(events.ACCEPTED, envelope, primary, reply, seconds=seconds, is_late=is_late)

    def _time_of_servers(self, primary: str, seconds: float) -> None:
        """Note how long each server took that answers for a route of the message."""
        metrics.observer(metrics.server_seconds, primary)(seconds)

    def _count_by_route(self, counter: Counter, envelope: Envelope, primary: str) -> None:
        """Count a message that the primary has taken, or refused, for each route that its recipients took."""
        for route in envelope.route.split(",") if envelope.route else ():
            metrics.increment(counter, route, primary)(1)
