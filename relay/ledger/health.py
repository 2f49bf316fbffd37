"""How a destination stands, as the hash ``smtpdup:health:<name>`` has it: what its workers see, what operators want.

Workers write whether it is paused; operators hold it, which ends by itself or is ended, and throttle it. How long it
was held is kept as intervals: that time does not count when a copy is given up for its age. Whoever can write to Redis
can write anything there: what makes no sense counts as not said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from relay.ledger import keys
from relay.ledger.scripts import script
from relay.mail.ids import text
from relay.mail.stored import LATEST, figure, parsed
from relay.mail.text import count, printable

FIELDS = ("state", "reason", "probe_at", "held", "held_past", "rate", "connections")
_LONGEST = 1000  # characters of a reason that are read
_MOST_PAST = 1000  # intervals that are read; no more than 100 are kept
MOST_RATE, MOST_CONNECTIONS = 100_000.0, 10_000

Intervals = tuple[tuple[float, float], ...]  # begin and end, seconds since the epoch


@dataclass(frozen=True, slots=True)
class Hold:
    """An operator's hold: since when, until when (0: until it is released), who and why."""

    since: float
    until: float
    reason: str
    by: str

    def is_on(self, now: float) -> bool:
        """Whether it has not ended by itself."""
        return not self.until or now < self.until


@dataclass(frozen=True, slots=True)
class Health:
    """A destination as its workers and its operators have it.

    ``reason`` and ``probe_at`` say something only where it is paused. ``hold`` may have ended by itself: ``is_held``
    tells. ``rate`` is in copies a second and ``connections`` over all workers; 0 is no bound.
    """

    is_paused: bool = False
    reason: str = ""
    probe_at: float | None = None
    hold: Hold | None = None
    past: Intervals = ()
    rate: float = 0.0
    connections: int = 0

    @classmethod
    def read(cls, connection: Any, destination: str) -> Health:
        """Ask Redis (a synchronous client)."""
        return cls.of(connection.hgetall(keys.HEALTH + destination))

    @classmethod
    def of(cls, fields: Mapping[bytes, bytes | None]) -> Health:
        """Read the hash."""
        is_paused = fields.get(b"state") == b"paused"
        return cls(
            is_paused,
            _words(text(fields.get(b"reason") or b"")) if is_paused else "",
            moment(fields.get(b"probe_at")) if is_paused else None,
            _hold(fields.get(b"held")),
            _intervals(fields.get(b"held_past")),
            figure(fields.get(b"rate"), MOST_RATE),
            int(figure(fields.get(b"connections"), MOST_CONNECTIONS)),
        )

    def is_held(self, now: float) -> bool:
        """Whether an operator holds it, by Redis's clock."""
        return self.hold is not None and self.hold.is_on(now)

    def held_seconds(self, since: float, now: float) -> float:
        """Return for how long it was held between two times: copies do not age then."""
        if self.hold is None and not self.past:
            return 0.0
        spans = list(self.past)
        if self.hold is not None:
            spans.append((self.hold.since, min(self.hold.until or now, now)))
        total, reached = 0.0, since
        for begin, end in sorted(spans):
            length = min(end, now) - max(begin, reached)  # what overlaps counts once
            if length > 0:
                total += length
                reached = min(end, now)
        return total

    @property
    def bounds(self) -> str:
        """The bounds on its speed in words: "5/s and 2 connections"; "" for none."""
        words = [f"{self.rate:g}/s"] * bool(self.rate) + [count(self.connections, "connection")] * bool(
            self.connections
        )
        return " and ".join(words)

    def describe(self, now: float) -> tuple[str, str]:
        """Return its state in a word, and why: what an operator wants comes before what the workers see."""
        state, reason = ("paused", self.reason) if self.is_paused else ("ok", "")
        if bounds := self.bounds:
            reason = "; ".join(filter(None, (reason, f"throttled to {bounds}")))
        if self.hold is not None and self.hold.is_on(now):
            also = f"{state}: {reason}" if reason else state
            reason = "; ".join(filter(None, (f"by {self.hold.by}: {self.hold.reason}", also if also != "ok" else "")))
            state = "held"
        return state, reason


def hold(connection: Any, destination: str, seconds: float, reason: str, by: str) -> None:
    """Hold a destination for so many seconds from now, 0 until it is released; one that is held stays so since then."""
    connection.eval(script("hold_destination"), 1, keys.HEALTH + destination, "hold", repr(seconds), reason, by)


def release(connection: Any, destination: str) -> bool:
    """End a hold. Returns whether there was one that had not ended."""
    return bool(connection.eval(script("hold_destination"), 1, keys.HEALTH + destination, "release", "0", "", ""))


def throttle(pipe: Any, destination: str, rate: float, connections: int) -> None:
    """Bound the copies a second and the connections of all workers together; 0 is no bound."""
    key = keys.HEALTH + destination
    for name, value in (("rate", rate), ("connections", connections)):
        if value:
            pipe.hset(key, name, repr(value))
        else:
            pipe.hdel(key, name)


def ask_grant(pipe: Any, destination: str, worker: str, rate: float, wanted: int) -> None:
    """Ask for leave to begin so many copies, and say that this worker is there. Result for ``granted``."""
    pipe.eval(script("grant"), 2, keys.THROTTLE + destination, keys.THROTTLED + destination, worker, repr(rate), wanted)


def granted(result: Any) -> tuple[int, int, int]:
    """Read the result: how many copies may begin, and which of how many workers this one is."""
    count, place, workers = (int(value) for value in result)
    return max(0, count), max(0, place), max(1, workers)


def moment(value: bytes | None) -> float | None:
    """Return a time, seconds since the epoch; None for what is none."""
    return figure(value, LATEST) or None


def _words(value: object) -> str:
    return printable(value[:_LONGEST]) if isinstance(value, str) else ""


def _hold(value: bytes | None) -> Hold | None:
    """Read ``[since, until, reason, by]``."""
    try:
        since, until, reason, by = parsed(value or b"")
        begun, end = float(since), float(until)
    except (ValueError, TypeError, OverflowError):
        return None
    if not (0 < begun < LATEST and 0 <= end < LATEST):
        return None
    return Hold(begun, end, _words(reason), _words(by))


def _intervals(value: bytes | None) -> Intervals:
    try:
        found = [(float(begin), float(end)) for begin, end in parsed(value or b"[]")[:_MOST_PAST]]
    except (ValueError, TypeError, KeyError, OverflowError):
        return ()
    return tuple((begin, end) for begin, end in found if 0 < begin < end < LATEST)
