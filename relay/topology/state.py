"""Who is the primary since when, by whose decision; and a decision that is being prepared. Their stored forms.

Names and roles only: what a name stands for, each host's settings say. An epoch counts the decisions; 0 is before the
first, when each host's settings say who is the primary. Of routes a decision has only those that somebody has decided
about; a version that knows none of that reads the rest. What is read back is data: what is not in every field what it
must be, is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from relay.mail.ids import is_destination_name, is_route_name
from relay.mail.stored import number, parsed, shown
from relay.mail.text import printable

_MOST = 1 << 53  # what JSON's numbers keep whole
_MOST_ORDINAL = 1 << 40  # far below: the next ones must be numbers that are kept, too
LONGEST = 64 << 10  # octets of a stored form
_CUT = 300  # characters of a text
_OF_A_ROUTE = ("route", "servers")  # of an intent
_Read = TypeVar("_Read")


class Unreadable(ValueError):
    """What is stored makes no sense; the text says why."""


@dataclass(frozen=True, slots=True)
class RouteRoles:
    """Who answers on a route, who comes first first, or by weight, and who gets copies: in place of its settings.

    ``weights``, if there are any, belong to ``servers`` one by one; 0 takes none. ``copies`` is as in the settings.
    """

    servers: tuple[str, ...]
    weights: tuple[float, ...] = ()
    backups: tuple[str, ...] = ()
    copies: str = "backups"

    @property
    def answering(self) -> tuple[str, ...]:
        """Names of the servers that get any mail as the primary."""
        if not self.weights:
            return self.servers
        return tuple(name for name, weight in zip(self.servers, self.weights, strict=True) if weight)

    @property
    def named(self) -> frozenset[str]:
        return frozenset((*self.servers, *self.backups))

    def in_words(self) -> str:
        """Return who answers: "a, then b", or "a=3 b=1"."""
        if self.weights:
            return " ".join(f"{n}={w:g}" for n, w in zip(self.servers, self.weights, strict=True))
        return ", then ".join(self.servers)


@dataclass(frozen=True, slots=True)
class Decision:
    """Who was made the primary, and by whom. ``at`` is seconds since the epoch by Redis's clock.

    ``routes`` has the roles of each route that was decided about; the others are as each host's settings say.
    """

    epoch: int
    primary: str
    backups: tuple[str, ...] = ()
    by: str = ""
    at: float = 0.0
    reason: str = ""
    routes: dict[str, RouteRoles] = field(default_factory=dict)

    def as_record(self) -> dict[str, Any]:
        """Return what is stored of it."""
        record = asdict(self)
        if not self.routes:
            del record["routes"]
        return record


@dataclass(frozen=True, slots=True)
class Topology:
    """The decision that holds, and the one before: of the settings, with epoch 0, where it was the first."""

    now: Decision
    previous: Decision

    @property
    def epoch(self) -> int:
        return self.now.epoch

    @property
    def primary(self) -> str:
        return self.now.primary

    def in_words(self) -> str:
        """Return what whoever decided has done: "promoted new", "set shop: a=1 b=9"."""
        now, before = self.now, self.previous
        if now.primary != before.primary or not self.changed:
            return f"promoted {now.primary}"
        return f"set {self._routes_of(now)}"

    @property
    def undone(self) -> str:
        """What an undo goes back to: "old", "shop: a=1 b=9"; "" where it has nothing to undo."""
        before = self.previous
        return before.primary if self.now.primary != before.primary else self._routes_of(before)

    @property
    def changed(self) -> list[str]:
        """Names of the routes that it was about."""
        now, before = self.now.routes, self.previous.routes
        return [name for name in now | before if now.get(name) != before.get(name)]

    def _routes_of(self, decision: Decision) -> str:
        roles = decision.routes
        return ", ".join(f"{n}: {roles[n].in_words() if n in roles else 'as the settings say'}" for n in self.changed)

    def to_json(self) -> str:
        return json.dumps({**self.now.as_record(), "previous": self.previous.as_record()})

    @classmethod
    def from_json(cls, data: str | bytes) -> Topology:
        """Read the stored form. Raises Unreadable."""
        return read_stored(data, lambda found: cls(_decision(found), _decision(found["previous"])))


@dataclass(frozen=True, slots=True)
class Intent:
    """A promotion that is being prepared: every relay process is to say whether it could use the new primary.

    ``epoch`` is the one that would begin; ``old`` the primary that would be a backup, "" where nobody knows it. With a
    ``route`` it is about that one alone, and all of ``servers`` are to be used there.
    """

    id: str
    epoch: int
    primary: str
    old: str
    by: str
    at: float
    seconds: float  # until it ends by itself
    route: str = ""
    servers: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value or name not in _OF_A_ROUTE})

    @classmethod
    def from_json(cls, data: str | bytes) -> Intent:
        """Read the stored form. Raises Unreadable."""
        return read_stored(data, _intent)


def read_stored(data: str | bytes, make: Callable[[Any], _Read], longest: int = LONGEST) -> _Read:
    """Read a stored form of at most so many octets; ``make`` is given what was parsed. Raises Unreadable."""
    if len(data) > longest:
        raise Unreadable("it is too long")
    try:
        return make(parsed(data))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unreadable(printable(f"{type(error).__name__}: {error}")[:_CUT]) from error


def read_or_why(data: Any, read: Callable[[bytes | str], _Read]) -> tuple[_Read | None, str]:
    """Read what a key held: None where it was not there, or with why it makes no sense.

    An error of Redis stands for another type of key.
    """
    if data is None or data == "":
        return None, ""
    if not isinstance(data, bytes | str):
        return None, "another type of key stands there"
    try:
        return read(data), ""
    except Unreadable as error:
        return None, str(error)


def _object(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise TypeError("no object")
    return found


def _decision(given: Any) -> Decision:
    found = _object(given)
    routes = _object(found.get("routes", {}))
    return Decision(
        epoch=ordinal(found["epoch"]),
        primary=_name(found["primary"]),
        backups=_names(found["backups"]),
        by=shown(found.get("by", "")),
        at=number(found.get("at", 0)),
        reason=shown(found.get("reason", "")),
        routes={_route(name): _roles(_object(roles)) for name, roles in routes.items()},
    )


def _roles(found: dict[str, Any]) -> RouteRoles:
    given = found.get("weights", [])
    if not isinstance(given, list) or found.get("copies", "backups") not in {"backups", "others"}:
        raise TypeError("the roles of a route")
    servers, weights = _names(found["servers"]), tuple(map(number, given))
    if not servers or len(set(servers)) != len(servers) or (weights and len(weights) != len(servers)):
        raise TypeError("the servers of a route")
    if weights and (not any(weights) or not all(is_weight(weight) for weight in weights)):
        raise TypeError("the weights of a route")
    return RouteRoles(servers, weights, _names(found.get("backups", [])), found.get("copies", "backups"))


def is_weight(value: float) -> bool:
    """Return whether a server may have this weight."""
    return 0 <= value < 1e9


def _intent(given: Any) -> Intent:
    found = _object(given)
    return Intent(
        id=shown(found["id"]),
        epoch=count(found["epoch"]),
        primary=_name(found["primary"]),
        old=_name(found["old"]) if found["old"] else "",
        by=shown(found["by"]),
        at=number(found["at"]),
        seconds=number(found["seconds"]),
        route=_route(found["route"]) if found.get("route") else "",
        servers=_names(found.get("servers", [])),
    )


def _name(value: Any) -> str:
    if not is_destination_name(value):
        raise TypeError("no name of a server")
    return value


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError("no list of servers")
    return tuple(map(_name, values))


def _route(value: Any) -> str:
    if not is_route_name(value):
        raise TypeError("no name of a route")
    return value


def count(value: Any) -> int:
    """Return a whole number, 0 or more. Raises TypeError."""
    if type(value) is not int or not 0 <= value < _MOST:
        raise TypeError("no count")
    return value


def ordinal(value: Any) -> int:
    """Return the number of a decision or a generation, of which there will be others. Raises TypeError."""
    if count(value) >= _MOST_ORDINAL:
        raise TypeError("no number of a decision")
    return int(value)
