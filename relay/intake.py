"""Durable intake: stage, release, discard and hold, group-committed with whatever else is going on.

Every message of every session of a process goes through one GroupCommit: what arrives while a MULTI is on
its way to Redis leaves together in the next one, so that one fsync serves many. A stage that Redis does
not take in time goes to the spool, and only without a spool raises NotDurable; what must be told to
Redis later (a release, a discard) is repeated until Redis has answered, for as long as the process lives,
and is left to the reconciler after that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from relay import ledger, maillog
from relay.dispatch import Dispatcher
from relay.envelope import Message
from relay.ledger import Released, Staged

_FLIGHTS = 2  # MULTIs on their way at once: one being written, one being gathered and parsed
_GROUP_BYTES = 4 << 20  # a group ends here, so that Redis is never held up for long
_LARGE = 256 << 10  # bodies over this travel alone, on connections of their own


class NotDurable(Exception):
    """The copy could be written neither to Redis nor to the spool."""


class Spool(Protocol):
    """What the intake wants of relay.spool."""

    async def write(self, message_id: str, record: bytes) -> None: ...
    async def release(self, released: Released) -> bool: ...
    async def discard(self, message_id: str) -> bool: ...


@dataclass(slots=True)
class _Pending:
    kind: str
    item: Any
    size: int
    done: asyncio.Future[Any]


class GroupCommit:
    """Gathers ledger changes of one process into MULTIs."""

    def __init__(self, connection: Redis, flights: int = _FLIGHTS) -> None:
        self._connection = connection
        self._limit = flights
        self._queue: list[_Pending] = []
        self._flights: set[asyncio.Task[None]] = set()
        self._scheduled = False

    def submit(self, kind: str, item: Any, size: int = 0) -> asyncio.Future[Any]:
        """Queue one change; the future has its result, or the RedisError that stopped it."""
        loop = asyncio.get_running_loop()
        pending = _Pending(kind, item, size, loop.create_future())
        self._queue.append(pending)
        if not self._scheduled and len(self._flights) < self._limit:
            # At the end of this turn of the loop: what other sessions submit in it goes along.
            self._scheduled = True
            loop.call_soon(self._take_off)
        return pending.done

    async def drain(self) -> None:
        """Wait until everything submitted has its answer."""
        while self._queue or self._flights:
            self._take_off()
            if self._flights:
                await asyncio.wait(self._flights)

    def _take_off(self) -> None:
        self._scheduled = False
        while self._queue and len(self._flights) < self._limit:
            group: list[_Pending] = []
            size = 0
            for pending in self._queue:
                if group and size + pending.size > _GROUP_BYTES:
                    break
                group.append(pending)
                size += pending.size
            del self._queue[: len(group)]
            task = asyncio.get_running_loop().create_task(self._fly(group))
            self._flights.add(task)
            task.add_done_callback(self._land)

    def _land(self, task: asyncio.Task[None]) -> None:
        self._flights.discard(task)
        self._take_off()

    async def _fly(self, group: list[_Pending]) -> None:
        try:
            results = await self._execute(group)
        except (RedisError, OSError, TimeoutError) as error:
            for pending in group:
                if not pending.done.done():
                    pending.done.set_exception(error)
        else:
            for pending, result in zip(group, results, strict=True):
                if not pending.done.done():
                    if isinstance(result, Exception):
                        pending.done.set_exception(result)
                    else:
                        pending.done.set_result(result)

    async def _execute(self, group: list[_Pending]) -> list[Any]:
        kinds: dict[str, list[_Pending]] = {}
        for pending in group:
            kinds.setdefault(pending.kind, []).append(pending)
        readers: list[tuple[list[_Pending], int]] = []
        async with self._connection.pipeline(transaction=True) as pipe:
            for kind, members in kinds.items():
                before = len(pipe)
                if kind == "stage":
                    ledger.stage(pipe, [p.item for p in members])
                elif kind == "release":
                    ledger.release(pipe, [p.item for p in members])
                elif kind == "discard":
                    ledger.discard(pipe, [p.item for p in members])
                else:
                    for p in members:
                        ledger.hold(pipe, *p.item)
                readers.append((members, before))
            answers = await pipe.execute(raise_on_error=False)
        results: dict[int, Any] = {}
        for members, first in readers:
            answer = answers[first]
            for i, pending in enumerate(members):
                if isinstance(answer, list):
                    results[id(pending)] = answer[i]
                elif pending.kind == "stage":
                    # ZADD and MSET are one change: either error is the stage's.
                    results[id(pending)] = next((a for a in answers[first : first + 2] if isinstance(a, Exception)), 1)
                else:
                    results[id(pending)] = answer
        return [results[id(p)] for p in group]


class Intake:
    """The session's view of durability."""

    def __init__(
        self,
        connection: Redis,
        bulk: Redis,
        dispatcher: Dispatcher,
        *,
        stage_seconds: float,
        deadline_seconds: float,
        hold_seconds: float,
        spool: Spool | None = None,
    ) -> None:
        self._small = GroupCommit(connection)
        self._large = GroupCommit(bulk)
        self._dispatcher = dispatcher
        self._stage_seconds = stage_seconds
        self._deadline_seconds = deadline_seconds
        self._hold_seconds = hold_seconds
        self._spool = spool
        self._repeating: set[asyncio.Task[None]] = set()
        self.clock_offset = 0.0  # seconds that Redis's clock is ahead of ours; kept by the monitor

    def now(self) -> float:
        """Return the time by Redis's clock, seconds since the epoch."""
        return time.time() + self.clock_offset

    async def stage(self, message: Message) -> None:
        """Put a message on stable storage, not yet due for anybody. Raises NotDurable."""
        record = message.pack()
        deadline = self.now() + self._deadline_seconds
        commit = self._large if len(record) > _LARGE else self._small
        future = commit.submit("stage", Staged(message.envelope.id, record, deadline), len(record))
        try:
            async with asyncio.timeout(self._stage_seconds):
                await future
        except (RedisError, OSError, TimeoutError) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if self._spool is None:
                # Redis may have it all the same, when only the answer was lost: nobody is to deliver it then.
                self.discard(message.envelope.id)
                raise NotDurable(reason) from error
            try:
                await self._spool.write(message.envelope.id, record)
            except OSError as trouble:
                self.discard(message.envelope.id)
                raise NotDurable(f"{reason}; spool: {trouble}") from trouble
            maillog.spooled(message.envelope, reason)

    async def release(self, released: Released) -> None:
        """Make a staged message due at its backups. Returns at the first try's end; later ones go on behind."""
        if self._spool is not None and await self._spool.release(released):
            return
        try:
            async with asyncio.timeout(self._stage_seconds):
                moved = await self._small.submit("release", released)
        except (RedisError, OSError, TimeoutError) as error:
            maillog.ledger_trouble(f"release {released.id}", error)
            self._repeat(lambda: self._released_late(released))
        else:
            if moved:
                self._dispatch(released)

    def discard(self, message_id: str) -> None:
        """Forget a message that the primary refused; repeated until Redis has answered."""
        self._repeat(lambda: self._discard(message_id))

    def hold(self, message_id: str, digest: str) -> None:
        """Mark a message as uncertain; repeated until Redis has answered."""
        self._repeat(lambda: self._hold(message_id, digest))

    async def drain(self) -> None:
        """Finish what is under way; bounded, since the reconciler finishes the rest."""
        await asyncio.wait_for(self._small.drain(), self._stage_seconds * 2)
        if self._repeating:
            await asyncio.wait(self._repeating, timeout=self._stage_seconds)
        await self._dispatcher.drain()

    def _dispatch(self, released: Released) -> None:
        for destination in released.destinations:
            self._dispatcher.add(destination, released.id)

    async def _released_late(self, released: Released) -> None:
        if await self._small.submit("release", released):
            self._dispatch(released)

    async def _discard(self, message_id: str) -> None:
        if self._spool is not None:
            await self._spool.discard(message_id)
        await self._small.submit("discard", message_id)

    async def _hold(self, message_id: str, digest: str) -> None:
        await self._small.submit("hold", (message_id, digest, self._hold_seconds))

    def _repeat(self, change: Callable[[], Any]) -> None:
        async def until_answered() -> None:
            pause = 0.1
            while True:
                try:
                    return await change()  # type: ignore[no-any-return]
                except (RedisError, OSError) as error:
                    if pause == 0.1:
                        maillog.ledger_trouble("a change waits for Redis", error)
                    await asyncio.sleep(pause)
                    pause = min(5.0, pause * 2)

        task = asyncio.get_running_loop().create_task(until_answered())
        self._repeating.add(task)
        task.add_done_callback(self._repeating.discard)
