"""What a courier has in hand: the copies whose leases are its own, by the job that each one came with.

A copy is to be tried, under way, deferred together with others of its job, or its outcome is being written; one that
is put back counts no attempt. A lease is held until the ledger has the outcome. A job may be over before its last
copies are, the stragglers: theirs is then written, deferred or scheduled without it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field

from relay import faultpoints
from relay.ledger.changes import Claim
from relay.ledger.copy_state import CopyState
from workers.delivery.copy import Copy
from workers.delivery.outcomes import Outcomes


@dataclass(slots=True)
class Batch:
    """The copies of one job: what is to be tried, what is deferred, what is being written."""

    job: str
    work: deque[Claim | Copy]
    under_way: int = 0
    turned: asyncio.Event = field(default_factory=asyncio.Event)  # its work is given out, a copy is done with
    deferred: dict[str, tuple[CopyState, float]] = field(default_factory=dict)
    written: list[asyncio.Future[None]] = field(default_factory=list)
    is_over: bool = False  # the job has returned without its stragglers


class Batches:
    """The batches of one courier; ``spawn`` runs what nobody waits for."""

    def __init__(self, outcomes: Outcomes, spawn: Callable[[Coroutine[object, object, None]], None]) -> None:
        self._outcomes = outcomes
        self._spawn = spawn
        self._batches: list[Batch] = []
        self.held: set[str] = set()  # ids whose leases are ours

    def open(self, job: str, claims: Iterable[Claim]) -> Batch:
        """Take the copies that a job has claimed."""
        batch = Batch(job, deque(claims))
        self._batches.append(batch)
        return batch

    def close(self, batch: Batch) -> None:
        """Give no more of its copies out."""
        self._batches.remove(batch)

    def next(self) -> Batch | None:
        """Return the first batch with work left."""
        return next((batch for batch in self._batches if batch.work), None)

    @property
    def copies_left(self) -> int:
        """How many copies are to be tried."""
        return sum(len(batch.work) for batch in self._batches)

    def wake(self) -> None:
        """Have every job look at what is left of its batch."""
        for batch in self._batches:
            batch.turned.set()

    # --- one copy ---------------------------------------------------------------------------------------------

    @staticmethod
    def begin(batch: Batch) -> Claim | Copy:
        """Take the next copy; it is under way until ``end``."""
        batch.under_way += 1
        return batch.work.popleft()

    def end(self, batch: Batch, message_id: str, *, broken: bool = False) -> None:
        """Note that a copy is not under way any more."""
        if broken:
            self.held.discard(message_id)  # a fault of ours: its lease runs out, and the reconciler finds it
        batch.under_way -= 1
        if not (batch.work and batch.under_way):
            batch.turned.set()

    def put_back(self, batch: Batch, copy: Copy, *, last: bool = False) -> None:
        """Have a copy tried again, without an attempt being counted; ``last``, behind all others."""
        if not batch.is_over:
            (batch.work.append if last else batch.work.appendleft)(copy)
            batch.turned.set()
        elif copy.is_touched:
            self.interrupt(batch, copy)
        else:
            self._spawn(self._again_soon(copy))

    def conclude(self, batch: Batch, copy: Copy) -> None:
        """Write what became of a copy whose recipients all have an answer."""
        faultpoints.reach("backup answered")
        self.note(batch, copy.id, *self._outcomes.conclude(copy, batch.job))

    def interrupt(self, batch: Batch, copy: Copy) -> None:
        """Conclude a copy of which only some recipients were asked."""
        self.note(batch, copy.id, *self._outcomes.interrupted(copy, batch.job))

    def note(
        self,
        batch: Batch,
        message_id: str,
        written: asyncio.Future[None] | None,
        deferred: tuple[CopyState, float] | None = None,
    ) -> None:
        """Keep track of an outcome; the lease is ours until it is in the ledger."""
        if deferred is not None:
            batch.deferred[message_id] = deferred
            if batch.is_over:
                self._spawn(self.defer(batch))
        elif written is not None:
            written.add_done_callback(lambda _: self.held.discard(message_id))
        if written is not None and not batch.is_over:
            batch.written.append(written)

    async def defer(self, batch: Batch) -> None:
        """Have the copies that a batch defers leave together, as one job."""
        deferred, batch.deferred = batch.deferred, {}
        if deferred:
            await self._outcomes.defer(deferred)
            self.held.difference_update(deferred)

    async def _again_soon(self, copy: Copy) -> None:
        await self._outcomes.again_soon(copy)
        self.held.discard(copy.id)
