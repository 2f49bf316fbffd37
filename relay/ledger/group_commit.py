"""Group commit: gathers the ledger changes of one process into few writes (see relay/gathering.py).

Each kind of change is one atomic script or MULTI; those of one write are sent and answered together. ``submit`` returns
a future with the result of the change, the RedisError that stopped it, or TimeoutError if Redis did not reply in time;
the change may nevertheless have been done. With ``redis.replicas``, the error may be TooFewReplicas.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from redis.asyncio import Redis

from relay.gathering import Gathering
from relay.ledger import changes
from relay.redisio.pipeline import Answers, CommandBatch, Pipelines

# Writes on their way at once: one being written, one being gathered and parsed. One or three take as much processor
# time a message, whatever that does to the size of groups.
_FLIGHTS = 2
_GROUP_BYTES = 4 << 20  # the limit of a group, so that Redis is never blocked for long


@dataclass(slots=True)
class _Pending:
    kind: str
    item: Any
    size: int
    deadline: float
    done: asyncio.Future[Any]
    sent: asyncio.Future[None] | None = None  # done with the write to Redis, at the latest with its answer


class GroupCommit:
    """Gathers ledger changes of one process; each waits at most ``seconds`` for its reply."""

    def __init__(self, connection: Redis, *, seconds: float, flights: int = _FLIGHTS) -> None:
        self._wires = Pipelines(connection, seconds=seconds)
        self._seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None  # that of the first change
        self._gathering = Gathering(self._fly, flights=flights, octets=_GROUP_BYTES)
        self._unanswered: deque[_Pending] = deque()  # in the order of their deadlines; answered ones leave late
        self._timer: asyncio.TimerHandle | None = None

    def submit(
        self, kind: str, item: Any, size: int = 0, sent: asyncio.Future[None] | None = None
    ) -> asyncio.Future[Any]:
        """Queue one change; returns a future with its result or exception. ``sent`` is done once it is on its way."""
        loop = self._loop or asyncio.get_running_loop()
        self._loop = loop
        pending = _Pending(kind, item, size, loop.time() + self._seconds, loop.create_future(), sent)
        self._gathering.add(pending)
        self._unanswered.append(pending)
        if self._timer is None:
            self._timer = loop.call_at(pending.deadline, self._expire)
        return pending.done

    async def drain(self) -> None:
        """Wait until all submitted changes have been answered."""
        await self._gathering.drain()

    def _expire(self) -> None:
        """Time out changes that waited too long. One timer serves all: one each would cost more than a change."""
        loop = asyncio.get_running_loop()
        unanswered = self._unanswered
        while unanswered and (unanswered[0].done.done() or unanswered[0].deadline <= loop.time()):
            pending = unanswered.popleft()
            if not pending.done.done():
                pending.done.set_exception(TimeoutError(f"no answer within {self._seconds:g} s"))
                if pending.sent is not None:
                    _note(pending.sent)
        self._timer = loop.call_at(unanswered[0].deadline, self._expire) if unanswered else None

    def _fly(self, group: list[_Pending]) -> None:
        of_kind: dict[str, list[_Pending]] = {}
        size = 0
        for pending in group:
            if not pending.done.done():  # a change that timed out must not be sent any more
                of_kind.setdefault(pending.kind, []).append(pending)
                size += pending.size
        kinds = [*of_kind.values()]
        if not kinds:
            asyncio.get_running_loop().call_soon(self._land, kinds, [])
            return
        batch = CommandBatch(size)
        try:
            for members in kinds:
                _ADD[members[0].kind](batch, [p.item for p in members])
        except Exception as error:  # the border: the waiting callers get it
            asyncio.get_running_loop().call_soon(self._land, kinds, error)
        else:
            if self._wires.send(batch, partial(self._land, kinds)):
                for pending in group:
                    if pending.sent is not None:
                        _note(pending.sent)

    def _land(self, kinds: list[list[_Pending]], answers: Answers) -> None:
        for number, members in enumerate(kinds):
            answer = answers if isinstance(answers, Exception) else answers[number]
            of_each = members[0].kind == "release"  # the others have one answer for all
            for i, pending in enumerate(members):
                if pending.sent is not None:
                    _note(pending.sent)
                pending.item = None  # frees the record: the entry may stay in the queue for a while
                if pending.done.done():
                    continue
                if isinstance(answer, Exception):
                    pending.done.set_exception(answer)
                else:
                    pending.done.set_result(answer[i] if of_each else answer)
        while self._unanswered and self._unanswered[0].done.done():
            self._unanswered.popleft()
        self._gathering.landed()


def _note(sent: asyncio.Future[None]) -> None:
    if not sent.done():
        sent.set_result(None)


_ADD: Mapping[str, Callable[[Any, Sequence[Any]], None]] = {
    "stage": changes.stage,
    "release": changes.release,
    "discard": changes.discard,
    "hold": changes.hold,
}
