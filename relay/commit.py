"""Group commit: the ledger's changes of one process, gathered into few writes.

What arrives while a write is on its way to Redis leaves together in the next one, so that one fsync serves many. Each
kind of change is one script, whole or not at all; those of one write are sent together and answered together. Who
submits gets a future: the change's result, the RedisError that stopped it, or TimeoutError when Redis has not answered
in time, after which it may have been done all the same; with ``redis.replicas``, TooFewReplicas.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from relay import ledger, redis_clients

_FLIGHTS = 2  # writes on their way at once: one being written, one being gathered and parsed
_IN_PARTS = 256 << 10  # octets of a group; below, one buffer is quicker
_GROUP_BYTES = 4 << 20  # a group ends here, so that Redis is never held up for long


@dataclass(slots=True)
class _Pending:
    kind: str
    item: Any
    size: int
    deadline: float
    done: asyncio.Future[Any]


class _Batch:
    """The part of a pipeline that the ledger's functions need: commands, packed as they come.

    Where there is much in them they stay in parts: each copy of a large body is as much memory again.
    """

    def __init__(self, size: int) -> None:
        self._is_large = size > _IN_PARTS
        self._parts: list[bytes] = []
        self.replies: list[int] = []  # how many each change gets

    def eval(self, *arguments: Any) -> None:
        self.add(("EVAL", *arguments))

    def add(self, command: Sequence[Any]) -> None:
        self.replies.append(1)
        self._pack(command)

    def transaction(self, commands: Sequence[Sequence[Any]]) -> None:
        """Add commands that are one change, whole or not at all. An argument may come in parts: a tuple of octets."""
        self.replies.append(len(commands) + 2)
        for command in (("MULTI",), *commands, ("EXEC",)):
            self._pack(command)

    def _pack(self, command: Sequence[Any]) -> None:
        if not self._is_large:
            self._parts.append(hiredis.pack_command(tuple(command)))
            return
        self._parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            octets = argument if isinstance(argument, tuple) else (_octets(argument),)
            self._parts += (b"$%d\r\n" % sum(map(len, octets)), *octets, b"\r\n")

    @property
    def packed(self) -> Sequence[bytes]:
        return self._parts if self._is_large else (b"".join(self._parts),)


class GroupCommit:
    """Gathers ledger changes of one process; ``seconds`` is how long each may wait for its answer."""

    def __init__(self, connection: Redis, *, seconds: float, flights: int = _FLIGHTS) -> None:
        self._pool: Any = connection.connection_pool
        self._keeps = not isinstance(self._pool, SentinelConnectionPool)
        self._confirmation = redis_clients.confirmation(connection)
        self._idle: list[Any] = []  # connections between two writes
        self._seconds = seconds
        self._limit = flights
        self._queue: list[_Pending] = []
        self._flights: set[asyncio.Task[None]] = set()
        self._scheduled = False
        self._unanswered: deque[_Pending] = deque()  # in the order of their deadlines; answered ones leave late
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, kind: str, item: Any, size: int = 0) -> asyncio.Future[Any]:
        """Queue one change; the future has its result, or what stopped it."""
        loop = asyncio.get_running_loop()
        pending = _Pending(kind, item, size, loop.time() + self._seconds, loop.create_future())
        self._queue.append(pending)
        self._unanswered.append(pending)
        if self._timer is None:
            self._timer = loop.call_at(pending.deadline, self._expire)
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

    def _expire(self) -> None:
        """Give up on what has waited too long. One timer serves all: a timer each costs more than the change."""
        loop = asyncio.get_running_loop()
        unanswered = self._unanswered
        while unanswered and (unanswered[0].done.done() or unanswered[0].deadline <= loop.time()):
            pending = unanswered.popleft()
            if not pending.done.done():
                pending.done.set_exception(TimeoutError(f"no answer within {self._seconds:g} s"))
        self._timer = loop.call_at(unanswered[0].deadline, self._expire) if unanswered else None

    def _take_off(self) -> None:
        self._scheduled = False
        # Whoever gave up waiting must not find it done later.
        self._queue = [p for p in self._queue if not p.done.done()]
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
        while self._unanswered and self._unanswered[0].done.done():
            self._unanswered.popleft()
        self._take_off()

    async def _fly(self, group: list[_Pending]) -> None:
        batch = _Batch(sum(pending.size for pending in group))
        kinds: list[list[_Pending]] = []
        for kind, add in _ADD.items():
            members = [p for p in group if p.kind == kind]
            if members:
                kinds.append(members)
                add(batch, [p.item for p in members])
        for command in self._confirmation:
            batch.add(command)
        try:
            answers = await self._exchange(batch)
            if self._confirmation:
                redis_clients.check(answers[-1], self._confirmation[-1][1])
        except (RedisError, OSError) as error:  # a TimeoutError is an OSError
            answers = [error] * len(kinds)
        for members, answer in zip(kinds, answers, strict=False):
            for i, pending in enumerate(members):
                pending.item = None  # it may stay among the unanswered for a while; its record need not
                if pending.done.done():
                    continue
                if isinstance(answer, Exception):
                    pending.done.set_exception(answer)
                else:
                    pending.done.set_result(answer[i] if isinstance(answer, list) else answer)

    async def _exchange(self, batch: _Batch) -> list[Any]:
        """Send commands and return their answers, an exception where a command failed.

        Not by a redis-py pipeline, which takes longer than Redis itself; a connection of its pool is kept, unless
        Sentinels may name another server any time. One that turns out to be lost is replaced once: every change may be
        repeated.
        """
        for is_last in (False, True):
            connection = self._idle.pop() if self._idle else await self._pool.get_connection()
            try:
                async with asyncio.timeout(self._seconds):
                    await connection.send_packed_command(batch.packed, check_health=False)
                    answers = [await _answer(connection, replies) for replies in batch.replies]
            except BaseException as error:
                idle, self._idle = self._idle, []  # a server that went away took them along
                for lost in (connection, *idle):
                    await lost.disconnect(nowait=True)
                    await self._pool.release(lost)
                if is_last or not isinstance(error, NoConnection):
                    raise
            else:
                if self._keeps and not any(isinstance(answer, ReadOnlyError) for answer in answers):
                    self._idle.append(connection)
                else:
                    if self._keeps:  # a replica: behind the same name another may be the master by now
                        await connection.disconnect()
                    await self._pool.release(connection)
                return answers
        raise AssertionError


def _octets(argument: Any) -> bytes:
    return argument if isinstance(argument, bytes) else str(argument).encode()


async def _answer(connection: Any, replies: int) -> Any:
    """Return the answer to a change: the last reply, or the first error in any."""
    answer: Any = None
    fault: Exception | None = None
    for _ in range(replies):
        try:
            answer = await connection.read_response()
        except ResponseError as error:
            fault = fault or error  # what EXEC says of an earlier one is only that there was one
    if replies > 1 and isinstance(answer, list):
        fault = fault or next((reply for reply in answer if isinstance(reply, Exception)), None)
    return fault or answer


_ADD: Mapping[str, Callable[[Any, Sequence[Any]], None]] = {
    "stage": ledger.stage,
    "stage large": ledger.stage_large,
    "release": ledger.release,
    "discard": ledger.discard,
    "hold": ledger.hold,
}
