"""A claim becomes a copy with its body, or has its outcome at once: the body is elsewhere, sealed, damaged or gone."""

from __future__ import annotations

from relay import maillog, metrics
from relay.ledger.changes import Claim
from relay.mail.destination import Destination
from relay.mail.envelope import MalformedRecord
from relay.mail.record import BodyElsewhere, LockedRecord
from relay.mail.text import printable
from workers.delivery.bodies import Bodies
from workers.delivery.copy import Copy
from workers.delivery.outcomes import Conclusion, Outcomes


class Loading:
    """Loads copies for one destination."""

    def __init__(self, destination: Destination, bodies: Bodies, outcomes: Outcomes) -> None:
        self._destination = destination
        self._bodies = bodies
        self._outcomes = outcomes

    async def load(self, claim: Claim, job_id: str) -> Copy | Conclusion:
        """Return the copy to deliver, or what it has come to without a try. Raises RedisError, OSError."""
        try:
            message = await self._bodies.take(claim.id)
        except BodyElsewhere as place:
            return self._outcomes.fail(claim, f"554 5.3.0 {place}: run failed retry there")
        except LockedRecord as error:
            # Ours to mend, not the message's fault: it is tried again, and sent as soon as the key is here.
            return self._outcomes.postpone(claim, job_id, f"451 4.3.5 {error}")
        except MalformedRecord as error:
            reason = printable(str(error))
            metrics.damaged_records.labels("redis").inc()
            maillog.record_damaged(claim.id, self._destination.name, reason)
            return self._outcomes.fail(claim, f"554 5.3.0 {reason}")
        if message is None:
            if await self._bodies.is_owed(claim.id, self._destination.name):
                maillog.body_missing(claim.id, self._destination.name)
            # Else another worker, whose lease had ended, has delivered it since it was claimed, or it was dropped.
            return self._outcomes.forget(claim.id)
        copy = Copy.of(claim, message, self._destination)
        if not copy.owed:  # never settled unsent: what is promised to nobody is no copy, so this record is at odds
            return self._outcomes.fail(claim, "554 5.3.0 neither its record nor its state names a recipient")
        return copy
