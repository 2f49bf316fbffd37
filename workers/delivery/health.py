"""The health of one destination as its worker sees it, told to the ledger; the operator's flush, read from there.

Redis being away delays the news and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.ledger import keys
from workers.delivery.retry import Breaker

_LOOK_SECONDS = 1.0


class Health:
    """Reports a Breaker's turns, and lets a flush make it probe at once."""

    def __init__(self, connection: Redis, destination: str, now: Callable[[], float]) -> None:
        self._connection = connection
        self._name = destination
        self._now = now
        self._news: dict[str, str] | None = {"state": "ok", "reason": "", "probe_at": "", "since": ""}
        self._flushes: int | None = None
        self._was_open = False
        self.turned = asyncio.Event()

    def on_change(self, breaker: Breaker) -> None:
        """Note a turn of the breaker; wakes whoever waits for it."""
        if breaker.is_open:
            maillog.destination_paused(self._name, breaker.reason, breaker.seconds_to_probe)
            self._news = {
                "state": "paused",
                "reason": breaker.reason,
                "probe_at": f"{self._now() + breaker.seconds_to_probe:.3f}",
                "since": f"{self._now() - (breaker.clock() - breaker.opened_at):.3f}",
            }
        else:
            maillog.destination_resumed(self._name, breaker.clock() - breaker.opened_at)
            self._news = {"state": "ok", "reason": "", "probe_at": "", "since": ""}
        self.turned.set()

    async def watch(self, breaker: Breaker) -> None:
        """Keep the ledger told; runs until cancelled."""
        key = keys.HEALTH + self._name
        while True:
            news, self._news = self._news, None
            try:
                if news is not None:
                    await self._connection.hset(key, items=[part for pair in news.items() for part in pair])
                if breaker.is_open or self._flushes is None:
                    flushes = int(await self._connection.hget(key, "flush") or 0)
                    if self._flushes is not None and flushes > self._flushes:
                        breaker.probe_now()
                        self.turned.set()
                    self._flushes = flushes
                elif self._flushes is not None:
                    self._flushes = None  # read afresh at the next look: a flush while all is well needs nothing
            except (RedisError, OSError) as error:
                self._news = self._news or news
                maillog.ledger_trouble("health of a destination", error)
            await asyncio.sleep(_LOOK_SECONDS)
