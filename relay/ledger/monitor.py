"""Whether Redis can be written to now: a circuit for when it is down, a level for when it is full.

One look a second finds out what thousands of messages would else find out one by one, each at the price of
``redis.timeout_seconds``; also whether it is the ledger that we knew (continuity.py). A failed write opens the circuit
at once; only a look that could write closes it. Over 75 % of ``maxmemory``, until it is under 70 %, bodies go
elsewhere: a full Redis cannot even hand out a job.
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
from relay.redisio import clients

STOP_AT = 0.75  # of maxmemory
_LAST_AT = 0.90  # beyond this not even what has no other place: nothing could be delivered any more, so nothing freed
_GO_ON_AT = 0.70
_IMPORT_AT = 0.60  # what was spooled waits until new mail has room again
_CALM_SECONDS = 2.0
_FORGOTTEN_SECONDS = 660.0  # for so long a message may be between its staging and its release
_COST = 1.25  # octets of memory for an octet of a record: an allocator rounds up


class Errand(Protocol):
    """What goes along with each look, in one command, so that it takes no round trip of its own."""

    def ask(self, pipe: Any) -> None:
        """Add the command to the pipeline."""

    def take(self, answer: Any) -> None:
        """Take its answer, or the error that Redis gave instead."""


class Monitor:
    """What one relay process knows of Redis. ``processes`` like it fill the memory at the same time.

    With ``replicas`` a Redis in trouble can be written to again only when so many replicas follow it.
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
        self._is_own = False
        self._failures = 0
        self._failed_at = float("-inf")
        self._limit = 0  # maxmemory; 0: none
        self._used = 0
        self._flying = 0  # octets on their way
        self._landed = 0  # octets written since the last look
        self._over = False
        self._changed_at = float("-inf")
        self.clock = RedisClock()
        self.is_stranger = False  # the ledger must be told again where copies go

    @property
    def is_down(self) -> bool:
        return bool(self._trouble)

    @property
    def is_own(self) -> bool:
        """Whether the trouble is that we lack descriptors or memory: nothing is known of Redis then."""
        return self._is_own

    def objection(self, octets: int) -> str:
        """Say why a record of this size should not go to Redis now; "" when it should."""
        if self._trouble:
            return self._trouble
        if self._limit and (self._over or self._level(octets) > STOP_AT * self._limit):
            self._over = True
            return f"Redis has less than {1 - STOP_AT:.0%} of its maxmemory left"
        return ""

    def may_squeeze_in(self, octets: int) -> bool:
        """Say whether a record of this size that no spool takes may use the reserve."""
        return not self._trouble and (not self._limit or self._level(octets) <= _LAST_AT * self._limit)

    @property
    def is_calm(self) -> bool:
        """Whether Redis has answered for a while."""
        return not self._trouble and time.monotonic() - self._failed_at >= _CALM_SECONDS

    def may_import(self) -> bool:
        """Say whether there is room and calm for whatever was spooled."""
        return self.is_calm and (not self._limit or (not self._over and self._level(0) <= _IMPORT_AT * self._limit))

    def fits(self, octets: int, level: float) -> bool:
        """Say whether a spooled record of this size leaves Redis below this part of its memory."""
        return not self._limit or self._level(octets) <= level * self._limit

    def copies(self, part: float, octets: int) -> int:
        """Return how many records of this size take this part of a bounded memory."""
        return int(part * self._limit / (_COST * max(1, octets)))

    def part(self, part: float, most: int) -> int:
        """Return this part of the memory in octets, at most so many."""
        return min(most, int(part * self._limit)) if self._limit else most

    def sent(self, octets: int, answer: asyncio.Future[Any]) -> None:
        """Count a record that is on its way until it is answered, and then until the next look sees it."""
        self._flying += octets

        def landed(_: asyncio.Future[Any]) -> None:
            self._flying -= octets
            self._landed += octets

        answer.add_done_callback(landed)

    def failed(self, error: BaseException) -> None:
        """Take note that a write got no answer, or a refusal."""
        self._failures += 1
        self._failed_at = time.monotonic()
        self._is_own = limits.is_own(error)
        if not self._trouble:
            self._trouble = f"Redis: {type(error).__name__}: {error}".rstrip(": ")
            maillog.notice("warning", "Redis cannot be written to", reason=self._trouble)

    def look_alone(self) -> None:
        """Do no errand any more."""
        self._errand = None

    async def look(self) -> bool:
        """Find out how Redis is. Returns whether it answers."""
        failures = self._failures
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(self._seconds), self._connection.pipeline(transaction=False) as pipe:
                doubted = bool(self._trouble)
                if doubted:
                    clients.probe(pipe)
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
                clients.check(needed[1], self._replicas)
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
            self._is_own = False
            maillog.notice("info", "Redis can be written to again")
        return True

    async def has_forgotten(self) -> bool:
        """Say whether the ledger has lately turned out to be another than it was; looks now."""
        return await self.look() and time.monotonic() - self._changed_at < _FORGOTTEN_SECONDS

    async def has(self, message_id: str) -> bool:
        """Say whether the ledger has a message's record. Raises RedisError."""
        return bool(await self._connection.exists(keys.MESSAGE + message_id))

    def _recognise(self, known: Sequence[Any]) -> None:
        """Take what the ledger says of itself; one that is full, or must not be written, says nothing."""
        if isinstance(known[0], Exception):
            return
        changes = self._continuity.changes
        self.is_stranger |= self._continuity.judge(known)
        if changes != self._continuity.changes:
            self._changed_at = time.monotonic()

    def _take(self, memory: Any) -> None:
        """Take the figures; a Redis that keeps them from us is taken to have room."""
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
