"""The choice of the primary for one transaction, and of the backups that get a copy for its recipients.

Without routes the primary is the one of all mail. With routes it is chosen at MAIL where the recipient does not matter
for that, else at the first recipient; it stays for the whole transaction. Recipients who need another are put off with
452, to be sent by themselves, unless a route has the message forked (forked_transaction.py). Both choices are asked
the same; each keeps the snapshot of the roles until ``end``.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Sequence

from relay import maillog
from relay.mail.origin import Identity
from relay.mail.recipient import Recipient
from relay.mail.reply import Reply
from relay.routing.decisions import RouteDecision, owed
from relay.smtpd import primary_transaction
from relay.smtpd.primary import Build, Primary
from relay.smtpd.primary_replies import NOT_AVAILABLE
from relay.smtpd.primary_transaction import PrimaryTransaction
from relay.smtpd.route_primaries import RoutePrimaries
from relay.smtpd.snapshot import Snapshot

ELSEWHERE = Reply.of(452, "4.5.3 Recipient is on another server, send it by itself")
FORK = "fork"
_NO_TABLE = Reply.of(451, "4.3.0 The table of routes cannot be read, try again later")

Promised = tuple[tuple[str, tuple[int, ...]], ...]
Begun = tuple[PrimaryTransaction | None, Reply]


class OnePrimary:
    """The choice where there are no routes: the primary of the snapshot, whoever the recipients are."""

    __slots__ = ("_snapshot", "primary")
    awaits_recipient = False  # the transaction can begin without

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot.take()
        self.primary = snapshot.primary

    @property
    def answering(self) -> str:
        """The name of the server that answers."""
        return self.primary.destination.name

    def begin(self, recipient: Recipient | None, build: Build, identity: Identity) -> Awaitable[Begun]:
        """Begin the transaction; returns as primary_transaction.begin."""
        return primary_transaction.begin(self.primary, build, identity)

    def objection(self, recipient: Recipient) -> Reply | None:
        """Return None: every recipient may be in this transaction."""
        return None

    def copies(self, recipients: Sequence[Recipient]) -> tuple[tuple[str, ...], Promised, str]:
        """Decide for good who gets a copy; returns their names, (name, recipient indices) if not all, and no route."""
        names, promised = [], []
        for backup in self._snapshot.backups:
            wanted = tuple(i for i, r in enumerate(recipients) if backup.wants(r)) if backup.domains else None
            if wanted is None or wanted:
                names.append(backup.name)
            if wanted and len(wanted) < len(recipients):
                promised.append((backup.name, wanted))
        return tuple(names), tuple(promised), ""

    def end(self) -> None:
        """Give the snapshot back."""
        self._snapshot.give_back()


class PrimaryByRoute:
    """The choice by the routes, for one transaction."""

    def __init__(
        self, primaries: RoutePrimaries, snapshot: Snapshot, sender: str, client: str, local: tuple[str, int]
    ) -> None:
        self._primaries = primaries
        self._snapshot = snapshot
        self._plan = primaries.router.plan(
            snapshot.primary.destination.name, sender, client, local, token=secrets.token_hex(8)
        )
        self._settled = self._plan.settled  # None: the recipient decides
        self._chosen: RouteDecision | None = None  # whose primary this transaction has, or is about to have
        self._refusals: dict[tuple[str, ...], Reply] = {}  # what MAIL got, by who was to answer
        self._is_here: dict[tuple[str, tuple[str, ...]], bool] = {}  # by primary and by who was to answer
        self.primary = snapshot.primary
        self.answered: list[str] | None = None  # of a message that forks: the server of each recipient
        self._may_fork = False  # a route of its recipients says so
        snapshot.take()

    @property
    def awaits_recipient(self) -> bool:
        """Whether the transaction can only begin with a recipient."""
        return self._settled is None

    @property
    def answering(self) -> str:
        """The names of the servers that answer: of a message that forks those that have accepted a recipient."""
        return ",".join(dict.fromkeys(self.answered or ())) or self.primary.destination.name

    async def begin(self, recipient: Recipient | None, build: Build, identity: Identity) -> Begun:
        """Begin the transaction at the primary of this recipient, of all where there is none given.

        A MAIL that was refused once is the reply to every further recipient of the same servers.
        """
        try:
            decision = self._settled or self._plan.decide(recipient.address if recipient else "")
        except OSError as error:
            return None, _unreadable(error)
        if (refused := self._refusals.get(decision.servers)) is not None:
            return None, refused

        def of(primary: Primary) -> Build:
            self.primary = primary
            return build

        self._chosen, self._may_fork = decision, decision.route.split == FORK
        transaction, reply, _ = await self._primaries.begin(decision, self._snapshot, of, identity)
        if transaction is None:
            self._chosen = None
            self._refusals[decision.servers] = reply
        return transaction, reply

    def objection(self, recipient: Recipient) -> Reply | None:
        """Return the reply for a recipient who needs another primary, None where this one is right."""
        chosen = self._chosen
        if self._settled is not None or chosen is None:
            return None
        try:
            found = self._plan.decide(recipient.address)
        except OSError as error:
            return _unreadable(error)
        if self.answered is not None:  # each recipient has to be sent to its own
            return ELSEWHERE
        if not self._may_be_here(found, chosen):
            return ELSEWHERE
        self._may_fork |= found.route.split == FORK
        return None

    def _may_be_here(self, found: RouteDecision, chosen: RouteDecision) -> bool:
        """Return whether this primary is that of a recipient: the same all through the transaction.

        A RCPT that was sent ahead is not put off in its turn because a server has come back meanwhile.
        """
        name = self.primary.destination.name
        asked = (name, found.servers)
        if asked not in self._is_here:
            self._is_here[asked] = found.servers == chosen.servers or self._primaries.first(found) == name
        return self._is_here[asked]

    def beside(self, recipient: Recipient) -> RouteDecision | None:
        """Return the decision for a recipient who needs another primary, if a route of this message wants it to fork.

        Not with LMTP, where the dot has a reply for each recipient.
        """
        found = self._plan.decide(recipient.address)  # can be read: there was an objection to this recipient
        self._may_fork |= found.route.split == FORK
        primaries = [self.primary, *(self._primaries.primary(name, self._snapshot) for name in found.servers)]
        if not self._may_fork or any(primary.most_recipients == 1 for primary in primaries):
            return None
        return found

    def first(self, decision: RouteDecision) -> str:
        """Return who would be tried first now."""
        return self._primaries.first(decision)

    @property
    def servers(self) -> tuple[str, ...]:
        """The servers among which the primary was chosen."""
        return self._chosen.servers if self._chosen is not None else ()

    async def begin_at(
        self, decision: RouteDecision, build: Build, identity: Identity
    ) -> tuple[PrimaryTransaction | None, Reply, str]:
        """Begin another transaction, beside the first; returns as RoutePrimaries.begin, with the name of who answered.

        It gets as long as for one command: the client, which would give up on all, waits for the reply to RCPT as well.
        """
        if (refused := self._refusals.get(decision.servers)) is not None:
            return None, refused, ""
        try:
            async with asyncio.timeout(self.primary.timeouts.command):
                transaction, reply, primary = await self._primaries.begin(
                    decision, self._snapshot, lambda _: build, identity
                )
        except TimeoutError:
            primary = self._primaries.primary(decision.servers[0], self._snapshot)
            transaction, reply = None, NOT_AVAILABLE
            primary.trouble("MAIL", TimeoutError("no answer in time, while another primary waits"))
        if transaction is None:
            self._refusals[decision.servers] = reply
        return transaction, reply, primary.destination.name

    def taken(self, recipients: Sequence[Recipient]) -> set[tuple[str, str]]:
        """Return the route of each recipient of a message that forks, with the server that has accepted it."""
        found = zip(recipients, self.answered or (), strict=True)
        return {(self._plan.decide(recipient.address).route.name, server) for recipient, server in found}

    def copies(self, recipients: Sequence[Recipient]) -> tuple[tuple[str, ...], Promised, str]:
        """Decide for good who gets a copy; returns their names, (name, recipient indices) if not all, and the routes.

        Raises OSError.
        """
        decisions = [self._plan.decide(recipient.address) for recipient in recipients]
        backups = {backup.name: backup for backup in self._snapshot.backups}
        names: list[str] = []
        promised: list[tuple[str, tuple[int, ...]]] = []
        answered = self.answered or [self.primary.destination.name] * len(recipients)
        for name, indices in owed(decisions, answered, list(backups)).items():
            server = backups.get(name) or self._primaries.copied[name]
            wanted = tuple(i for i in indices if server.wants(recipients[i]))
            if wanted:
                names.append(name)
            if wanted and len(wanted) < len(recipients):
                promised.append((name, wanted))
        return tuple(names), tuple(promised), ",".join(dict.fromkeys(d.route.name for d in decisions))

    def end(self) -> None:
        """Give the snapshot back."""
        self._snapshot.give_back()


PrimaryChoice = OnePrimary | PrimaryByRoute


def _unreadable(error: OSError) -> Reply:
    maillog.notice("error", "a table of routes cannot be read", reason=str(error))
    return _NO_TABLE
