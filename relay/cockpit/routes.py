"""How the routes stand: who answers on each and for how much, who cannot be used, their tables, and what was counted.

Read from Redis and from this host's files; where a route was decided about, that counts, else the settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relay.cockpit.changeover import answering
from relay.cockpit.formatting import count
from relay.config.model import Settings
from relay.config.routes import DEFAULT_ROUTE, Match, Route
from relay.ledger import changes, flow
from relay.ledger.flow import Flow, RouteFlow
from relay.routing import table_store
from relay.routing.decisions import MOVED_ROUTE
from relay.topology import decisions, promotion, route_roles
from relay.topology.agreement import behind_with_moves, differences
from relay.topology.decisions import View
from relay.topology.moved import MapState
from relay.topology.roles import backups_now
from relay.topology.state import Topology

_HOURS = 25  # that what is counted is added up for, the one that is not over among them


@dataclass(frozen=True, slots=True)
class ServerOnRoute:
    """One server of a route: whether it answers, for which share, and whether it gets copies of what others answer.

    ``share`` is None where it has no weight. ``away`` are the relay processes that cannot use it at the moment.
    ``accepted`` and ``refused`` are messages of a day, ``failovers`` the turns away from it, on any route.
    """

    name: str
    answers: bool
    copied: bool
    share: float | None
    away: tuple[str, ...]
    accepted: int
    refused: int
    failovers: int


@dataclass(frozen=True, slots=True)
class TableOnRoute:
    """A table of a route: its file, how many keys hold, since when the file is so, and why a later one is refused."""

    file: str
    keys: int
    changed: float
    fault: str


@dataclass(frozen=True, slots=True)
class RouteNow:
    """One route as it is now; ``what`` is the mail that it is for."""

    name: str
    what: str
    answering: str
    servers: Sequence[ServerOnRoute]
    tables: Sequence[TableOnRoute]
    is_decided: bool
    split: str

    @property
    def is_default(self) -> bool:
        return self.name == DEFAULT_ROUTE

    @property
    def promotable(self) -> list[str]:
        """Names of who could be the first to answer."""
        first = self.servers[0].name if self.servers else ""
        is_shared = any(server.share for server in self.servers)
        return [s.name for s in self.servers if (s.name != first or is_shared) and not self.is_default]

    def as_object(self) -> dict[str, Any]:
        """Return it for a program."""
        return {
            "route": self.name,
            "for": self.what,
            "servers": [{name: getattr(s, name) for name in s.__slots__} for s in self.servers],
            "tables": [{name: getattr(t, name) for name in t.__slots__} for t in self.tables],
            "decided": self.is_decided,
            "split": self.split,
        }


@dataclass(frozen=True, slots=True)
class MovedNow:
    """Who answers for those that have moved, as a route, and how many addresses and domains name each server."""

    generation: int
    entries: Mapping[str, int]
    route: RouteNow


@dataclass(frozen=True, slots=True)
class RoutesNow:
    """All routes, the default one last, and how many recipients were put off in a day, since messages were split.

    ``hosts`` says where the settings of hosts, or the maps of who has ``moved`` that they go by, differ; ``moved`` is
    None where nobody ever has.
    """

    routes: Sequence[RouteNow]
    put_off: int
    disagreements: Sequence[str]
    hosts: Sequence[str] = ()
    moved: MovedNow | None = None


def look(connection: Any, settings: Settings) -> RoutesNow:
    """Return how the routes stand now. Raises RedisError."""
    seen = decisions.view(connection)
    day = flow.total(flow.read(connection, flow.HOUR, _HOURS, changes.now(connection)))
    topology = promotion.latest(seen, settings)
    routes = [_route(route, settings, seen, topology, day) for route in route_roles.table(settings, topology)]
    primary = promotion.current(seen, settings)
    backups = tuple(backup.name for backup in backups_now(settings, topology))
    default = Route(DEFAULT_ROUTE, Match(), (primary,) if primary else (), backups=backups)
    routes.append(_route(default, settings, seen, topology, day))
    told = list(route_roles.disagreements(settings, topology)) if topology else []
    hosts = [*differences(seen), *(f"who has moved: {text}" for text in behind_with_moves(seen))]
    moved = _moved(seen.moves, settings, seen, day) if seen.moves else None
    return RoutesNow(routes, day.split.get("defer", 0), told, hosts, moved)


def _moved(state: MapState, settings: Settings, seen: View, day: Flow) -> MovedNow:
    entries = dict(sorted(state.servers.items()))
    servers = [_server(MOVED_ROUTE, name, seen, day, answers=True) for name in entries]
    who = ", ".join(f"{name} {number}" for name, number in entries.items())
    what = f"{count(state.count, 'address or domain', 'addresses and domains')}, before all routes"
    route = RouteNow(MOVED_ROUTE, what, who or "nobody any more", servers, (), True, settings.routes.split)
    return MovedNow(state.generation, entries, route)


def _route(route: Route, settings: Settings, seen: View, last: Topology | None, day: Flow) -> RouteNow:
    weights = dict(zip(route.servers, route.weights, strict=True)) if route.weights else {}
    whole = sum(weights.values())
    servers = [
        _server(
            route.name,
            name,
            seen,
            day,
            answers=name in route.answering,
            copied=name in route.copied,
            share=weights[name] / whole if name in weights else None,
        )
        for name in dict.fromkeys((*route.servers, *route.backups))
    ]
    tables = [_table(settings, file) for file in dict.fromkeys(route.files)]
    is_decided = last is not None and route.name in last.now.routes
    what = "what no other matches" if route.name == DEFAULT_ROUTE else route.in_words().partition(" -> ")[0]
    who = answering(route) if route.servers else "each host's settings say"
    return RouteNow(route.name, what, who, servers, tables, is_decided, route.split)


def _server(
    route: str, name: str, seen: View, day: Flow, *, answers: bool, copied: bool = False, share: float | None = None
) -> ServerOnRoute:
    found = day.routes.get((route, name), RouteFlow())
    away = tuple(beat.label for beat in seen.living if name in beat.down)
    return ServerOnRoute(name, answers, copied, share, away, found.accepted, found.refused, day.failovers.get(name, 0))


def _table(settings: Settings, file: Any) -> TableOnRoute:
    held = table_store.standing(settings.state_dir, file)
    if held is None or not held.name:
        return TableOnRoute(str(file), 0, 0.0, "it has not been read on this host")
    return TableOnRoute(str(file), held.keys, held.changed, held.fault)
