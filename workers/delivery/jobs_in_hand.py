"""The jobs that a courier has in hand, with the copies that came with each.

A copy is to be tried, under way, deferred together with others of its job, or its outcome is being written; one that
is put back counts no attempt. Its lease is held until the ledger has the outcome. A job may be over before its last
copies are, the stragglers: theirs is then written, deferred or scheduled without it.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from relay import faultpoints
from relay.ledger.changes import Claim
from workers.delivery.copy import Copy
from workers.delivery.leases import Leases
from workers.delivery.outcomes import Conclusion, Deferral, Outcomes


class Ending(enum.Enum):
    """What a transaction has come to for its copy."""

    ANSWERED = "answered"  # there is an answer for each recipient
    AGAIN = "again"  # at once, for whom it is still owed to; no attempt is counted
    LAST = "last"  # the same, behind all others


@dataclass(slots=True)
class JobInHand:
    """The copies of one job: what is to be tried, what is deferred, what is being written."""

    id: str
    work: deque[Claim | Copy]
    under_way: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # its work is given out, a copy is done with
    deferred: dict[str, Deferral] = field(default_factory=dict)
    written: set[asyncio.Future[None]] = field(default_factory=set)
    is_over: bool = False  # the job has returned without its stragglers

    async def wait(self, seconds: float, *, or_work: bool) -> None:
        """Wait until nothing of it is under way, or something is to be tried again, but no longer than so many seconds.

        ``or_work`` says whether copies to be tried end the wait.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.under_way > 0 and not (or_work and self.work):
                    self.changed.clear()
                    await self.changed.wait()


class JobsInHand:
    """The jobs of one courier."""

    def __init__(self, outcomes: Outcomes, leases: Leases) -> None:
        self._outcomes = outcomes
        self._leases = leases
        self._jobs: list[JobInHand] = []

    def open(self, job_id: str, claims: Iterable[Claim]) -> JobInHand:
        """Take the copies that a job has claimed."""
        job = JobInHand(job_id, deque(claims))
        self._jobs.append(job)
        return job

    def close(self, job: JobInHand) -> None:
        """Give no more of its copies out."""
        self._jobs.remove(job)

    def next(self) -> JobInHand | None:
        """Return the first job with copies to be tried."""
        for job in self._jobs:  # asked for with each copy: a generator would take three times as long
            if job.work:
                return job
        return None

    @property
    def copies_left(self) -> int:
        """How many copies are to be tried."""
        count = 0
        for job in self._jobs:  # as above
            count += len(job.work)
        return count

    def wake(self) -> None:
        """Have every job look at what is left of it."""
        for job in self._jobs:
            job.changed.set()

    # --- one copy ---------------------------------------------------------------------------------------------

    @staticmethod
    def begin(job: JobInHand) -> Claim | Copy:
        """Take the next copy; it is under way until ``end``, ``finish`` or ``abandon``."""
        job.under_way += 1
        return job.work.popleft()

    @staticmethod
    def end(job: JobInHand) -> None:
        """Note that a copy is not under way any more."""
        job.under_way -= 1
        if not (job.work and job.under_way):
            job.changed.set()

    def abandon(self, job: JobInHand, message_id: str) -> None:
        """Leave a copy to the end of its lease after a fault of ours: the reconciler finds it."""
        self._leases.free([message_id])
        self.end(job)

    def finish(self, job: JobInHand, copy: Copy, ending: Ending) -> None:
        """Take a copy back from a connection."""
        if ending is Ending.ANSWERED:
            faultpoints.reach("backup answered")
            self.note(job, copy.id, self._outcomes.conclude(copy, job.id))
            self.end(job)
        else:
            self.put_back(job, copy, last=ending is Ending.LAST)

    def put_back(self, job: JobInHand, item: Claim | Copy, *, last: bool) -> None:
        """Have what was under way tried again, without an attempt being counted; ``last``, behind all others."""
        if not job.is_over:
            (job.work.append if last else job.work.appendleft)(item)
            job.changed.set()
        elif isinstance(item, Copy) and item.is_touched:
            self.note(job, item.id, self._outcomes.interrupted(item, job.id))
        else:
            self._leases.free_when(self._outcomes.again_soon(item), [item.id])
        self.end(job)

    def note(self, job: JobInHand, message_id: str, conclusion: Conclusion) -> None:
        """Keep track of an outcome; the lease is ours until it is in the ledger."""
        self._leases.fresh.discard(message_id)  # an operator may want a failed part of it retried
        written, deferral = conclusion
        if deferral is not None:
            job.deferred[message_id] = deferral
            if job.is_over:
                self._defer(job)
        elif written is not None:
            self._leases.free_when(written, [message_id])
        if written is not None and not job.is_over:
            job.written.add(written)

    # --- the end of a job -------------------------------------------------------------------------------------

    def leave_untried(self, job: JobInHand) -> list[str]:
        """Conclude what a job has in hand as it ends; returns the ids of the copies that nobody has been asked about.

        What it defers leaves together, as one job of RQ's.
        """
        untried = []
        for item in job.work:
            if isinstance(item, Copy) and item.is_touched:
                self.note(job, item.id, self._outcomes.interrupted(item, job.id))
            else:
                untried.append(item.id)
        self._defer(job)
        self._outcomes.hurry()
        return untried

    def _defer(self, job: JobInHand) -> None:
        deferred, job.deferred = job.deferred, {}
        if deferred:
            written = self._outcomes.defer(deferred)
            self._leases.free_when(written, deferred)
            job.written.add(written)
