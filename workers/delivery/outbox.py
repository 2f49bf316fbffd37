"""Outcomes on their way to the ledger, group-committed: what copies have come to while Redis was busy leaves together.

Copies that are settled while others of their job are under way wait for these a moment, as a write costs what ten do.
An outcome that cannot be written is tried again until it is: a Redis restart in the middle of a batch repeats no
delivery. A group has one future, for ``asyncio.wait``; it resolves when Redis has answered. While the oldest outcome
waits for more than a second, ``is_late`` tells the courier to start no new copy. A failover, or an older Redis that is
put in its place, can lose what was answered: what was settled lately is remembered, and not sent again. Under Sentinels
it is also settled again at the new master.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis.asyncio
from redis import Redis
from redis.exceptions import RedisError

from relay import faultpoints, maillog
from relay.gathering import Gathering
from relay.ledger import changes as ledger_changes
from relay.ledger import keys
from relay.ledger.changes import Claim
from relay.ledger.copy_state import CopyState
from relay.redisio import sentinel
from relay.redisio.pipeline import CommandBatch, Pipelines
from relay.repeated import Backoff, until_done

_LATE = 1.0
_STUCK = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_FOLLOW_SECONDS = 0.5
_AFTERMATH_SECONDS, _AGAIN_SECONDS = 60.0, 5.0
_REMEMBERED_SECONDS = 300.0  # a failover takes as long as the Sentinels wait, and their election
_REMEMBERED = 50_000
_PAGE = 1000
_APART = 0.02  # seconds between two groups that nobody waits for; a kill repeats what was delivered in that time

Change = Callable[[Any], object]


@dataclass(slots=True)
class _Waiting:
    """An outcome on its way: a copy that is settled, or a change."""

    settled: str = ""
    counted: bool = False  # in a group of divergence
    change: Change | None = None
    size: int = 0


class Outbox:
    """The outcomes of one worker process."""

    def __init__(
        self,
        connection: redis.asyncio.Redis,
        jobs: Redis,
        destination: str,
        *,
        now: Callable[[], float] = time.time,
        has_sentinels: bool = False,
        noise: float = ledger_changes.NOISE,
    ) -> None:
        """Take an async client for what concerns only the ledger, a blocking one for what also makes RQ jobs.

        ``now`` is Redis's clock; with ``has_sentinels`` there may be a failover. ``noise`` is divergence.noise.
        """
        self._connection = connection
        self._wires = Pipelines(connection)
        self._jobs = jobs
        self._destination = destination
        self._noise = noise
        self._gathering = Gathering(self._begin, apart=_APART)
        self._flight: asyncio.Task[None] | None = None
        self._written: asyncio.Future[None] | None = None  # of the next group
        self._oldest: float | None = None
        self._now = now
        self._has_sentinels = has_sentinels
        self._lately: dict[str, float] = {}  # id -> when it was settled, the oldest first

    @property
    def is_late(self) -> bool:
        """Whether an outcome has been waiting for more than a second."""
        return self._oldest is not None and time.monotonic() - self._oldest > _LATE

    @property
    def is_stuck(self) -> bool:
        """Whether an outcome has been waiting for so long that a drain should not wait for it."""
        return self._oldest is not None and time.monotonic() - self._oldest > _STUCK

    def settle(self, message_id: str, *, counted: bool = False) -> asyncio.Future[None]:
        """Note a delivered copy; ``counted`` when it is open in a group of divergence. Who waits for it must hurry."""
        return self._submit(_Waiting(message_id, counted))

    def write(self, change: Change) -> asyncio.Future[None]:
        """Note a change that makes an RQ job too; called in a thread with a pipeline in MULTI, again if that fails."""
        written = self._submit(_Waiting(change=change))
        self.hurry()
        return written

    def hurry(self) -> None:
        """Write what waits as soon as possible."""
        self._gathering.hurry()

    def has_settled(self, claim: Claim) -> bool:
        """Say whether this very copy was settled here: Redis has it as pending because it lost that."""
        settled_at = self._lately.get(claim.id)
        # Else it is another's, moved here since, and owed to others.
        return settled_at is not None and max(claim.accepted_at, claim.state.since) <= settled_at

    async def follow(self) -> None:
        """See to it that a new master knows what was settled at the old one; runs until cancelled."""
        master = None
        until = again_at = 0.0  # a write on its way can reach the old master even then, until the Sentinels demote it
        while self._has_sentinels:
            await asyncio.sleep(_FOLLOW_SECONDS)
            if master is not None and not self._lately:
                continue
            try:
                present = await sentinel.find_master(self._connection)
            except (RedisError, OSError):
                continue
            now = time.monotonic()
            if master not in {None, present}:
                until, again_at = now + _AFTERMATH_SECONDS, now
            if again_at <= now < until:
                await self._until_written(self._settle_again)
                again_at = now + _AGAIN_SECONDS
            master = present

    async def _settle_again(self) -> None:
        ids = list(self._lately)
        for start in range(0, len(ids), _PAGE):
            page = ids[start : start + _PAGE]
            scores = await self._connection.zmscore(keys.PENDING + self._destination, page)
            pairs = zip(page, scores, strict=True)
            lost = [i for i, score in pairs if score is not None and float(score) <= self._lately.get(i, 0.0)]
            states = await self._connection.hmget(keys.OWN + self._destination, lost) if lost else []
            begun = [CopyState.from_wire(data).since for data in states]
            lost = [i for i, since in zip(lost, begun, strict=True) if since <= self._lately.get(i, 0.0)]
            for message_id in lost:
                maillog.repeated(message_id, self._destination, "a failover lost that it was delivered")
            if lost:
                await self._settle(lost)

    def _remember(self, ids: list[str]) -> None:
        now = self._now()
        self._lately.update(dict.fromkeys(ids, now))
        while self._lately and (
            len(self._lately) > _REMEMBERED or next(iter(self._lately.values())) < now - _REMEMBERED_SECONDS
        ):
            del self._lately[next(iter(self._lately))]

    def _submit(self, outcome: _Waiting) -> asyncio.Future[None]:
        self._gathering.add(outcome)
        if self._oldest is None:
            self._oldest = time.monotonic()
        if self._written is None:
            self._written = asyncio.get_running_loop().create_future()
        return self._written

    def _begin(self, group: list[_Waiting]) -> None:
        written, self._written = self._written, None  # a group is all that waits
        self._flight = asyncio.get_running_loop().create_task(self._fly(group, written))
        self._flight.add_done_callback(self._land)

    def _land(self, flight: asyncio.Task[None]) -> None:
        self._oldest = None if self._gathering.is_empty else time.monotonic()
        if not flight.cancelled():  # else the loop ends
            self._gathering.landed()

    async def _fly(self, group: list[_Waiting], written: asyncio.Future[None] | None) -> None:
        for counted in (False, True):
            if settled := [outcome.settled for outcome in group if outcome.settled and outcome.counted == counted]:
                await self._until_written(partial(self._settle, settled, counted=counted))
        if changes := [outcome.change for outcome in group if outcome.change is not None]:
            await self._until_written(partial(asyncio.to_thread, self._change, changes))
        if written is not None and not written.done():
            written.set_result(None)

    async def close(self) -> None:
        """End what is under way with Redis; nothing is written any more."""
        await self._wires.close()

    async def _settle(self, ids: list[str], *, counted: bool = False) -> None:
        faultpoints.reach("before settle")
        batch = CommandBatch()
        for start in range(0, len(ids), _PAGE):  # one script takes some 8,000
            page = ids[start : start + _PAGE]
            ledger_changes.settle(batch, self._destination, page, counted=counted, noise=self._noise)
        await self._wires.ask(batch)
        self._remember(ids)

    def _change(self, changes: list[Change]) -> None:
        with self._jobs.pipeline(transaction=True) as pipe:
            for change in changes:
                change(pipe)
            pipe.execute()

    async def _until_written(self, write: Callable[[], Awaitable[None]]) -> None:
        await until_done(write, self._note_trouble, Backoff(_FIRST_PAUSE, _LONGEST_PAUSE))

    def _note_trouble(self, error: Exception) -> None:
        if isinstance(error, RedisError | OSError):
            maillog.ledger_trouble("outcomes wait for Redis", error)
        else:  # the border: whoever waits for these would wait in silence, for ever
            maillog.task_failed(f"outcomes for {self._destination}", error)
