"""`hold`, `release` and `throttle`: an operator keeps copies from a backup for a time, or slows them down.

What is held waits, and does not age: no copy is given up for it. The workers of all hosts follow within a second.
"""

from __future__ import annotations

import math
import re
import time

from redis import Redis

from relay.cockpit import room
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, Misuse
from relay.command.output import Output, moment, span
from relay.config.loader import Settings
from relay.config.types import duration
from relay.ledger import audit, changes, health, queries
from relay.ledger.audit import Act
from relay.ledger.health import MOST_RATE, Health
from relay.mail.text import printable

_LONGEST_REASON = 500
_FOLLOW_SECONDS = 1.2  # within which the workers look: once the command has ended, no copy is begun
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:/\s*(s|sec|second|m|min|minute|h|hour))?")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def hold(settings: Settings, out: Output, name: str, reason: str, length: str | None, until_released: bool) -> int:
    """Begin no more copies for a backup, for a time or until it is released."""
    if bool(length) == until_released:
        raise Misuse("for how long? give --for TIME or --until-released")
    if not reason.strip():
        raise Misuse("--reason: say why, for whoever wonders")
    seconds = _duration(length)
    why = printable(reason.strip())[:_LONGEST_REASON]
    with ledger_of(settings) as connection:
        queries.destinations(connection, name)
        before = Health.read(connection, name)
        health.hold(connection, name, seconds, why, audit.operator())
        clock = changes.now(connection)
        after = Health.read(connection, name)
        audit.record(connection, Act(f"hold {name}", _held(before, clock), _held(after, clock), why))
        found = room.estimate(connection, clock, settings.spool.dir, settings.spool.min_free)
    time.sleep(_FOLLOW_SECONDS)
    until = after.hold.until if after.hold else 0.0
    if out.as_json:
        out.object({
            "held": name, "until": until or None, "reason": why, "messages_a_second": round(found.messages_a_second, 3),
            "redis_room_s": _whole(found.redis_s), "spool_room_s": _whole(found.spool_s),
        })  # fmt: skip
        return WELL
    out.line(f"{name} is held {_until(until)}. What is under way ends; everything else waits and does not age.")
    out.line(_room(found))
    return WELL


def release(settings: Settings, out: Output, name: str) -> int:
    """End a hold; says no where there is none."""
    with ledger_of(settings) as connection:
        queries.destinations(connection, name)
        clock = changes.now(connection)
        before = Health.read(connection, name)
        was_held = health.release(connection, name)
        if was_held:
            audit.record(connection, Act(f"release {name}", _held(before, clock), "not held"))
    if out.as_json:
        out.object({"released": name, "was_held": was_held})
    else:
        out.line(f"{name} is released." if was_held else f"{name} is not held.")
    return WELL if was_held else NO


def throttle(settings: Settings, out: Output, name: str, rate: str | None, connections: int | None, off: bool) -> int:
    """Bound how fast a backup gets its copies, over all workers; without an option say what the bounds are."""
    if off and (rate is not None or connections is not None):
        raise Misuse("--off, or --rate and --connections, not both")
    wanted = _rate(rate) if rate is not None else None
    with ledger_of(settings) as connection:
        queries.destinations(connection, name)
        before = Health.read(connection, name)
        if off or wanted is not None or connections is not None:
            _set(connection, name, before, 0.0 if off else wanted, 0 if off else connections)
        after = Health.read(connection, name)
    if out.as_json:
        out.object({"destination": name, "rate": after.rate or None, "connections": after.connections or None})
    else:
        out.line(f"{name}: {_bounds(after)}.")
    return WELL


def _set(connection: Redis, name: str, before: Health, rate: float | None, connections: int | None) -> None:
    with connection.pipeline(transaction=True) as pipe:
        health.throttle(
            pipe,
            name,
            before.rate if rate is None else rate,
            before.connections if connections is None else connections,
        )
        pipe.execute()
    act = Act(f"throttle {name}", _bounds(before), _bounds(Health.read(connection, name)))
    audit.record(connection, act)


def _duration(text: str | None) -> float:
    try:
        return float(duration().read(text)) if text is not None else 0.0
    except ValueError as error:
        raise Misuse(f"--for: {error}") from None


def _rate(text: str) -> float:
    """Read copies a second: 50, 50/s, 600/m, 0.5/s. Raises Misuse."""
    found = _RATE.fullmatch(text.strip().lower())
    value = float(found[1]) / _SECONDS[(found[2] or "s")[0]] if found else math.nan
    if not 0.001 <= value <= MOST_RATE:
        raise Misuse(f"--rate: expected copies a second such as 50/s, 600/m or 0.5/s, not {text!r}")
    return value


def _held(found: Health, clock: float) -> str:
    return f"held {_until(found.hold.until)}" if found.hold and found.is_held(clock) else "not held"


def _until(until: float) -> str:
    return f"until {moment(until)}" if until else "until it is released"


def _bounds(found: Health) -> str:
    parts = [f"{found.rate:g} copies a second"] * bool(found.rate)
    parts += [f"{found.connections} connections"] * bool(found.connections)
    return f"throttled to {' and '.join(parts)}, over all workers" if parts else "not throttled"


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(min(seconds, 1e9))


def _room(found: room.Room) -> str:
    if not found.messages_a_second:
        return "No mail came within the last day: for how long there is room cannot be told."
    rate = f"at {found.messages_a_second:.3g} messages a second, as within the last day"
    redis = "Redis has no maxmemory" if found.redis_s is None else f"Redis has room for {_long(found.redis_s)}"
    spool = "there is no spool" if found.spool_s is None else f"this host's spool for {_long(found.spool_s)} more"
    return f"{redis}, {spool}, {rate}."


def _long(seconds: float) -> str:
    return span(seconds) if seconds < 3650 * 86400 else "years"
