"""The servers that routes name, as primaries of one relay process: their connections, and who of them can be used.

A transaction gets the first server of its decision that can be used. The next is tried only while nobody can have the
message: no connection, no greeting, EHLO, TLS or AUTH, a 421 or nothing in reply to MAIL. Whatever a server says else
is its word, and goes to the client. So no message is at two primaries by a failover.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from relay import maillog, metrics
from relay.client.errors import ClientError
from relay.client.pool import PoolExhausted
from relay.config.routes import Route
from relay.mail.destination import Destination
from relay.mail.origin import Identity
from relay.mail.reply import Reply
from relay.mail.timeouts import MAIL_SECONDS
from relay.routing.decisions import RouteDecision, Router
from relay.smtpd import primary_transaction
from relay.smtpd.availability import QUIET_SECONDS, Availability
from relay.smtpd.primary import SAFE_MINIMUM, Build, Primary
from relay.smtpd.primary_replies import NOT_AVAILABLE
from relay.smtpd.primary_transaction import PrimaryTransaction, Unusable
from relay.smtpd.snapshot import Snapshot

_FOR_MAIL = 2  # times as long as for a connection, for the reply to MAIL: it may take look-ups


class RoutePrimaries:
    """The routes of one relay process and their servers. ``router`` is replaced when a table has changed."""

    def __init__(
        self,
        router: Router,
        named: Iterable[Destination],
        copied: Iterable[Destination],
        connect_to: Callable[[Destination], Primary],
    ) -> None:
        """``connect_to`` makes a primary of a server, without any connection yet."""
        self.router = router
        self.copied: Mapping[str, Destination] = {server.name: server for server in copied}
        self._named = {server.name: server for server in named}
        self._connect_to = connect_to
        self._primaries: dict[str, Primary] = {}
        self._standing: dict[str, Availability] = {}

    def follow(self, routes: Sequence[Route]) -> None:
        """Have the next transactions go by these routes, with the tables that hold."""
        self.router = self.router.with_routes(routes)

    async def prepare(self, names: Iterable[str], snapshot: Snapshot) -> str:
        """Open a connection to each server as for mail, and keep it; returns which cannot be used, and why."""
        troubles = []
        for name in names:
            primary = self.primary(name, snapshot)
            try:
                await primary.connect()
            except ClientError as error:
                troubles.append(f"{primary.destination.address} cannot be used: {error}")
        return "; ".join(troubles)

    def primary(self, name: str, snapshot: Snapshot) -> Primary:
        """Return a server as the primary; the one of the snapshot where it has that name."""
        if snapshot.primary.destination.name == name:
            return snapshot.primary
        return self._own(name)

    def _availability(self, name: str, primary: Primary) -> Availability:
        found = self._standing.get(name)
        if found is None:
            found = self._standing[name] = Availability(name, lambda: self._probe(name))
        primary.witness = found
        return found

    def _own(self, name: str) -> Primary:
        """Return a server with connections that no promotion closes."""
        found = self._primaries.get(name)
        if found is None:
            found = self._primaries[name] = self._connect_to(self._named[name])
        return found

    async def _probe(self, name: str) -> None:
        try:
            await self._own(name).probe()
        except PoolExhausted:  # says nothing about the server
            return

    @property
    def down(self) -> list[str]:
        """Names of the servers that cannot be used at the moment."""
        return sorted(name for name, standing in self._standing.items() if standing.is_down)

    # --- EHLO -----------------------------------------------------------------------------------------------------

    async def announced(self, snapshot: Snapshot) -> tuple[Mapping[str, str], bool]:
        """Return what all primaries offer together, and whether any has answered.

        Servers that have not answered an EHLO yet are waited for only while none has.
        """
        all_of_them = [snapshot.primary, *(self.primary(name, snapshot) for name in self.router.primaries)]
        servers = list({id(primary): primary for primary in all_of_them}.values())
        unknown = [primary for primary in servers if primary.extensions is None]
        if unknown and len(unknown) == len(servers):
            await asyncio.gather(*(primary.announced() for primary in unknown))
        else:
            for primary in unknown:
                primary.ask_soon()
        known = [primary.extensions for primary in servers if primary.extensions is not None]
        return in_common(known) if known else SAFE_MINIMUM, bool(known)

    async def hear_all(self, snapshot: Snapshot) -> None:
        """Wait for the EHLO of every primary, at the start."""
        names = (snapshot.primary.destination.name, *self.router.primaries)
        servers = {id(primary): primary for primary in (self.primary(name, snapshot) for name in names)}
        await asyncio.gather(*(primary.announced() for primary in servers.values()))

    # --- MAIL -----------------------------------------------------------------------------------------------------

    async def begin(
        self, decision: RouteDecision, snapshot: Snapshot, build: Callable[[Primary], Build], identity: Identity
    ) -> tuple[PrimaryTransaction | None, Reply, Primary]:
        """Send MAIL to the first server that can be used; returns as ``begin`` there does, and who has answered."""
        if len(decision.servers) == 1:
            primary = self.primary(decision.servers[0], snapshot)
            return *await primary_transaction.begin(primary, build(primary), identity), primary
        tried: list[tuple[str, str]] = []  # who could not be used, and why
        order, until = self._order(decision), time.monotonic() + MAIL_SECONDS
        are_down = all(name in self.down for name in decision.servers)
        while True:
            name = order.pop(0)
            primary = self.primary(name, snapshot)
            standing = self._availability(name, primary)
            try:
                with standing.tried():
                    if order or are_down:
                        transaction, reply = await _in_time(standing, primary, build(primary), identity, until)
                    else:
                        transaction, reply = await primary_transaction.begin(
                            primary, build(primary), identity, or_raise=True, until=until
                        )
            except Unusable as trouble:
                if not trouble.is_ours:
                    standing.fails(trouble.reason)
                tried.append((name, trouble.reason))
                if not order:
                    return None, trouble.reply, primary
            else:
                standing.answers()
                self._tell(decision, name, dict(tried))
                return transaction, reply, primary

    def first(self, decision: RouteDecision) -> str:
        """Return who would be tried first now."""
        return self._order(decision)[0] if len(decision.servers) > 1 else decision.servers[0]

    def _order(self, decision: RouteDecision) -> list[str]:
        """Return whom to try, one after the other; where nobody can be used, all of them."""
        after = decision.route.return_after
        ready, returning = [], []
        for name in decision.servers:
            standing = self._standing.get(name)
            if standing is None or standing.may_be_used(after):
                ready.append(name)
            elif standing.is_back:
                returning.append(name)
        return ready + returning or list(decision.servers)

    def _tell(self, decision: RouteDecision, name: str, tried: Mapping[str, str]) -> None:
        """Log a failover, once a turn."""
        for former in decision.servers:
            if former == name:
                return
            standing = self._standing.get(former)
            turn = (decision.route.name, name)
            if standing is not None and (standing.is_down or former in tried) and turn not in standing.told:
                standing.told.add(turn)
                metrics.failovers.labels(former, name).inc()
                maillog.failover(decision.route.name, former, name, standing.reason or tried.get(former, ""))

    async def watch(self) -> None:
        """Look again and again at the servers that are not alone, and of which nothing has been heard for a while."""
        while True:
            await asyncio.sleep(QUIET_SECONDS / 2)
            names = {*self.router.redundant, *self._standing}
            await asyncio.gather(*(self._look(name) for name in names))

    async def _look(self, name: str) -> None:
        primary = self._own(name)
        await self._availability(name, primary).look(primary.timeouts.connect)

    async def close(self) -> None:
        """Close all connections."""
        for standing in self._standing.values():
            standing.close()
        await asyncio.gather(*(primary.pool.close() for primary in self._primaries.values()))


async def _in_time(
    standing: Availability, primary: Primary, build: Build, identity: Identity, until: float
) -> tuple[PrimaryTransaction | None, Reply]:
    """Begin at a server that others can stand in for: it gets a shorter time. Raises Unusable.

    As long for a connection as a dead host does, or longer where it has taken longer before; and twice that for MAIL.
    """
    patience, stage = standing.patience(primary.timeouts.connect), "connect"

    async def work(limit: asyncio.Timeout) -> tuple[PrimaryTransaction | None, Reply]:
        def connected(extensions: Mapping[str, str]) -> Sequence[bytes]:
            nonlocal stage
            stage = "MAIL"
            limit.reschedule(asyncio.get_running_loop().time() + _FOR_MAIL * patience)
            return build(extensions)

        return await primary_transaction.begin(primary, connected, identity, or_raise=True, until=until)

    try:
        return await standing.wait_for(work, patience)
    except TimeoutError:
        reason = standing.reason or f"{stage}: no answer in time"
        primary.trouble(stage, TimeoutError(reason))
        raise Unusable(NOT_AVAILABLE, reason) from None


def in_common(announced: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """Return the extensions that all of these offer, with what all of them take: the smallest SIZE.

    That limit holds also where another of them announces none: the message may be for both.
    """
    first, *others = announced
    if not others:
        return first
    names, found = set(first).intersection(*others), {}
    for name in [name for name in first if name in names]:
        if len({a[name] for a in announced}) == 1 or name not in {"MT-PRIORITY", "FUTURERELEASE"}:
            found[name] = first[name]
    sizes = [int(size) for a in announced if (size := a.get("SIZE", "")).isascii() and size.isdigit()]
    if smallest := min([n for n in sizes if n], default=0):
        found["SIZE"] = str(smallest)
    return found
