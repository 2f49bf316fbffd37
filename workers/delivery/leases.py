"""The leases of one courier: which copies are its own, and until when, by the clock of Redis.

A lease is renewed until the outcome of its copy is in the ledger. One that is not renewed any more ends by itself, and
the reconciler finds its copy: so it is after a fault, or while Redis is away for long.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.ledger import changes

SECONDS = 60.0
_RENEW = 15.0
_RENEW_SOON = 1.0


class Leases:
    """``held`` are the ids of the copies whose leases are ours."""

    def __init__(self, connection: Redis, destination: str) -> None:
        self._connection = connection
        self._destination = destination
        self._offset = 0.0  # seconds that Redis's clock is ahead of ours
        self.held: set[str] = set()

    def now(self) -> float:
        """Return the time by Redis's clock, as it was at the last renewal."""
        return time.time() + self._offset

    def take(self, ids: Iterable[str]) -> None:
        """Count the copies with these ids as ours."""
        self.held.update(ids)

    def free(self, ids: Iterable[str]) -> None:
        """Renew these no more."""
        self.held.difference_update(ids)

    def free_when(self, written: asyncio.Future[None], ids: Iterable[str]) -> None:
        """Hold these until this is written."""
        written.add_done_callback(lambda _: self.free(ids))

    async def renew(self) -> None:
        """Renew what is held, and look at Redis's clock; runs until cancelled."""
        while True:
            pause = _RENEW
            try:
                seconds, micros = await self._connection.time()
                self._offset = int(seconds) + int(micros) / 1e6 - time.time()
                if self.held:
                    async with self._connection.pipeline(transaction=False) as pipe:
                        changes.renew(pipe, self._destination, self.now() + SECONDS, list(self.held))
                        await pipe.execute()
            except (RedisError, OSError) as error:
                maillog.ledger_trouble("renewing leases", error)
                pause = _RENEW_SOON
            await asyncio.sleep(pause)
