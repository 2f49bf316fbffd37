"""The groups of divergence as they are read (divergence.py counts them, divergence_upkeep.py changes them).

What Redis says is data: a group that makes no sense is read as far as it does. An acknowledged group is open again by
itself when its time is over, when a domain turns up that was not in it then, or when an hour has over three times the
hourly rate of then, and at least ten: that follows from what is stored, whoever reads it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from relay.ledger import changes, keys
from relay.ledger.divergence import DEFERRED, KINDS, MOST_OUTAGES, NOISE, OTHERS, place_of
from relay.mail import encryption, refusal_class
from relay.mail.ids import is_id, text
from relay.mail.stored import LARGEST, LATEST, figure, moment, number, parsed, tally
from relay.mail.text import count

HOUR = 3600
_RATE_TIMES, _RATE_LEAST = 3, 10  # an hour that reopens: over so many times the rate of then, and at least so many
_GROUP = re.compile(r"[0-9a-f]{12}|" + "|".join(sorted(set(OTHERS.values()))))
_HOUR_FIELD = re.compile(rb"h[0-9]{1,9}")


def is_group(value: object) -> bool:
    """Say whether this can be the key of a group."""
    return isinstance(value, str) and _GROUP.fullmatch(value) is not None


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """An operator's word that a group does not count until it ends, and what the group was then."""

    by: str
    note: str
    at: float
    until: float
    domains: tuple[str, ...] = ()
    more_domains: int = 0
    rate: float = 0.0  # recipients an hour
    counted: int = 0  # in the hour of then

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: bytes | None) -> Acknowledgement | None:
        """Read the stored form; what makes no sense is none: the group is open."""
        try:
            found = parsed(data or b"null")
            return found and cls(
                by=str(found["by"]),
                note=str(found["note"]),
                at=number(found["at"]),
                until=number(found["until"]),
                domains=tuple(map(str, found["domains"])),
                more_domains=int(number(found["more_domains"])),
                rate=number(found["rate"]),
                counted=int(number(found["counted"])),
            )
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True, slots=True)
class Group:
    """One group: equal replies about recipients whom the primary took. Times are seconds since the epoch.

    ``seen`` is how many recipients, ever; ``open`` how many have no end yet; the others were delivered later
    (``resolved``, or ``noise`` when that was soon), ``dropped`` by an operator or by age, or ``moved``.
    """

    destination: str
    key: str
    kind: str
    stage: str
    code: int
    status: str
    text: str
    reply: str  # one as it came; "" where mail is sealed
    reason: str  # the name of its class
    own: bool
    soft: bool
    first: float
    last: float
    seen: int
    open: int
    resolved: int
    noise: int
    dropped: int
    moved: int
    messages: int
    more: int  # recipients that are not among those kept
    turns: int
    domains: Mapping[str, int]
    more_domains: int
    hours: Mapping[int, int]  # hour since the epoch -> recipients
    ack: Acknowledgement | None

    @property
    def advice(self) -> str:
        """What to do at the new server."""
        return refusal_class.named(self.reason).advice

    @property
    def is_rest(self) -> bool:
        """Whether it holds what came when there were groups enough."""
        return self.key in OTHERS.values()

    @property
    def is_noise(self) -> bool:
        """Whether all that was put off has been delivered soon: greylisting, rate limits."""
        return self.kind == DEFERRED and not self.open and self.noise > 0 and self.noise >= self.resolved

    def reopened(self, now: float) -> str:
        """Return why an acknowledgement does not hold any more, "" while it does or where there is none."""
        ack = self.ack
        if ack is None:
            return ""
        if now >= ack.until:
            return "its time is over"
        fresh = sorted(set(self.domains).difference(ack.domains)) if not ack.more_domains else []
        if fresh or (self.more_domains and not ack.more_domains):
            return f"a domain that was not in it: {fresh[0] if fresh else 'one of many'}"
        most = max(_RATE_LEAST - 1, _RATE_TIMES * ack.rate)
        since = int(ack.at // HOUR)
        for hour, seen in self.hours.items():
            fresh_ones = seen - ack.counted * (hour == since)
            if since <= hour <= now // HOUR and fresh_ones > most:
                return f"{count(fresh_ones, 'recipient')} in an hour, {ack.rate:.1f} were usual"
        return ""

    def is_acknowledged(self, now: float) -> bool:
        return self.ack is not None and not self.reopened(now)

    def counts(self, now: float) -> bool:
        """Say whether it is open and not acknowledged."""
        return self.open > 0 and not self.is_acknowledged(now)

    def rate(self, now: float) -> float:
        """Return recipients an hour, of the last day or since it began."""
        last = int(now // HOUR)
        recent = sum(seen for hour, seen in self.hours.items() if last - 24 < hour <= last)
        return recent / min(24.0, max(1.0, (now - self.first) / HOUR))

    def trend(self, now: float, hours: int = 24) -> list[int]:
        """Return the recipients of each of the last hours."""
        last = int(now // HOUR)
        return [self.hours.get(hour, 0) for hour in range(last - hours + 1, last + 1)]


# Reading ----------------------------------------------------------------------------------------------------------


def groups(connection: Any, destination: str) -> list[Group]:
    """Return the groups of a destination, the one seen last first."""
    found = connection.zrevrange(keys.DIVERGENCE + destination, 0, -1)
    names = [name for name in map(text, found) if is_group(name)]
    with connection.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hgetall(keys.of_group(keys.DIVERGED, destination, name))
        answers = pipe.execute(raise_on_error=False)
    there = ((name, fields) for name, fields in zip(names, answers, strict=True) if fields and isinstance(fields, dict))
    return [_group(destination, name, fields) for name, fields in there]


def group(connection: Any, destination: str, key: str) -> Group | None:
    """Return one group, None where there is none."""
    if not is_group(key) or connection.zscore(keys.DIVERGENCE + destination, key) is None:
        return None
    return _group(destination, key, connection.hgetall(keys.of_group(keys.DIVERGED, destination, key)))


@dataclass(frozen=True, slots=True)
class Numbers:
    """A destination's groups in numbers: recipients that are open and not acknowledged by kind, and all of the rest."""

    open: Mapping[str, int]
    groups: int
    acknowledged: int
    noise: int


def numbers(connection: Any, destination: str) -> Numbers:
    """Return a destination's groups in numbers; only those that are acknowledged are read whole."""
    now = changes.now(connection)
    names = [name for name in map(text, connection.zrange(keys.DIVERGENCE + destination, 0, -1)) if is_group(name)]
    with connection.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hmget(keys.of_group(keys.DIVERGED, destination, name), "kind", "open", NOISE, "ack")
        answers = pipe.execute(raise_on_error=False)
    opened: dict[str, int] = {}
    acknowledged = noise = 0
    for name, fields in zip(names, answers, strict=True):
        if not isinstance(fields, list):
            continue
        kind, count, noisy, ack = fields
        noise += _count(noisy)
        found = group(connection, destination, name) if ack else None
        if found is not None and found.is_acknowledged(now):
            acknowledged += found.open > 0
        elif (shown := text(kind or b"")) in KINDS:
            opened[shown] = opened.get(shown, 0) + _count(count)
    return Numbers(opened, len(names), acknowledged, noise)


def examples(connection: Any, destination: str, key: str) -> list[tuple[str, float]]:
    """Return ids of messages of a group and when each was counted, the first and the last ones, the oldest first."""
    found = connection.zrange(keys.of_group(keys.EXAMPLES, destination, key), 0, -1, withscores=True)
    return [(text(name), moment(at)) for name, at in found if is_id(text(name))]


def whom(connection: Any, destination: str, key: str, most: int) -> list[tuple[str, int]]:
    """Return the recipients of a group and how often each was counted, the most frequent first.

    A sealed one that cannot be opened here is its pseudonym.
    """
    found = connection.zrevrange(keys.of_group(keys.WHOM, destination, key), 0, most - 1, withscores=True)
    names = [name for name, _ in found]
    sealed = connection.hmget(keys.of_group(keys.SEALED, destination, key), names) if names else []
    shown = []
    for (name, times), word in zip(found, sealed, strict=True):
        address = text(name)
        if word is not None:
            with contextlib.suppress(encryption.MissingKey, encryption.Forged):
                address = encryption.open_word(place_of(destination), word)
        shown.append((address, tally(times)))
    return shown


def domains(connection: Any, destination: str) -> dict[str, tuple[int, int, int, int]]:
    """Return by domain how many recipients a destination took, put off and refused, and when it last heard of it."""
    found = {}
    for domain, value in connection.hgetall(keys.DOMAINS + destination).items():
        parts = text(value).split(",")
        if len(parts) == 4 and all(part.isdecimal() and len(part) < 17 for part in parts):
            taken, deferred, refused, last = map(int, parts)
            found[text(domain)] = (taken, deferred, refused, last)
    return found


@dataclass(frozen=True, slots=True)
class Outage:
    """A time in which a destination was paused; ``end`` is 0 while it goes on."""

    begin: float
    end: float
    reason: str


def outages(connection: Any, destination: str, since: float = 0.0) -> list[Outage]:
    """Return the outages that had not ended by then, the last one first."""
    found = []
    for item in connection.lrange(keys.OUTAGES + destination, 0, MOST_OUTAGES - 1):
        try:
            record = parsed(item)
            outage = Outage(number(record["begin"]), number(record["end"]), str(record["reason"]))
        except (ValueError, KeyError, TypeError):
            continue
        if not outage.end or outage.end >= since:
            found.append(outage)
    return found


def _group(destination: str, key: str, fields: Mapping[bytes, bytes]) -> Group:
    named: dict[str, bytes] = {}
    domains: dict[str, int] = {}
    hours: dict[int, int] = {}
    for name, value in fields.items():  # most of them are domains and hours
        if name.startswith(b"d:"):
            domains[text(name[2:])] = _count(value)
        elif _HOUR_FIELD.fullmatch(name):
            hours[int(name[1:])] = _count(value)
        else:
            named[text(name)] = value

    def word(name: str) -> str:
        return text(named.get(name, b""))

    def count(name: str) -> int:
        return _count(named.get(name))

    kind = word("kind")
    return Group(
        destination=destination,
        key=key,
        kind=kind if kind in KINDS else KINDS[0],
        stage=word("stage"),
        code=count("code"),
        status=word("status"),
        text=word("text") if key not in OTHERS.values() else "replies of all other kinds",
        reply=word("reply"),
        reason=refusal_class.named(word("class")).name,
        own=bool(count("own")),
        soft=bool(count("soft")),
        first=figure(named.get("first"), LATEST),
        last=figure(named.get("last"), LATEST),
        seen=count("seen"),
        open=count("open"),
        resolved=count("resolved"),
        noise=count(NOISE),
        dropped=count("dropped"),
        moved=count("moved"),
        messages=count("messages"),
        more=count("more"),
        turns=count("turns"),
        domains=domains,
        more_domains=count("more_domains"),
        hours=hours,
        ack=Acknowledgement.from_json(named.get("ack")),
    )  # fmt: skip


def _count(value: bytes | None) -> int:
    return int(figure(value, LARGEST))
