"""Whether Redis can be written to now: a circuit breaker for a Redis that is down, and a limit for one that is full.

Redis is probed once a second, so that not each of thousands of messages waits ``redis.timeout_seconds`` to find out;
the probe also checks that it is the same ledger (continuity.py). A failed write opens the circuit at once; only a probe
that wrote closes it. Above 75 % of ``maxmemory``, until it is below 70 %, bodies go to the spool: a full Redis cannot
even hand out a job. While Redis is down, ``objection`` says so, and staging.py uses the spool.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from relay import limits, maillog
from relay.ledger import keys
from relay.ledger.continuity import Continuity
from relay.ledger.redis_clock import RedisClock, time_of
from relay.redisio import replication
from relay.redisio.said import said

STOP_AT = 0.75  # of maxmemory
_LAST_AT = 0.90  # beyond this nothing is written, even without a spool: else no delivery could free memory any more
_GO_ON_AT = 0.70
_IMPORT_AT = 0.60  # spooled messages wait until there is room for new mail again
_CALM_SECONDS = 2.0
_FORGOTTEN_SECONDS = 660.0  # the longest time between the staging and the release of a message
_COST = 1.25  # octets of memory for an octet of a record: an allocator rounds up


class Errand(Protocol):
    """A command that is sent with each probe, to save a round trip."""

    def ask(self, pipe: Any) -> None:
        """Add the command to the pipeline."""

    def take(self, answer: Any) -> None:
        """Take its reply, or the error that Redis returned."""


class Monitor:
    """The state of Redis as one relay process sees it. ``processes`` of them fill its memory at the same time.

    After a failure, the circuit closes only if at least ``replicas`` replicas are connected.
    """

    def __init__(
        self,
        connection: Redis,
        *,
        seconds: float,
        processes: int = 1,
        replicas: int = 0,
        continuity: Continuity | None = None,
        errand: Errand | None = None,
    ) -> None:
        self._connection = connection
        self._errand = errand
        self._continuity = continuity or Continuity(())
        self._seconds = seconds
        self._processes = processes
        self._replicas = replicas
        self._trouble = ""
        self.is_own = False  # this process lacks descriptors or memory: then nothing is known about Redis
        self._failures = 0
        self._failed_at = float("-inf")
        self._limit = 0  # maxmemory; 0: none
        self._used = 0
        self._flying = 0  # octets being written
        self._landed = 0  # octets written since the last probe
        self._over = False
        self._changed_at = float("-inf")
        self.clock = RedisClock()
        self.is_stranger = False  # the destinations must be registered in the ledger again

    @property
    def is_down(self) -> bool:
        return bool(self._trouble)

    def objection(self, octets: int) -> str:
        """Return why a record of this size (octets) should not go to Redis now, "" if it should."""
        if self._trouble:
            return self._trouble
        if self._limit and (self._over or self._level(octets) > STOP_AT * self._limit):
            self._over = True
            return f"Redis has less than {1 - STOP_AT:.0%} of its maxmemory left"
        return ""

    def may_squeeze_in(self, octets: int) -> bool:
        """Return whether a record of this size may use the reserve, since the spool cannot take it."""
        return not self._trouble and (not self._limit or self._level(octets) <= _LAST_AT * self._limit)

    @property
    def is_calm(self) -> bool:
        """Whether Redis has answered for a while."""
        return not self._trouble and time.monotonic() - self._failed_at >= _CALM_SECONDS

    def may_import(self) -> bool:
        """Return whether any spooled message may be imported: Redis answers and has room."""
        return self.is_calm and (not self._limit or (not self._over and self._level(0) <= _IMPORT_AT * self._limit))

    def fits(self, octets: int, level: float) -> bool:
        """Return whether Redis stays below this part of its memory with a spooled record of this size."""
        return not self._limit or self._level(octets) <= level * self._limit

    def copies(self, part: float, octets: int) -> int:
        """Return how many records of this size fill this part of maxmemory."""
        return int(part * self._limit / (_COST * max(1, octets)))

    def part(self, part: float, most: int) -> int:
        """Return this part of maxmemory in octets, at most ``most``."""
        return min(most, int(part * self._limit)) if self._limit else most

    def sent(self, octets: int) -> None:
        """Count a record that is being written; ``landed`` must follow."""
        self._flying += octets

    def landed(self, octets: int) -> None:
        """Count a record that has been answered until the next probe."""
        self._flying -= octets
        self._landed += octets

    def failed(self, error: BaseException) -> None:
        """Note that a write failed; this opens the circuit."""
        self._failures += 1
        self._failed_at = time.monotonic()
        self.is_own = limits.is_own(error)
        if not self._trouble:
            self._trouble = f"Redis: {type(error).__name__}: {said(error)}".rstrip(": ")
            maillog.notice("warning", "Redis cannot be written to", reason=self._trouble)

    def look_alone(self) -> None:
        """Send no errand with the probes any more."""
        self._errand = None

    async def look(self) -> bool:
        """Probe Redis; returns whether it answers."""
        failures = self._failures
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds), self._connection.pipeline(transaction=False) as pipe:
                doubted = bool(self._trouble)
                if doubted:
                    replication.probe(pipe)
                    if self._replicas:
                        pipe.wait(self._replicas, round(self._seconds * 500))
                pipe.time()
                self._continuity.ask(pipe, count_on=self._landed > 0)
                pipe.info("memory")
                if errand := self._errand:
                    errand.ask(pipe)
                answers = await pipe.execute(raise_on_error=False)
            told = answers.pop() if errand else None
            memory = answers.pop()
            needed, known = answers[: -self._continuity.answers], answers[-self._continuity.answers :]
            for answer in needed:
                if isinstance(answer, Exception):
                    raise answer
            if doubted and self._replicas:
                replication.check(needed[1], self._replicas)
        except (RedisError, OSError, TimeoutError) as error:
            self.failed(error)
            return False
        self.clock.hear(time_of(needed[-1]), asked_at)
        self._recognise(known)
        self._take(memory)
        if errand:
            errand.take(told)
        if self._trouble and failures == self._failures:
            self._trouble = ""
            self.is_own = False
            maillog.notice("info", "Redis can be written to again")
        return True

    async def has_forgotten(self) -> bool:
        """Probe, and return whether the ledger has recently lost data (see continuity.py)."""
        return await self.look() and time.monotonic() - self._changed_at < _FORGOTTEN_SECONDS

    async def has(self, message_id: str) -> bool:
        """Return whether the ledger has the record of a message. Raises RedisError."""
        return bool(await self._connection.exists(keys.MESSAGE + message_id))

    def _recognise(self, known: Sequence[Any]) -> None:
        """Evaluate identity and count of the ledger; a full or read-only Redis returns none."""
        if isinstance(known[0], Exception):
            return
        changes = self._continuity.changes
        self.is_stranger |= self._continuity.judge(known)
        if changes != self._continuity.changes:
            self._changed_at = time.monotonic()

    def _take(self, memory: Any) -> None:
        """Evaluate the memory numbers; a Redis that does not give them counts as having room."""
        if isinstance(memory, ResponseError):
            return
        self._limit = int(memory.get("maxmemory", 0))
        self._used = int(memory.get("used_memory", 0))
        self._landed = 0
        if self._over and (not self._limit or self._level(0) < _GO_ON_AT * self._limit):
            self._over = False
            maillog.notice("info", "Redis has room again", used=self._used, maxmemory=self._limit)

    def _level(self, octets: int) -> int:
        return self._used + int(_COST * (octets + (self._flying + self._landed) * self._processes))
