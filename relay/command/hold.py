"""`hold`, `release` and `throttle`: an operator keeps copies from a backup for a time, or slows them down.

What is held waits, and does not age: no copy is given up for it. The workers of all hosts follow within a second.
"""

from __future__ import annotations

import time

from relay.cockpit import hold_and_throttle
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, Misuse, read_flag
from relay.command.output import Output
from relay.config.loader import Settings
from relay.config.types import duration
from relay.ledger import queries
from relay.ledger.health import Health

_FOLLOW_SECONDS = 1.2  # within which the workers look: once the command has ended, no copy is begun


def hold(settings: Settings, out: Output, name: str, reason: str, length: str | None, until_released: bool) -> int:
    """Begin no more copies for a backup, for a time or until it is released."""
    if bool(length) == until_released:
        raise Misuse("for how long? give --for TIME or --until-released")
    if not reason.strip():
        raise Misuse("--reason: say why, for whoever wonders")
    seconds = read_flag("--for", duration().read, length) if length else 0.0
    with ledger_of(settings) as connection:
        after, found = hold_and_throttle.hold(connection, settings, name, seconds, reason)
    time.sleep(_FOLLOW_SECONDS)
    until, why = (after.hold.until, after.hold.reason) if after.hold else (0.0, "")
    if out.as_json:
        out.object({
            "held": name, "until": until or None, "reason": why, "messages_a_second": round(found.messages_a_second, 3),
            "redis_room_s": _whole(found.redis_s), "spool_room_s": _whole(found.spool_s),
        })  # fmt: skip
        return WELL
    end = hold_and_throttle.until_words(until)
    out.line(f"{name} is held {end}. What is under way ends; everything else waits and does not age.")
    out.line(hold_and_throttle.room_words(found))
    return WELL


def release(settings: Settings, out: Output, name: str) -> int:
    """End a hold; says no where there is none."""
    with ledger_of(settings) as connection:
        was_held = hold_and_throttle.release(connection, name)
    text = f"{name} is released." if was_held else f"{name} is not held."
    out.say(text, {"released": name, "was_held": was_held})
    return WELL if was_held else NO


def throttle(settings: Settings, out: Output, name: str, rate: str | None, connections: int | None, off: bool) -> int:
    """Bound how fast a backup gets its copies, over all workers; without an option say what the bounds are."""
    if off and (rate is not None or connections is not None):
        raise Misuse("--off, or --rate and --connections, not both")
    wanted = read_flag("--rate", hold_and_throttle.rate, rate) if rate is not None else None
    with ledger_of(settings) as connection:
        queries.destinations(connection, name)
        if off or wanted is not None or connections is not None:
            hold_and_throttle.throttle(connection, name, 0.0 if off else wanted, 0 if off else connections)
        after = Health.read(connection, name)
    out.say(
        f"{name}: {hold_and_throttle.bounds_words(after)}.",
        {"destination": name, "rate": after.rate or None, "connections": after.connections or None},
    )
    return WELL


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(min(seconds, 1e9))
