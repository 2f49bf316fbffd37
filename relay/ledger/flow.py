"""The flow of mail: what all hosts together saw in each ten seconds, minute and hour, as it is stored and read.

A field of a hash is a word, or words with a blank between them: "accepted", "delivered new", "seconds 0.05 new". What a
later version adds is left out by this one; a field or a number that is none counts nothing. Times are Redis's own.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from relay.batches import batched
from relay.ledger import keys
from relay.ledger.scripts import script
from relay.mail.ids import is_destination_name, is_route_name, text

_BASE_SECONDS = 7 * 86400
_PAGE = 200
_LARGEST = 1 << 53
MAXIMA = frozenset({"largest", "most"})  # of these fields the larger one counts, not the sum


@dataclass(frozen=True, slots=True)
class Unit:
    """A length of time that is counted by itself: its name, how it stands in a key, and how long it is kept."""

    name: str
    seconds: int
    form: str
    kept: int

    def start(self, at: float) -> int:
        """Return when the one began that a moment is in."""
        return int(at) // self.seconds * self.seconds

    def key(self, start: int) -> str:
        return keys.FLOW + time.strftime(self.form, time.gmtime(start))


MOMENT = Unit("moment", 10, "%Y-%m-%dT%H:%M:%S", 900)
MINUTE = Unit("minute", 60, "%Y-%m-%dT%H:%M", 25 * 3600)
HOUR = Unit("hour", 3600, "%Y-%m-%dT%H", 35 * 86400)
UNITS = (MOMENT, MINUTE, HOUR)


@dataclass(frozen=True, slots=True)
class Buckets:
    """How long things took: bound of a bucket in seconds -> how many are in it, and in no smaller one."""

    counts: Mapping[float, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def quantile(self, share: float) -> float | None:
        """Return the seconds within which that share was done, None of nothing.

        Within a bucket they are taken to be spread evenly; what is in the last one, which has no bound, took at least
        the bound before it.
        """
        wanted, below, lower = share * self.total, 0, 0.0
        if not self.total:
            return None
        for bound in sorted(self.counts):
            count = self.counts[bound]
            if count and below + count >= wanted:
                return lower if math.isinf(bound) else lower + (bound - lower) * max(0.0, wanted - below) / count
            below += count
            lower = bound if not math.isinf(bound) else lower
        return lower


@dataclass(frozen=True, slots=True)
class DestinationFlow:
    """What became of the copies for one backup, and how many there were to come (``copied``).

    ``seconds`` are from dot to reply, ``age`` is from acceptance to delivery.
    """

    delivered: int = 0
    deferred: int = 0
    failed: int = 0
    trouble: int = 0
    copied: int = 0
    seconds: Buckets = field(default_factory=Buckets)
    age: Buckets = field(default_factory=Buckets)

    @property
    def seen(self) -> int:
        """How many copies met their end."""
        return self.delivered + self.failed


@dataclass(frozen=True, slots=True)
class RouteFlow:
    """What one server has taken, and refused at its end, of one route."""

    accepted: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class Flow:
    """What was seen in a stretch of time that began at ``start``; ``seconds`` is the primary's time from dot to reply.

    ``largest`` is the largest message in octets, ``most`` the most recipients of one, of those that were accepted.
    ``routes`` is by route and server, ``split`` recipients by what was done with them, ``failovers`` turns by server.
    ``answered`` is what ``seconds`` is, by server: of messages that took a route.
    """

    start: float
    length: float
    accepted: int = 0
    refused_4xx: int = 0
    refused_5xx: int = 0
    own: int = 0
    uncertain: int = 0
    recipients: int = 0
    recipients_refused: int = 0
    octets: int = 0
    lost: int = 0
    spooled: int = 0
    largest: int = 0
    most: int = 0
    uses: Mapping[str, int] = field(default_factory=dict)
    seconds: Buckets = field(default_factory=Buckets)
    destinations: Mapping[str, DestinationFlow] = field(default_factory=dict)
    routes: Mapping[tuple[str, str], RouteFlow] = field(default_factory=dict)
    split: Mapping[str, int] = field(default_factory=dict)
    failovers: Mapping[str, int] = field(default_factory=dict)
    answered: Mapping[str, Buckets] = field(default_factory=dict)

    @property
    def refused(self) -> int:
        """Messages that were answered with a refusal at their end, whoever's."""
        return self.refused_4xx + self.refused_5xx + self.own

    def of(self, destination: str) -> DestinationFlow:
        return self.destinations.get(destination, _NOTHING)

    def seconds_of(self, servers: Iterable[str]) -> Buckets:
        """Return how long these servers took to reply; where none is known by itself, all that answered."""
        found: Buckets = _sum([Buckets(), *(self.answered.get(name, Buckets()) for name in servers)])
        return found if self.answered else self.seconds


_NOTHING = DestinationFlow()
_OTHERS = {"start", "length", "uses", "seconds", "destinations", "routes", "split", "failovers", "answered"}
_PLAIN = {name for name in Flow.__slots__ if name not in _OTHERS}
_MAPS = ("uses", "split", "failovers")  # that are by one name
_RESULTS = ("delivered", "deferred", "failed", "trouble", "copied")
_OF_ROUTES = {"accepted on a route": "accepted", "refused on a route": "refused"}

Counted = Mapping[str, int]  # field -> number


def add(pipe: Any, identity: str, note: bytes, sums: Counted, maxima: Counted, at: float) -> None:
    """Add what was counted to the stretches of time that ``at`` is in, and note for ``base`` how far that went."""
    arguments: list[str | bytes | int] = [keys.FLOW_BASE + identity, note, _BASE_SECONDS]
    for unit in UNITS:
        arguments += (unit.key(unit.start(at)), unit.kept, len(sums))
        arguments += (part for pair in sums.items() for part in pair)
        arguments.append(len(maxima))
        arguments += (part for pair in maxima.items() for part in pair)
    pipe.eval(script("flow"), 0, *arguments)


def base(connection: Any, identity: str) -> bytes | None:
    """Return the last note of an installation."""
    note: bytes | None = connection.get(keys.FLOW_BASE + identity)
    return note


def read(connection: Any, unit: Unit, count: int, at: float) -> list[Flow]:
    """Return the last so many stretches of time, oldest first; the last one is that which ``at`` is in."""
    end = unit.start(at)
    starts = range(end - (count - 1) * unit.seconds, end + 1, unit.seconds)
    found: list[Flow] = []
    for page in batched(starts, _PAGE):
        pipe = connection.pipeline(transaction=False)
        for start in page:
            pipe.hgetall(unit.key(start))
        hashes = pipe.execute(raise_on_error=False)
        found += [_read(start, unit.seconds, fields) for start, fields in zip(page, hashes, strict=True)]
    return found


def total(flows: Sequence[Flow]) -> Flow:
    """Return several stretches of time as one."""
    if not flows:
        return Flow(0.0, 0.0)
    start, end = flows[0].start, flows[-1].start + flows[-1].length
    largest = {name: max(getattr(flow, name) for flow in flows) for name in MAXIMA}
    summed: Flow = _sum(flows)
    return replace(summed, start=start, length=end - start, **largest)


def _sum(many: Sequence[Any]) -> Any:
    """Return one number for several, and one of what has numbers in its fields, or by keys."""
    first = many[0]
    if isinstance(first, Mapping):
        by_key: dict[Any, list[Any]] = {}
        for one in many:
            for key, value in one.items():
                by_key.setdefault(key, []).append(value)
        return {key: _sum(values) for key, values in sorted(by_key.items())}
    if is_dataclass(first):
        kind: Any = type(first)
        return kind(**{f.name: _sum([getattr(one, f.name) for one in many]) for f in fields(first)})
    return sum(many)


def _read(start: float, length: float, fields: Any) -> Flow:
    plain: dict[str, int] = {}
    maps: dict[str, dict[str, int]] = {name: {} for name in _MAPS}
    routes: dict[tuple[str, str], dict[str, int]] = {}
    results: dict[str, dict[str, int]] = {}
    times: dict[tuple[str, str], dict[float, int]] = {}
    for name, value in fields.items() if isinstance(fields, dict) else ():  # another type of key: nothing
        found = _field(name)
        if found is None or not value.isdigit() or (number := int(value[:17])) > _LARGEST:
            continue
        word, destination, bound = found
        if bound:
            times.setdefault((word, destination), {})[bound] = number
        elif word in maps:
            maps[word][destination] = number
        elif word in _OF_ROUTES:
            route, _, server = destination.partition(" ")
            routes.setdefault((route, server), {})[_OF_ROUTES[word]] = number
        elif destination:
            results.setdefault(destination, {})[word] = number
        else:
            plain[word] = number
    names = sorted({*results, *(name for word, name in times if name and word != "answered")})
    destinations = {
        name: DestinationFlow(
            **results.get(name, {}),
            seconds=Buckets(times.get(("seconds", name), {})),
            age=Buckets(times.get(("age", name), {})),
        )
        for name in names
    }
    return Flow(
        start,
        length,
        **plain,
        seconds=Buckets(times.get(("seconds", ""), {})),
        destinations=destinations,
        routes={key: RouteFlow(**counts) for key, counts in routes.items()},
        answered={name: Buckets(counts) for (word, name), counts in times.items() if word == "answered"},
        uses=maps["uses"],
        split=maps["split"],
        failovers=maps["failovers"],
    )


@functools.lru_cache(maxsize=8192)  # few names, and thousands of hashes with each
def _field(name: bytes) -> tuple[str, str, float] | None:
    """Return a field's word, the destination or extension and the bound that it names, "" and 0 where it does not."""
    match text(name).split(" "):
        case [word] if word in _PLAIN:
            return word, "", 0.0
        case ["uses" | "split" as word, what]:
            return word, what, 0.0
        case ["failovers", server] if is_destination_name(server):
            return "failovers", server, 0.0
        case ["accepted" | "refused" as word, route, server] if is_route_name(route) and is_destination_name(server):
            return f"{word} on a route", f"{route} {server}", 0.0
        case ["seconds", word] if bound := _bound(word):
            return "seconds", "", bound
        case [word, destination] if word in _RESULTS and is_destination_name(destination):
            return word, destination, 0.0
        case [("seconds" | "age" | "answered") as word, figure, destination] if is_destination_name(destination):
            bound = _bound(figure)
            return (word, destination, bound) if bound else None
    return None


def _bound(word: str) -> float | None:
    try:
        bound = float(word)
    except ValueError:
        return None
    return bound if bound > 0 else None  # neither is NaN
