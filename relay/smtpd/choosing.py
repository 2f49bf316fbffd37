"""Who answers in one transaction, and what its recipients are owed, where the settings have routes.

The primary is chosen at MAIL where the recipient does not matter for that, else at the first recipient; it stays for
the whole transaction. Recipients who need another are put off with 452, to be sent by themselves.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from relay import maillog, metrics
from relay.mail.origin import Identity
from relay.mail.recipient import Recipient
from relay.mail.reply import Reply
from relay.routing.decisions import RouteDecision, owed
from relay.smtpd.fleet import Fleet
from relay.smtpd.primary import Build, Primary, PrimaryTransaction
from relay.smtpd.snapshot import Snapshot

MAIL_OK = Reply.of(250, "2.1.0 Ok")
_ELSEWHERE = Reply.of(452, "4.5.3 Recipient is on another server, send it by itself")
_NO_TABLE = Reply.of(451, "4.3.0 The table of routes cannot be read, try again later")

Promised = tuple[tuple[str, tuple[int, ...]], ...]


class Choosing:
    """The choice of one transaction."""

    def __init__(self, fleet: Fleet, snapshot: Snapshot, sender: str, client: str, local: tuple[str, int]) -> None:
        self._fleet = fleet
        self._snapshot = snapshot
        self._plan = fleet.router.plan(
            snapshot.primary.destination.name, sender, client, local, token=secrets.token_hex(8)
        )
        self.settled = self._plan.settled  # None: the recipient decides
        self._chosen: RouteDecision | None = None  # whose primary this transaction has, or is about to have
        self._refusals: dict[tuple[str, ...], Reply] = {}  # what MAIL got, by who was to answer
        self.primary = snapshot.primary

    async def begin(
        self, recipient: Recipient | None, build: Build, identity: Identity
    ) -> tuple[PrimaryTransaction | None, Reply]:
        """Begin the transaction at the primary of this recipient, of all where there is none given.

        A MAIL that was refused once is the reply to every further recipient of the same servers.
        """
        try:
            decision = self.settled or self._plan.decide(recipient.address if recipient else "")
        except OSError as error:
            return None, _unreadable(error)
        if (refused := self._refusals.get(decision.servers)) is not None:
            return None, refused

        def of(primary: Primary) -> Build:
            self.primary = primary
            return build

        self._chosen = decision
        transaction, reply, _ = await self._fleet.begin(decision, self._snapshot, of, identity)
        if transaction is None:
            self._chosen = None
            self._refusals[decision.servers] = reply
        return transaction, reply

    def objection(self, recipient: Recipient, *, counted: bool = False) -> Reply | None:
        """Return the reply for a recipient who needs another primary, None where this one is right."""
        chosen = self._chosen
        if self.settled is not None or chosen is None:
            return None
        try:
            found = self._plan.decide(recipient.address)
        except OSError as error:
            return _unreadable(error)
        if found.servers == chosen.servers or self._fleet.first(found) == self.primary.destination.name:
            return None
        if counted:
            metrics.split.labels("defer").inc()
        return _ELSEWHERE

    def accepted(self, routes: str) -> str:
        """Count an accepted message; returns the name of the server that has taken it."""
        name = self.primary.destination.name
        for route in routes.split(","):
            metrics.route_messages.labels(route, name).inc()
        return name

    def copies(self, recipients: Sequence[Recipient]) -> tuple[tuple[str, ...], Promised, str]:
        """Decide for good who gets a copy; returns their names, (name, recipient indices) if not all, and the routes.

        Raises OSError.
        """
        decisions = [self._plan.decide(recipient.address) for recipient in recipients]
        backups = {backup.name: backup for backup in self._snapshot.backups}
        names: list[str] = []
        promised: list[tuple[str, tuple[int, ...]]] = []
        for name, indices in owed(decisions, self.primary.destination.name, list(backups)).items():
            server = backups.get(name) or self._fleet.copied[name]
            wanted = tuple(i for i in indices if server.wants(recipients[i]))
            if wanted:
                names.append(name)
            if wanted and len(wanted) < len(recipients):
                promised.append((name, wanted))
        return tuple(names), tuple(promised), ",".join(dict.fromkeys(d.route.name for d in decisions))


def _unreadable(error: OSError) -> Reply:
    maillog.notice("error", "a table of routes cannot be read", reason=str(error))
    return _NO_TABLE
