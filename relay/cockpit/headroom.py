"""For how long Redis, and then this host's spool, have room for mail that is accepted and not delivered to somebody.

An estimate from what came within the last day: what all hosts accepted, its octets as they came. Redis takes bodies up
to three quarters of its maxmemory, and each takes a little more than its octets; then they go to the spool.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay.ledger import archive, flow
from relay.ledger.monitor import STOP_AT

_DAY_HOURS = 24
_COST = 1.25  # octets of memory for an octet of a message
_ENTRY = 500  # octets of memory for a message whatever its size


@dataclass(frozen=True, slots=True)
class Headroom:
    """Messages a second within the last day, and for how many seconds there is room; None: nobody can tell."""

    messages_a_second: float
    redis_s: float | None
    spool_s: float | None


def estimate(connection: Any, now: float, spool: Path | None, spool_min_free: int) -> Headroom:
    """Look at both. Raises RedisError."""
    hours = flow.read(connection, flow.HOUR, _DAY_HOURS, now)
    seen = [hour for hour in hours if hour.accepted]
    if not seen:
        return Headroom(0.0, None, None)
    # From the first hour in which mail came: an installation of this morning has no day behind it.
    seconds = max(60.0, now - min(hour.start for hour in seen))
    messages = sum(hour.accepted for hour in seen) / seconds
    octets = sum(hour.octets for hour in seen) / seconds
    used, limit = archive.memory(connection)
    room = STOP_AT * limit - used
    redis_s = max(0.0, room) / (_COST * octets + _ENTRY * messages) if limit else None
    return Headroom(messages, redis_s, _spool_seconds(spool, spool_min_free, octets + _ENTRY * messages))


def _spool_seconds(folder: Path | None, min_free: int, octets_a_second: float) -> float | None:
    if folder is None:
        return None
    try:
        place = next(path for path in (folder, *folder.parents) if path.exists())
        return max(0, shutil.disk_usage(place).free - min_free) / octets_a_second
    except (OSError, StopIteration):
        return None
