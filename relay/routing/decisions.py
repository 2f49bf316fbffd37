"""Who answers for a recipient, and who gets copies: the first route that matches, by values alone.

A Router belongs to the settings and to its tables as they were loaded, and never changes: a transaction keeps the one
that it began with. ``plan`` looks at what is known at MAIL; the plan then decides recipient by recipient. A table that
cannot be read raises OSError.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from relay.config.routes import DEFAULT_ROUTE, Entries, Match, Route, is_at
from relay.mail.address_keys import lookup_keys
from relay.mail.addresses import within
from relay.routing.moved_copy import NOBODY, MovedMap
from relay.routing.table_store import Table

DEFAULT = Route(DEFAULT_ROUTE, Match(), ())
MOVED_ROUTE = "moved"  # how the route of a mailbox that was moved is called, wherever it is told


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """What holds for one recipient: the route, and who may answer, who comes first first.

    ``key`` is the entry that matched, "" where the recipient does not matter, and ``source`` the table that it is in.
    For a mailbox that was moved ``former`` is what would hold else: who answers there gets a copy.
    """

    route: Route
    servers: tuple[str, ...]
    key: str = ""
    source: Path | None = None
    former: RouteDecision | None = None

    @property
    def is_default(self) -> bool:
        return self.route is DEFAULT

    def copied(self, default_backups: Sequence[str]) -> Sequence[str]:
        """Return who gets copies, but for whoever answers."""
        if self.former is not None:
            return tuple(dict.fromkeys((self.former.servers[0], *self.former.copied(default_backups))))
        return default_backups if self.is_default else self.route.copied


class Router:
    """The routes with their tables. ``servers`` are the names of all servers of the settings."""

    def __init__(
        self,
        routes: Sequence[Route],
        tables: Mapping[Path, Table],
        servers: Iterable[str],
        *,
        fold: bool,
        moved: MovedMap = NOBODY,
        split: str = "defer",
    ) -> None:
        """``moved`` says for whom another server answers than by the routes; ``split`` is what holds for them."""
        self._tables = tables
        self._moved = moved
        self._moved_route = Route(MOVED_ROUTE, Match(), (), split=split)
        self._routes = [(route, _Finder(route.match.recipients, tables)) for route in routes]
        self._senders = {route.name: _Finder(route.match.senders, tables) for route in routes}
        self._servers = frozenset(servers)
        self._fold = fold
        self._needs_sender = any(route.match.senders.are_given for route in routes)
        found = [name for route, finder in self._routes for name in (*route.answering, *self.known(finder.servers))]
        self.moved_to = self.known(tuple(moved.servers))
        found += self.moved_to
        self.redundant = frozenset(n for route in routes if len(route.answering) > 1 for n in route.answering)
        self.primaries = tuple(dict.fromkeys(found))  # who may answer, besides whoever does by default

    def with_routes(self, routes: Sequence[Route]) -> Router:
        """Return one with the same tables for these routes: others have been decided to answer."""
        split = self._moved_route.split
        return Router(routes, self._tables, self._servers, fold=self._fold, moved=self._moved, split=split)

    def plan(
        self, default: str, sender: str, client: str, listen: tuple[str, int] = ("", 0), token: str = ""
    ) -> RoutePlan:
        """Return what is known at MAIL. ``default`` is the server that answers for what no route matches.

        ``token`` is what a route with stick = "message" goes by.
        """
        sender_keys = lookup_keys(sender, fold=self._fold) if self._needs_sender else []
        found = tuple(self._candidates(sender_keys, client, listen))
        return RoutePlan(self, found, default, {"sender": sender.lower(), "client": client, "message": token})

    def _candidates(
        self, sender_keys: Sequence[str], client: str, listen: tuple[str, int]
    ) -> Iterator[tuple[Route, _Finder]]:
        """Yield the routes that may match, up to the first that matches whatever the recipient is."""
        for route, recipients in self._routes:
            match = route.match
            if match.clients and not within(client, match.clients):
                continue
            if match.listen and not any(is_at(*listen, *address) for address in match.listen):
                continue
            if match.senders.are_given and self._senders[route.name].find(sender_keys) is None:
                continue
            yield route, recipients
            if not match.recipients.are_given:
                return

    def keys(self, address: str) -> list[str]:
        """Return the keys under which an address is looked up."""
        return lookup_keys(address, fold=self._fold)

    def moved(self, keys: Sequence[str], former: RouteDecision) -> RouteDecision | None:
        """Return what holds for a mailbox that was moved, None for one that was not. Raises OSError."""
        found = self._moved.find(keys)
        if found is None or not self.known((found[1],)):
            return None
        key, server = found
        return RouteDecision(self._moved_route, (server,), key, None, former)

    def known(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return those that these settings have: a table may have been read with others."""
        return tuple(name for name in names if name in self._servers)


class RoutePlan:
    """The routes that one transaction may take, and the decisions for its recipients."""

    def __init__(
        self, router: Router, candidates: tuple[tuple[Route, _Finder], ...], default: str, stick: Mapping[str, str]
    ) -> None:
        self._router = router
        self._candidates = candidates
        self._default = RouteDecision(DEFAULT, (default,))
        self._stick = stick
        self._made: dict[str, RouteDecision] = {}

    @property
    def settled(self) -> RouteDecision | None:
        """The decision about who answers, if that is the same for every recipient; else None."""
        found = self._settled
        moved_to = self._router.moved_to
        return found if found is None or not moved_to or moved_to == found.servers else None

    @property
    def _settled(self) -> RouteDecision | None:
        first: RouteDecision | None = None
        for route, recipients in self._candidates:
            if recipients.servers or (route.weights and route.stick == "recipient"):
                return None
            found = self._decision(route, "")
            if first is not None and not _same_primary(first, found):
                return None
            first = first or found
        if self._candidates and not self._candidates[-1][0].match.recipients.are_given:
            return first
        return self._default if first is None or _same_primary(first, self._default) else None

    def decide(self, address: str) -> RouteDecision:
        """Return the decision for a recipient. Raises OSError."""
        found = self._made.get(address)
        if found is None:
            keys = self._router.keys(address)
            found = self._decide(address, keys)
            if self._router.moved_to:
                found = self._router.moved(keys, found) or found
            self._made[address] = found
        return found

    def _decide(self, address: str, keys: Sequence[str]) -> RouteDecision:
        for route, recipients in self._candidates:
            if not route.match.recipients.are_given:
                return self._decision(route, _mailbox(keys, address))
            if (entry := recipients.find(keys)) is not None:
                key, servers, source = entry
                if names := self._router.known(servers):
                    return RouteDecision(route, names, key, source)
                return replace(self._decision(route, _mailbox(keys, address)), key=key, source=source)
        return self._default

    def _decision(self, route: Route, mailbox: str) -> RouteDecision:
        if not route.weights:
            return RouteDecision(route, route.servers)
        key = mailbox if route.stick == "recipient" else self._stick[route.stick]
        return RouteDecision(route, by_weight(route.servers, route.weights, key))


class _Finder:
    """The entries of one condition, in the settings and in tables."""

    def __init__(self, entries: Entries, tables: Mapping[Path, Table]) -> None:
        self._keys = frozenset(entries.keys)
        self._tables = [(path, tables[path]) for path in entries.files]
        self.servers = tuple(name for _, table in self._tables for name in table.note.servers)

    def find(self, keys: Sequence[str]) -> tuple[str, tuple[str, ...], Path | None] | None:
        """Return the key that matches, the servers that its entry names, and its file. Raises OSError."""
        if self._keys:
            for key in keys:
                if key in self._keys:
                    return key, (), None
        for path, table in self._tables:
            if (found := table.find(keys)) is not None:
                return (*found, path)
        return None


def _same_primary(one: RouteDecision, other: RouteDecision) -> bool:
    return one.servers == other.servers and (
        len(one.servers) == 1 or one.route.return_after == other.route.return_after
    )


def _mailbox(keys: Sequence[str], address: str) -> str:
    """Return what stands for the mailbox of an address: with and without a tag it is the same."""
    names = [key for key in keys[:2] if not key.startswith(("@", "*"))]
    return names[-1] if names else address.lower()


@lru_cache(maxsize=4096)
def by_weight(servers: tuple[str, ...], weights: tuple[float, ...], key: str) -> tuple[str, ...]:
    """Return the servers in the order of weighted rendezvous hashing for a key.

    A server that is taken out moves only the keys that it was first for, and a weight that grows only moves keys to it.
    One without weight is not among them.
    """
    scores = []
    for name, weight in zip(servers, weights, strict=True):
        if not weight:
            continue
        digest = hashlib.blake2b(f"{name}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
        share = (int.from_bytes(digest) + 0.5) / 2**64
        scores.append((weight / -math.log(share), name))
    return tuple(name for _, name in sorted(scores, reverse=True))


def owed(
    decisions: Sequence[RouteDecision], answered: Sequence[str], default_backups: Sequence[str]
) -> dict[str, list[int]]:
    """Return who is owed a copy of a message, and for which of its recipients, by index.

    ``decisions`` are those for its recipients, ``answered`` the servers that take it for each as the primary.
    """
    found: dict[str, list[int]] = {}
    for index, decision in enumerate(decisions):
        for name in decision.copied(default_backups):
            if name != answered[index]:
                found.setdefault(name, []).append(index)
    return found
