"""Copies whose leases have ended without an outcome: their worker is stopped, or cut off from Redis.

A worker that lives renews every 15 seconds, but may be late: Redis was away, or its clock was set. So a lease counts
as ended only when it still is after a while in which Redis has answered. Each is told once, and again only after it
has been claimed meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from redis import Redis
from redis.exceptions import RedisError

from relay.ledger import changes, keys, registry
from relay.mail.ids import text as as_text

CERTAIN_SECONDS = 20.0
_MOST = 10_000  # of one destination at a time


class EndedLeases:
    """What one process has seen of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[str, dict[str, float]] = {}  # destination -> id -> when it was seen first, inf once told

    def look(self, connection: Redis) -> Iterator[tuple[str, list[str]]]:
        """Yield destinations with the ids that are to be taken over now. Raises RedisError."""
        try:
            ended = self._read(connection)
        except RedisError:
            self._seen.clear()  # while Redis is away nobody renews
            raise
        now = self._clock()
        self._seen = {
            name: dict.fromkeys(ids, now) | {i: at for i, at in self._seen.get(name, {}).items() if i in ids}
            for name, ids in ended.items()
        }
        for name, seen in self._seen.items():
            due = [message_id for message_id, at in seen.items() if now - at >= CERTAIN_SECONDS]
            seen.update(dict.fromkeys(due, math.inf))
            if due:
                yield name, due

    @staticmethod
    def _read(connection: Redis) -> dict[str, set[str]]:
        names = list(registry.destinations(connection))
        clock = changes.now(connection)
        with connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.zrangebyscore(keys.BUSY + name, "-inf", clock, start=0, num=_MOST)
            found = pipe.execute()
        return {name: set(map(as_text, ids)) for name, ids in zip(names, found, strict=True) if ids}
