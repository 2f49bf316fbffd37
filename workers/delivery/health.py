"""The health of one destination as its worker sees it, written to the ledger; what operators want, read from there.

Redis's clock is asked for with it, and how the ledger stands: an idle worker has one question a second. Without Redis
the report is late, and nothing else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import maillog
from relay.breaker import Breaker
from relay.ledger import divergence, keys
from relay.ledger.health import FIELDS, Health
from relay.ledger.redis_clock import time_of
from relay.mail.ids import text as as_text
from relay.mail.stored import LARGEST, figure
from relay.redisio.pipeline import CommandBatch, Pipelines
from workers.delivery.hold_and_throttle import HoldAndThrottle
from workers.delivery.leases import Leases

_LOOK_SECONDS = 1.0
_DIGITS = 16  # of a count that can be right


class HealthReport:
    """Reports when a Breaker opens or closes, lets a flush make it probe at once, and passes on holds and throttles."""

    def __init__(
        self,
        connection: Redis,
        pipelines: Pipelines,
        destination: str,
        leases: Leases,
        hold_and_throttle: HoldAndThrottle,
    ) -> None:
        self._hold_and_throttle = hold_and_throttle
        self._connection = connection
        self._pipelines = pipelines
        self._leases = leases
        self._name = destination
        self._now = leases.clock.now
        self._unwritten: dict[str, str] | None = {"state": "ok", "reason": "", "probe_at": "", "since": ""}
        self._flushes: int | None = None
        self.on_ledger: Callable[[str, int], None] = lambda _identity, _count: None
        self.changed = asyncio.Event()

    def on_change(self, breaker: Breaker) -> None:
        """Note that the breaker has opened or closed, and wake whoever waits for that."""
        if breaker.is_open:
            maillog.destination_paused(self._name, breaker.reason, breaker.seconds_to_probe)
            self._unwritten = {
                "state": "paused",
                "reason": breaker.reason,
                "probe_at": f"{self._now() + breaker.seconds_to_probe:.3f}",
                "since": f"{self._now() - (breaker.clock() - breaker.opened_at):.3f}",
            }
        else:
            maillog.destination_resumed(self._name, breaker.clock() - breaker.opened_at)
            self._unwritten = {"state": "ok", "reason": "", "probe_at": "", "since": ""}
        self.changed.set()

    async def look(self, breaker: Breaker) -> None:
        """Write what has changed, and read what operators want. Raises RedisError, OSError."""
        question = CommandBatch()
        question.add(("HMGET", keys.HEALTH + self._name, "flush", *FIELDS))
        question.add(("HMGET", keys.LEDGER, "id", "count"))
        question.add(("TIME",))
        report, self._unwritten = self._unwritten, None
        try:
            if report is not None:
                await self._write(report)
            asked_at = time.monotonic()
            found, ledger, said = await self._pipelines.ask(question, each=True)
            if not isinstance(said, Exception):
                self._leases.hear(time_of(said), asked_at)
            if isinstance(ledger, list) and None not in ledger:
                self.on_ledger(as_text(ledger[0]), int(figure(ledger[1], LARGEST)))
            if isinstance(found, Exception):  # the key may be of another type
                raise found
        except (RedisError, OSError):
            self._unwritten = self._unwritten or report
            raise
        flush, *fields = cast("list[bytes | None]", found)
        standing = Health.of({name.encode(): value for name, value in zip(FIELDS, fields, strict=True)})
        self._hold_and_throttle.note(standing)
        flushes = int(flush) if flush and flush.isdigit() and len(flush) < _DIGITS else 0
        if self._flushes is not None and flushes > self._flushes and breaker.is_open:
            breaker.probe_now()
            self.changed.set()
        self._flushes = flushes

    async def watch(self, breaker: Breaker) -> None:
        """Do so again and again; runs until cancelled."""
        while True:
            try:
                await self.look(breaker)
            except (RedisError, OSError) as error:
                maillog.ledger_trouble("health of a destination", error)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _write(self, report: dict[str, str]) -> None:
        """Write how the destination is, and in the list of its outages since when, or that it is over."""
        await self._connection.hset(keys.HEALTH + self._name, items=[part for pair in report.items() for part in pair])
        if report["state"] == "paused":
            await divergence.outage_begins(self._connection, self._name, float(report["since"]), report["reason"])
        else:
            await divergence.outage_ends(self._connection, self._name, self._now())
