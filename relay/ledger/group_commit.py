"""Group commit: the ledger's changes of one process, gathered into few writes.

What arrives while a write is on its way to Redis leaves together in the next one, so that one fsync serves many. Each
kind of change is one script or MULTI, whole or not at all; those of one write are sent together and answered together.
Who submits gets a future: the change's result, the RedisError that stopped it, or TimeoutError when Redis has not
answered in time, after which it may have been done all the same; with ``redis.replicas``, TooFewReplicas.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from redis.asyncio import Redis

from relay.ledger import changes
from relay.redisio.pipeline import Answers, CommandBatch, Pipelines

_FLIGHTS = 2  # writes on their way at once: one being written, one being gathered and parsed
_GROUP_BYTES = 4 << 20  # a group ends here, so that Redis is never held up for long


@dataclass(slots=True)
class _Pending:
    kind: str
    item: Any
    size: int
    deadline: float
    done: asyncio.Future[Any]


class GroupCommit:
    """Gathers ledger changes of one process; ``seconds`` is how long each may wait for its answer."""

    def __init__(self, connection: Redis, *, seconds: float, flights: int = _FLIGHTS) -> None:
        self._wires = Pipelines(connection, seconds=seconds)
        self._seconds = seconds
        self._limit = flights
        self._queue: list[_Pending] = []
        self._flights = 0
        self._landed = asyncio.Event()  # any of them; for who drains
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
        if not self._scheduled and self._flights < self._limit:
            # At the end of this turn of the loop: what other sessions submit in it goes along.
            self._scheduled = True
            loop.call_soon(self._take_off)
        return pending.done

    async def drain(self) -> None:
        """Wait until everything submitted has its answer."""
        while self._queue or self._flights:
            self._take_off()
            if self._flights:
                self._landed.clear()
                await self._landed.wait()

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
        while self._queue and self._flights < self._limit:
            group: list[_Pending] = []
            size = 0
            for pending in self._queue:
                if group and size + pending.size > _GROUP_BYTES:
                    break
                group.append(pending)
                size += pending.size
            del self._queue[: len(group)]
            self._fly(group, size)

    def _fly(self, group: list[_Pending], size: int) -> None:
        self._flights += 1
        kinds = [members for kind in _ADD if (members := [p for p in group if p.kind == kind])]
        batch = CommandBatch(size)
        try:
            for members in kinds:
                _ADD[members[0].kind](batch, [p.item for p in members])
        except Exception as error:  # the border: whoever waits must hear of it
            asyncio.get_running_loop().call_soon(self._land, kinds, error)
        else:
            self._wires.send(batch, partial(self._land, kinds))

    def _land(self, kinds: list[list[_Pending]], answers: Answers) -> None:
        self._flights -= 1
        for number, members in enumerate(kinds):
            answer = answers if isinstance(answers, Exception) else answers[number]
            for i, pending in enumerate(members):
                pending.item = None  # it may stay among the unanswered for a while; its record need not
                if pending.done.done():
                    continue
                if isinstance(answer, Exception):
                    pending.done.set_exception(answer)
                else:
                    pending.done.set_result(answer[i] if isinstance(answer, list) else answer)
        while self._unanswered and self._unanswered[0].done.done():
            self._unanswered.popleft()
        self._take_off()
        self._landed.set()


_ADD: Mapping[str, Callable[[Any, Sequence[Any]], None]] = {
    "stage": changes.stage,
    "stage large": changes.stage_large,
    "release": changes.release,
    "discard": changes.discard,
    "hold": changes.hold,
}
