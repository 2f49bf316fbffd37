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

    async def bring_forward(self, job: JobInHand) -> None:
        """Have the best probe be the next copy of a job, which may get copies of the backlog for that.

        Raises Interrupted.
        """
        breaker = self._breaker
        if breaker.is_in_doubt or breaker.is_refusing or all(self._runs.has_met_trouble(i.id) for i in job.work):
            job.work.extend(await self._claiming.claim_sample(job.id))  # its own may all be like what was refused
        if job.work:
            likeness = [(self._likeness(item), random.random()) for item in job.work]
            chosen = likeness.index(min(likeness))
            item = job.work[chosen]
            del job.work[chosen]
            job.work.appendleft(item)

    def _likeness(self, item: Claim | Copy) -> int:
        """Return how little a copy would tell about the server."""
        message = item.message if isinstance(item, Copy) else self._bodies.at_hand(item.id)
        likeness = 8 * self._runs.has_met_trouble(item.id)
        if message is None:  # a large one
            return likeness + 3
        return likeness + self._refusals.likeness(message.envelope, tried=item.state.attempts > 0)
