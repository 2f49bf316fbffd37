"""Outcomes on their way to the ledger, group-committed: what copies have come to while Redis was busy leaves together.

An outcome that cannot be written is tried again until it is: a Redis restart in the middle of a batch repeats no
delivery. Futures resolve when Redis has answered. While the oldest outcome waits for more than a second,
``is_late`` tells the courier to start no new copy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import redis.asyncio
from redis import Redis
from redis.exceptions import RedisError

from relay import faults, ledger, maillog

_LATE = 1.0
_STUCK = 60.0
_LONGEST_PAUSE = 2.0

Change = Callable[[Any], object]


class Outbox:
    """The outcomes of one worker process."""

    def __init__(self, connection: redis.asyncio.Redis, jobs: Redis, destination: str) -> None:
        """Take an async client for what concerns only the ledger, a blocking one for what also makes RQ jobs."""
        self._connection = connection
        self._jobs = jobs
        self._destination = destination
        self._settled: list[str] = []
        self._changes: list[Change] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._flight: asyncio.Task[None] | None = None
        self._oldest: float | None = None

    @property
    def is_late(self) -> bool:
        """Whether an outcome has been waiting for more than a second."""
        return self._oldest is not None and time.monotonic() - self._oldest > _LATE

    @property
    def is_stuck(self) -> bool:
        """Whether an outcome has been waiting for so long that a drain should not wait for it."""
        return self._oldest is not None and time.monotonic() - self._oldest > _STUCK

    def settle(self, message_id: str) -> asyncio.Future[None]:
        """Note a delivered copy."""
        self._settled.append(message_id)
        return self._submitted()

    def write(self, change: Change) -> asyncio.Future[None]:
        """Note a change that makes an RQ job too; called in a thread with a pipeline in MULTI, again if that fails."""
        self._changes.append(change)
        return self._submitted()

    def _submitted(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiters.append(future)
        if self._oldest is None:
            self._oldest = time.monotonic()
        if self._flight is None:
            self._flight = loop.create_task(self._fly())
        return future

    async def _fly(self) -> None:
        try:
            while self._waiters:
                await asyncio.sleep(0)  # the end of this turn of the loop: what else has an outcome in it goes along
                settled, self._settled = self._settled, []
                changes, self._changes = self._changes, []
                waiters, self._waiters = self._waiters, []
                begun = self._oldest
                if settled:
                    await self._until_written(lambda ids=settled: self._settle(ids))  # type: ignore[misc]
                if changes:
                    await self._until_written(lambda c=changes: asyncio.to_thread(self._change, c))  # type: ignore[misc]
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(None)
                if self._oldest == begun:
                    self._oldest = time.monotonic() if self._waiters else None
        finally:
            self._flight = None

    async def _settle(self, ids: list[str]) -> None:
        faults.reach("before settle")
        async with self._connection.pipeline(transaction=True) as pipe:
            ledger.settle(pipe, self._destination, ids)
            await pipe.execute()

    def _change(self, changes: list[Change]) -> None:
        with self._jobs.pipeline(transaction=True) as pipe:
            for change in changes:
                change(pipe)
            pipe.execute()

    async def _until_written(self, write: Callable[[], Any]) -> None:
        pause = 0.05
        while True:
            try:
                await write()
            except (RedisError, OSError) as error:
                maillog.ledger_trouble("outcomes wait for Redis", error)
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE, pause * 2)
            else:
                return
