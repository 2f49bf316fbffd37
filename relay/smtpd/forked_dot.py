"""The end of a message that goes to several primaries: whoever has not taken it gets a copy instead.

Before the dots a spare is staged for each leg: a copy for that server and its recipients. It is a message of its own,
with one destination, so all that holds for copies holds for it, through crashes, too. Where the spares cannot be
stored, no dot is sent. Once the client is to hear 250, the spares of those who have the message are discarded, and the
others are released: a server that was silent may get it twice. What one refused for good is offered once more, and is
then in its failed list; the client never hears of that.
"""

from __future__ import annotations

import asyncio

from prometheus_client import Counter

from relay import maillog, metrics
from relay.ledger.changes import Released
from relay.mail.envelope import Envelope
from relay.mail.record import Message
from relay.mail.reply import Reply
from relay.smtpd.body import IncomingBody
from relay.smtpd.context import Context
from relay.smtpd.error_limits import ErrorLimits
from relay.smtpd.final_dot import FinalDot
from relay.smtpd.forked_transaction import ForkedTransaction, Leg, OpenTransaction
from relay.smtpd.open_envelope import OpenEnvelope
from relay.smtpd.primary_choice import PrimaryByRoute
from relay.smtpd.protocol import ClientProtocol
from relay.smtpd.replies import Replies
from relay.smtpd.staging import NotDurable
from relay.smtpd.transaction_report import TransactionReport
from relay.trace import events
from relay.trace.events import IN_REDIS


class ForkedDot(FinalDot):
    """Ends a message that goes to several primaries."""

    def __init__(
        self,
        context: Context,
        protocol: ClientProtocol,
        error_limits: ErrorLimits,
        report: TransactionReport,
        transaction: ForkedTransaction,
    ) -> None:
        super().__init__(context, protocol, error_limits, report)
        self._forked = transaction
        self._spares: list[tuple[Leg, Envelope, str]] = []  # staged, and where
        self._is_staged = False  # the message for the backups
        self._taken: set[tuple[str, str]] = set()  # route and server of each recipient

    async def send(self, incoming: IncomingBody, opened: OpenEnvelope) -> Reply:
        """Make copies and spares durable, then send the dots; returns the reply for the client."""
        if isinstance(opened.choice, PrimaryByRoute):
            self._taken = opened.choice.taken(opened.recipients)
        try:
            return await super().send(incoming, opened)
        finally:
            for _, spare, _ in self._spares:  # no dot was sent
                self._context.staging.discard(spare.id)

    async def _stage(self, message: Message) -> bool | None:
        """Stage the spares, without which no dot is sent, and the copies."""
        staging, envelope = self._context.staging, message.envelope
        spares = [(leg, self._spare(envelope, leg)) for leg in self._forked.legs]
        places = await asyncio.gather(
            *(staging.stage(Message(spare, message.body)) for _, spare in spares), return_exceptions=True
        )
        for (leg, spare), place in zip(spares, places, strict=True):
            if isinstance(place, str):
                self._spares.append((leg, spare, place))
        for place in places:
            if isinstance(place, NotDurable):
                maillog.not_durable(envelope, str(place))
                return None
            if isinstance(place, BaseException):
                raise place
        staged = await super()._stage(message)
        self._is_staged = staged is True
        return staged if envelope.destinations else True

    def _spare(self, envelope: Envelope, leg: Leg) -> Envelope:
        name = self._context.ids.next()
        recipients = tuple(leg.recipients)
        return envelope._replace(
            id=name, recipients=recipients, destinations=(leg.name,), promised=(), spare_of=envelope.id
        )

    def _accepted(self, envelope: Envelope, primary: str, reply: Reply, seconds: float) -> None:
        asked = ",".join(leg.name for leg in self._forked.legs)
        is_late = self._protocol.is_gone
        self._report.replies.tell(events.ACCEPTED, envelope, asked, reply, seconds=seconds, is_late=is_late)
        super()._accepted(envelope, self._forked.names, reply, seconds)

    def _time_of_servers(self, primary: str, seconds: float) -> None:
        for leg in self._forked.legs:
            if leg.seconds is not None:
                metrics.observer(metrics.server_seconds, leg.name)(leg.seconds)

    def _count_by_route(self, counter: Counter, envelope: Envelope, primary: str) -> None:
        wanted = counter is metrics.route_messages
        said = {leg.name for leg in self._forked.legs if leg.has_message is wanted}
        for route, server in self._taken:
            if server in said:
                metrics.increment(counter, route, server)(1)

    async def _finish(
        self, transaction: OpenTransaction, envelope: Envelope, primary: str, digest: str, *, staged: bool
    ) -> Reply:
        spares, self._spares = self._spares, []  # if this ends here, they become uncertain
        reply = await super()._finish(transaction, envelope, primary, digest, staged=self._is_staged)
        for leg, spare, place in spares:
            if reply.is_positive and not leg.has_message:
                await self._owe(envelope, leg, spare, place)
            elif leg.has_message and place == IN_REDIS and not self._is_staged:
                # To nobody, but the client's first try of it may be uncertain: that is covered.
                covered = tuple(recipient.address for recipient in leg.recipients)
                await self._context.staging.release(Released(spare.id, (), digest, covered))
            else:
                self._context.staging.discard(spare.id)
        return reply

    async def _owe(self, envelope: Envelope, leg: Leg, spare: Envelope, place: str) -> None:
        """Have a leg's spare delivered, since the client has been told that all is well."""
        await self._context.staging.release(Released(spare.id, (leg.name,)))
        said = leg.reply or Reply.of(451, "no reply to the dot")
        told = Replies()
        told.stage = place
        told.tell(events.ACCEPTED, spare, leg.name, said)  # that it will have it: the message's own line names all
        if leg.reply is not None and leg.reply.is_permanent:
            metrics.split_refused.labels(leg.name).inc()
            maillog.split_refused(envelope, leg.name, spare.id, len(leg.recipients), leg.reply)
        else:
            maillog.split_copied(envelope, leg.name, spare.id, len(leg.recipients), leg.reply)
