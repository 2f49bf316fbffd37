"""Which copy is a probe of a server in trouble: the one that tells most about the server.

Never the same copy again where there is another. When the server seems to refuse everything, it is one of the whole
backlog that is least like what was refused.
"""

from __future__ import annotations

import random

from relay.breaker import Breaker
from relay.ledger.changes import Claim
from workers.delivery.bodies import Bodies
from workers.delivery.claiming import Claiming
from workers.delivery.connection_run import ConnectionRuns
from workers.delivery.copy import Copy
from workers.delivery.jobs_in_hand import JobInHand
from workers.delivery.refusals import RefusalMemory

_ENOUGH = 300  # copies in hand among which one may be unlike the others


class ProbeChoice:
    """Chooses the probes of one courier."""

    def __init__(
        self, breaker: Breaker, runs: ConnectionRuns, refusals: RefusalMemory, bodies: Bodies, claiming: Claiming
    ) -> None:
        self._breaker = breaker
        self._runs = runs
        self._refusals = refusals
        self._bodies = bodies
        self._claiming = claiming
        self._is_newest = False  # whether the last one was
        self._job: JobInHand | None = None  # the last one, and what it has of the backlog
        self._drawn: set[str] = set()

    async def bring_forward(self, job: JobInHand) -> None:
        """Have the best probe be the next copy of a job, which may get copies of the backlog for that.

        Raises Interrupted.
        """
        breaker = self._breaker
        if job.work and isinstance(job.work[0], Copy) and job.work[0].repeats:
            return  # the last one is to be asked about on a new connection
        is_of_messages = breaker.is_in_doubt or breaker.is_refusing or breaker.is_breaking
        if job is not self._job:
            self._job, self._drawn = job, set()
        if len(job.work) < _ENOUGH and (is_of_messages or all(self._runs.has_met_trouble(i.id) for i in job.work)):
            sample = await self._claiming.claim_sample(job.id)  # its own may all be like what was refused
            job.work.extend(sample)
            self._drawn.update(claim.id for claim in sample)
        if job.work:
            # A job's own copies were accepted one after the other: what is wrong with some may be with all. Every other
            # time it is the newest one: what has come since is hardly of the same burst.
            self._is_newest = not self._is_newest
            ranks = [
                (
                    self._likeness(item),
                    item.id not in self._drawn,
                    -_accepted_at(item) if self._is_newest else random.random(),
                )
                for item in job.work
            ]
            chosen = ranks.index(min(ranks))
            item = job.work[chosen]
            del job.work[chosen]
            job.work.appendleft(item)
            if breaker.is_in_doubt and self._runs.tells_nothing(item.id):
                breaker.has_no_other()

    def _likeness(self, item: Claim | Copy) -> int:
        """Return how little a copy would tell about the server."""
        message = item.message if isinstance(item, Copy) else self._bodies.at_hand(item.id)
        likeness = 8 * self._runs.has_met_trouble(item.id)
        if message is None:  # a large one
            return likeness + 3
        return likeness + self._refusals.likeness(message.envelope, tried=item.state.attempts > 0)


def _accepted_at(item: Claim | Copy) -> float:
    return item.accepted_at if isinstance(item, Claim) else item.message.envelope.received_at
