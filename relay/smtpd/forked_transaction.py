"""One message for recipients who need different primaries, where a route says ``split = "fork"``.

A ForkedTransaction stands in the place of a PrimaryTransaction: it has one at each primary, a leg. Each RCPT gets the
reply of its own; DATA, the body and the dot go to all. A leg that fails on the way is out, and the others go on. So is
one that hangs while another goes on, before the client, which waits for all, gives up on all.

    every dot 2xx      250
    none 2xx           the worst reply; nobody has the message, and it stays the client's
    some 2xx           250, or those who have it would get it again. Who did not take it gets a copy, as a backup does

What follows from the last case is in forked_dot.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence

from relay import faultpoints, metrics
from relay.mail.origin import Identity
from relay.mail.recipient import Recipient
from relay.mail.reply import Reply
from relay.smtpd.primary import Build, Primary
from relay.smtpd.primary_choice import ELSEWHERE, PrimaryByRoute
from relay.smtpd.primary_replies import LOST
from relay.smtpd.primary_transaction import NoReply, PrimaryTransaction

_SHARE = 0.5  # of the seconds that a server gets alone, which is about as long as a client waits
_GO_AHEAD = Reply.of(354, "go on")


class Leg:
    """The transaction at one primary, and what that has said last: None where it went on, or fell silent at its dot."""

    __slots__ = ("is_silent", "name", "recipients", "reply", "seconds", "servers", "transaction")

    def __init__(self, name: str, servers: tuple[str, ...], transaction: PrimaryTransaction) -> None:
        self.name = name
        self.servers = servers  # of the decision that chose it
        self.transaction = transaction
        self.recipients: list[Recipient] = []
        self.reply: Reply | None = None  # the end of it
        self.is_silent = False
        self.seconds: float | None = None  # from its dot to the reply

    @property
    def is_over(self) -> bool:
        return self.reply is not None or self.is_silent

    @property
    def has_message(self) -> bool:
        """Whether its primary has said that it has it."""
        return self.reply is not None and self.reply.is_positive

    async def data(self) -> None:
        """Send DATA."""
        reply = await self.transaction.data()
        self.reply = reply if reply.code != 354 else None

    async def write(self, chunks: Sequence[bytes]) -> None:
        """Send chunks of the body."""
        self.reply = await self.transaction.write(chunks)

    async def finish(self) -> None:
        """Send the dot."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            self.reply = await self.transaction.finish()
        except NoReply:
            self.is_silent = True
        else:
            self.seconds = loop.time() - begun
            faultpoints.reach("leg answered")


class ForkedTransaction:
    """The transactions at several primaries, as one."""

    def __init__(self, first: Leg, recipients: Sequence[Recipient], primary: Primary) -> None:
        """``recipients`` are those that the first leg, at this primary, has accepted."""
        # For how many seconds the others may be silent once one goes on, or has the message: the client waits.
        self._patience = primary.timeouts.command * _SHARE
        self._patience_at_end = primary.final_timeout * _SHARE
        first.recipients += recipients
        self.legs = [first]
        self.answered = [first.name for _ in recipients]  # by whom each accepted recipient was
        self._current = first  # to whose primary the next RCPT goes
        self._recipient = Recipient("")  # that it names

    def leg_at(self, servers: tuple[str, ...], name: str) -> Leg | None:
        """Return the leg that was chosen among the same servers, or is at the server of that name."""
        return next((leg for leg in self.legs if leg.servers == servers or leg.name == name), None)

    def turn_to(self, leg: Leg, recipient: Recipient) -> None:
        """Have the next RCPT, which names this recipient, sent there."""
        self._current, self._recipient = leg, recipient
        if leg not in self.legs:
            self.legs.append(leg)

    @property
    def extensions(self) -> Mapping[str, str]:
        return self._current.transaction.extensions

    @property
    def names(self) -> str:
        """The names of those who have the message."""
        return ",".join(leg.name for leg in self.legs if leg.has_message) or self.legs[0].name

    async def rcpt(self, command: bytes) -> Reply:
        """Send RCPT; returns the reply for the client."""
        leg = self._current
        reply = await leg.transaction.rcpt(command)
        if reply.is_positive:
            leg.recipients.append(self._recipient)
            self.answered.append(leg.name)
        return reply

    async def data(self) -> Reply:
        """Send DATA to all who have recipients; returns a 354, or the reply that refuses the message."""
        for leg in [leg for leg in self.legs if not leg.recipients]:
            leg.transaction.end()
            self.legs.remove(leg)
        await self._all("DATA", Leg.data, self._patience)
        return _GO_AHEAD if any(not leg.is_over for leg in self.legs) else self._refusal()

    async def withdraw(self) -> None:
        """Undo a DATA that was sent ahead; the transaction stays open."""
        await asyncio.gather(*(leg.transaction.withdraw() for leg in self.legs))

    async def write(self, chunks: Sequence[bytes]) -> Reply | None:
        """Send chunks of the body to all; returns None, or the reply for the client once nobody goes on."""
        await self._all("body", lambda leg: leg.write(chunks), self._patience)
        return self._refusal() if all(leg.is_over for leg in self.legs) else None

    def hold(self, last: bytes) -> None:
        """Keep the end of the body for ``finish``."""
        for leg in self.legs:
            leg.transaction.hold(last)

    async def finish(self) -> Reply:
        """Send all dots; returns the reply for the client. Raises NoReply where one may have it, and none says so."""
        await self._all("dot", Leg.finish, self._patience_at_end)
        if taken := [leg.reply for leg in self.legs if leg.reply is not None and leg.reply.is_positive]:
            return Reply(taken[0].code, _texts(taken))
        if any(leg.is_silent for leg in self.legs):
            raise NoReply("; ".join(f"{leg.name}: no reply to the dot" for leg in self.legs if leg.is_silent))
        return self._refusal()

    def end(self) -> None:
        """End all; the pools keep the connections whose state allows."""
        for leg in self.legs:
            leg.transaction.end()

    def abandon(self) -> None:
        """End all by closing the connections."""
        for leg in self.legs:
            leg.transaction.abandon()

    async def _all(self, stage: str, step: Callable[[Leg], Coroutine[None, None, None]], patience: float) -> None:
        """Do a step at all legs that are not over, at once; once it is well with one, others get so many seconds."""
        loop, limit = asyncio.get_running_loop(), None
        at = {loop.create_task(step(leg)): leg for leg in self.legs if not leg.is_over}
        waiting = set(at)
        try:
            while waiting:
                left = None if limit is None else max(0.0, limit - loop.time())
                done, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                if not done:
                    break
                if limit is None and any(at[task].has_message or not at[task].is_over for task in done):
                    limit = loop.time() + patience
        finally:
            for task in waiting:
                task.cancel()
        for task in waiting:
            leg = at[task]
            leg.transaction.give_up(stage)
            leg.is_silent = stage == "dot"  # it may have the message
            leg.reply = None if leg.is_silent else LOST

    def _refusal(self) -> Reply:
        """Return the worst of the replies, with the texts of all."""
        replies = [leg.reply for leg in self.legs if leg.reply is not None]
        return joined(replies) if replies else LOST


def joined(replies: Sequence[Reply]) -> Reply:
    """Return one reply for several refusals: the code of the worst, and the texts of all."""
    worst = max(replies, key=lambda reply: (reply.is_permanent, -replies.index(reply)))
    texts = _texts([worst])
    for reply in replies:
        for text in reply.lines:
            # RFC 2034 4: the status in a text has the class of the code.
            fits = reply.code // 100 == worst.code // 100 or not worst.status
            texts = (*texts, text if fits else f"{worst.status} {text}")
    return Reply(worst.code, tuple(dict.fromkeys(texts)))


def _texts(replies: Iterable[Reply]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text for reply in replies for text in reply.lines))


async def turn(
    choice: PrimaryByRoute,
    transaction: OpenTransaction,
    accepted: Sequence[Recipient],
    recipient: Recipient,
    build: Build,
    identity: Identity,
) -> tuple[OpenTransaction, Reply | None]:
    """Turn to the primary of a recipient who needs another one than the first, beside it, where a route wants that.

    Returns the transaction that goes on, and the reply to RCPT where this recipient cannot be in it. ``accepted`` are
    the recipients so far; ``build`` makes MAIL and this RCPT.
    """
    decision = choice.beside(recipient)
    if decision is None:
        metrics.split.labels("defer").inc()
        return transaction, ELSEWHERE
    name = choice.first(decision)
    leg = transaction.leg_at(decision.servers, name) if isinstance(transaction, ForkedTransaction) else None
    if leg is None:
        begun, reply, name = await choice.begin_at(decision, build, identity)
        if begun is None:
            return transaction, reply
        leg = Leg(name, decision.servers, begun)
        if not isinstance(transaction, ForkedTransaction):
            first = Leg(choice.primary.destination.name, choice.servers, transaction)
            transaction = ForkedTransaction(first, accepted, choice.primary)
            choice.answered = transaction.answered
        if (same := transaction.leg_at((), name)) is not None:  # who was to answer could not be used
            begun.end()
            leg = same
    metrics.split.labels("fork").inc()
    assert isinstance(transaction, ForkedTransaction)  # noqa: S101 - a leg is of one
    transaction.turn_to(leg, recipient)
    return transaction, None


OpenTransaction = PrimaryTransaction | ForkedTransaction
