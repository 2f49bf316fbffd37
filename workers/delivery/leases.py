"""The leases of one courier: which copies are its own, and until when, by the clock of Redis.

A lease is renewed until the outcome of its copy is in the ledger. One that is not renewed any more ends by itself, and
the reconciler finds its copy: so it is after a fault, or while Redis is away for long. All are renewed at once when
Redis's clock has been set: forward they have ended too soon, back they would outlive a worker that is killed now.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.ledger import changes
from relay.ledger.redis_clock import RedisClock

SECONDS = changes.LEASE_SECONDS
_RENEW = 15.0
_RENEW_FRESH = 3.0  # it may be 5 seconds old when it comes, of the 20 for which it is taken
_LOOK = 1.0  # seconds between two looks whether a renewal is due


class Leases:
    """``held`` are the ids of the copies whose leases are ours."""

    def __init__(self, connection: Redis, destination: str) -> None:
        self._connection = connection
        self._destination = destination
        self._renewal_at = time.monotonic() + _RENEW  # not at once: what is about to be claimed may be another's still
        self.clock = RedisClock()
        self.held: set[str] = set()
        self.fresh: set[str] = set()  # those of them that have never been tried: no operator wants them retried
        self._left = asyncio.Event()
        self._given_back: set[str] = set()
        self._leaving: dict[asyncio.Future[None], list[str]] = {}  # what is held until something is written

    def hear(self, said: float, asked_at: float) -> None:
        """Take Redis's time, as the answer to what was asked at that monotonic time."""
        if self.clock.hear(said, asked_at):
            self._renewal_at = 0.0

    def take(self, ids: Iterable[str]) -> None:
        """Count the copies with these ids as ours."""
        self.held.update(ids)

    def take_fresh(self, ids: Iterable[str]) -> None:
        """Count copies as ours that have just been released to us, by leases that are short."""
        self._renewal_at = min(self._renewal_at, time.monotonic() + _RENEW_FRESH)
        self.held.update(ids)
        self.fresh.update(ids)

    def free(self, ids: Iterable[str]) -> None:
        """Renew these no more."""
        ids = tuple(ids)
        self.held.difference_update(ids)
        self.fresh.difference_update(ids)

    @asynccontextmanager
    async def leaving(self, ids: Collection[str]) -> AsyncIterator[None]:
        """Hold these while they are given back; ``have_left`` waits for that."""
        self.held.update(ids)
        self._given_back.update(ids)
        try:
            yield
        finally:
            self.free(ids)
            self._given_back.difference_update(ids)
            self._left.set()

    async def have_left(self, ids: Iterable[str]) -> None:
        """Wait until none of these is being given back: their next job may be here before the answer to that."""
        while not self._given_back.isdisjoint(ids):
            self._left.clear()
            await self._left.wait()

    def free_when(self, written: asyncio.Future[None], ids: Iterable[str]) -> None:
        """Hold these until this is written."""
        leaving = self._leaving.get(written)
        if leaving is None:
            leaving = self._leaving[written] = []
            written.add_done_callback(self._free_written)
        leaving += ids

    def _free_written(self, written: asyncio.Future[None]) -> None:
        self.free(self._leaving.pop(written))

    async def renew(self) -> None:
        """Renew what is held when that is due; runs until cancelled. Others let us hear Redis's clock once a second."""
        while True:
            try:
                if time.monotonic() >= self._renewal_at:
                    await self._renew()
                    self._renewal_at = time.monotonic() + _RENEW
            except (RedisError, OSError) as error:
                maillog.ledger_trouble("renewing leases", error)
            await asyncio.sleep(_LOOK)

    async def _renew(self) -> None:
        if self.held:
            async with self._connection.pipeline(transaction=False) as pipe:
                changes.renew(pipe, self._destination, self.clock.now() + SECONDS, list(self.held))
                await pipe.execute()
