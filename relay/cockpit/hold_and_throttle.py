"""What operators do to one backup: hold it, release it, bound its speed; recorded, and said in words."""

from __future__ import annotations

import math
import re

from redis import Redis

from relay.cockpit import headroom
from relay.cockpit.formatting import moment, span
from relay.cockpit.headroom import Headroom
from relay.config.model import Settings
from relay.ledger import audit, changes, health, queries
from relay.ledger.audit import Act
from relay.ledger.health import MOST_RATE, Health
from relay.mail.text import count, printable

_LONGEST_REASON = 500
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:/\s*(s|sec|second|m|min|minute|h|hour))?")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def hold(connection: Redis, settings: Settings, name: str, seconds: float, reason: str) -> tuple[Health, Headroom]:
    """Begin no more copies for a backup for so many seconds, 0: until it is released. Raises UnknownDestination.

    Returns how it stands, and for how long there is room for what comes. The workers follow within a second.
    """
    queries.destinations(connection, name)
    why = printable(reason.strip())[:_LONGEST_REASON]
    before = Health.read(connection, name)
    health.hold(connection, name, seconds, why, audit.operator())
    clock = changes.now(connection)
    after = Health.read(connection, name)
    audit.record(connection, Act(f"hold {name}", _held(before, clock), _held(after, clock), why))
    return after, headroom.estimate(connection, clock, settings.spool.dir, settings.spool.min_free)


def release(connection: Redis, name: str) -> bool:
    """End a hold; returns whether there was one. Raises UnknownDestination."""
    queries.destinations(connection, name)
    clock = changes.now(connection)
    before = Health.read(connection, name)
    was_held = health.release(connection, name)
    if was_held:
        audit.record(connection, Act(f"release {name}", _held(before, clock), "not held"))
    return was_held


def throttle(connection: Redis, name: str, rate: float | None, connections: int | None) -> Health:
    """Bound copies a second, or connections, over all workers; 0 takes a bound away, None leaves it."""
    queries.destinations(connection, name)
    before = Health.read(connection, name)
    with connection.pipeline(transaction=True) as pipe:
        health.throttle(
            pipe,
            name,
            before.rate if rate is None else rate,
            before.connections if connections is None else connections,
        )
        pipe.execute()
    after = Health.read(connection, name)
    audit.record(connection, Act(f"throttle {name}", bounds_words(before), bounds_words(after)))
    return after


def rate(text: str) -> float:
    """Read copies a second: 50, 50/s, 600/m, 0.5/s. Raises ValueError."""
    found = _RATE.fullmatch(text.strip().lower())
    value = float(found[1]) / _SECONDS[(found[2] or "s")[0]] if found else math.nan
    if not 0.001 <= value <= MOST_RATE:
        raise ValueError(f"expected copies a second such as 50/s, 600/m or 0.5/s, not {text!r}")
    return value


# In words -----------------------------------------------------------------------------------------------------------


def until_words(until: float) -> str:
    """Return the end of a hold."""
    return f"until {moment(until)}" if until else "until it is released"


def bounds_words(found: Health) -> str:
    """Return the bounds on its speed."""
    parts = ["1 copy a second" if found.rate == 1 else f"{found.rate:g} copies a second"] * bool(found.rate)
    parts += [count(found.connections, "connection")] * bool(found.connections)
    return f"throttled to {' and '.join(parts)}, over all workers" if parts else "not throttled"


def room_words(found: Headroom) -> str:
    """Return for how long there is room for what comes."""
    if not found.messages_a_second:
        return "No mail came within the last day: for how long there is room cannot be told."
    speed = f"at {found.messages_a_second:.3g} messages a second, as within the last day"
    redis = "Redis has no maxmemory" if found.redis_s is None else f"Redis has room for {_long(found.redis_s)}"
    spool = "there is no spool" if found.spool_s is None else f"this host's spool for {_long(found.spool_s)} more"
    return f"{redis}, {spool}, {speed}."


def _held(found: Health, clock: float) -> str:
    return f"held {until_words(found.hold.until)}" if found.hold and found.is_held(clock) else "not held"


def _long(seconds: float) -> str:
    return span(seconds) if seconds < 3650 * 86400 else "years"
