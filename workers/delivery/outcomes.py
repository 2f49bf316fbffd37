"""What becomes of copies: settled, deferred or failed, as changes of the ledger and as RQ jobs.

All copies that one job defers leave it together, as one scheduled job; a copy that fails becomes a failed job
of its own, for inspection and requeue. Nothing here fails: the outbox writes until Redis has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple

from redis import Redis
from rq.job import JobStatus

from relay import maillog, metrics
from relay.config.model import RetrySettings
from relay.ledger import changes, rq_jobs
from relay.ledger.changes import Claim
from relay.ledger.copy_state import CopyState
from relay.ledger.redis_clock import RedisClock
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.reply import Reply
from relay.trace import emitter, events
from workers.delivery.copy import Copy, begun
from workers.delivery.divergences import Diverged, Divergences
from workers.delivery.outbox import Outbox
from workers.delivery.retry import next_delay
from workers.queues import failed

_INTERRUPTED = Reply.of(451, "4.3.2 the worker was stopped between two recipients")
_SOON = 1.0


class Deferral(NamedTuple):
    """A copy that is tried again after so many seconds: its state by then."""

    state: CopyState
    seconds: float
    diverged: Diverged | None = None


class Conclusion(NamedTuple):
    """What a copy has come to: the future of what is being written, and what is to be deferred, with others.

    A copy may have both, for different recipients.
    """

    written: asyncio.Future[None] | None = None
    deferral: Deferral | None = None


class Outcomes:
    """Turns copies into outcomes, for one destination."""

    def __init__(
        self,
        destination: Destination,
        worker: str,
        jobs: Redis,
        outbox: Outbox,
        retry: RetrySettings,
        *,
        failed_ttl: float,
        divergences: Divergences,
        clock: RedisClock,
        held_seconds: Callable[[float, float], float],
        names_recipients: bool = False,
    ) -> None:
        """``held_seconds`` says for how long the destination was held between two times: no copy ages then.

        ``names_recipients``: the log names them.
        """
        self._held_seconds = held_seconds
        self._names_recipients = names_recipients
        self._divergences = divergences
        self._name = destination.name
        self._worker = worker
        self._jobs = jobs
        self._queue = rq_jobs.queue(jobs, destination.name)
        self._outbox = outbox
        self._retry = retry
        self._failed_ttl = failed_ttl
        self._delivered = metrics.increment(metrics.deliveries, self._name, "delivered")
        self._age = metrics.observer(metrics.delivery_age_seconds, self._name)
        self._clock = clock

    def conclude(self, copy: Copy, job: str) -> Conclusion:
        """Write what became of a copy whose recipients all have an answer.

        The deferral, for those who are still owed it, is the caller's to hand to ``defer``, together with others.
        """
        name, now = self._name, self._clock.now()
        attempts = copy.state.attempts + 1
        written, deferral = None, None
        delay = self._delay(copy.state, now) if copy.later else None
        counted, diverged = self._divergences.count(copy, is_given_up=delay is None)
        if copy.later:
            reply = copy.said(copy.later)
            if delay is None:
                copy.never.update(copy.later)
                copy.later = {}
            else:
                state = replace(counted.tried(now, reply).owed_by(copy.later), job=job)
                deferral = Deferral(state, delay, None if copy.never else diverged)
                metrics.deliveries.labels(name, "deferred").inc()
                maillog.deferred(copy.id, name, len(copy.later), attempts, reply, delay)
        if copy.yes:
            envelope = copy.message.envelope
            age = self._clock.age(envelope.received_at)
            self._delivered(1)
            self._age(age)
            to = [envelope.recipients[i].address for i in copy.yes] if self._names_recipients else ()
            maillog.delivered(envelope, name, len(copy.yes), attempts, age, to=to)
        if copy.never:
            reply = copy.said(copy.never)
            failure = counted.tried(now, reply).owed_by(copy.never)
            remains = deferral.state if deferral else None
            written = self._fail(copy.id, failure, remains, reply, copy.message.envelope, diverged)
            metrics.deliveries.labels(name, "failed").inc()
            maillog.failed(copy.id, name, len(copy.never), attempts, reply)
        elif deferral is None:
            written = self._outbox.settle(copy.id, counted=bool(copy.state.open))
        if (trace := emitter.current) is not None:
            trace.note(events.tried(copy.id, name, attempts, copy.seconds, copy.parts(), delay))
        return Conclusion(written, deferral)

    def _delay(self, state: CopyState, now: float) -> float | None:
        age = self._clock.age(state.since) - self._held_seconds(state.since, now)
        return next_delay(self._retry, state.tries + 1, age)

    def interrupted(self, copy: Copy, job: str) -> Conclusion:
        """Conclude a copy of which only some recipients were asked before the stop signal."""
        copy.defer(_INTERRUPTED, is_about_it=False)
        return self.conclude(copy, job)

    def defer(self, deferrals: dict[str, Deferral]) -> asyncio.Future[None]:
        """Schedule one job for copies that are tried again, at the earliest time of any."""
        job = rq_jobs.create(self._queue, self._name, list(deferrals), JobStatus.SCHEDULED)
        owned = {message_id: replace(deferral.state, job=job.id) for message_id, deferral in deferrals.items()}
        when = datetime.fromtimestamp(self._clock.now() + min(deferral.seconds for deferral in deferrals.values()), UTC)

        def change(pipe: object) -> None:
            for deferral in deferrals.values():
                self._divergences.note(pipe, deferral.diverged)
            changes.defer(pipe, self._name, owned, noise=self._divergences.noise)
            rq_jobs.schedule(pipe, self._queue, job, when)

        return self._outbox.write(change)

    def hurry(self) -> None:
        """Have what waits written as soon as possible: a job waits for its end."""
        self._outbox.hurry()

    def again_soon(self, item: Claim | Copy) -> asyncio.Future[None]:
        """Give an untried copy a job of its own, when the one it came with is over."""
        state = item.state
        if isinstance(item, Copy) and state.owed is not None:
            state = replace(state, owed=tuple(item.owed))
        return self.defer({item.id: Deferral(state, _SOON)})

    async def requeued(self, job: str, ids: Sequence[str]) -> list[str]:
        """Return those of these copies that are failed, too, and to be retried by this job. Raises RedisError."""
        owners = await asyncio.to_thread(changes.owners, self._jobs, self._name, ids, failed=True)
        return [message_id for message_id, owner in zip(ids, owners, strict=True) if owner == job]

    async def retry_later(self, ids: Sequence[str], seconds: float) -> None:
        """Ask again for failed copies that an operator requeued while they are delivered to other recipients."""
        if not ids:
            return
        job = rq_jobs.create(self._queue, self._name, ids, JobStatus.SCHEDULED)
        when = datetime.fromtimestamp(self._clock.now() + seconds, UTC)

        def change(pipe: object) -> None:
            failed.adopt(pipe, self._name, ids, job.id)
            rq_jobs.schedule(pipe, self._queue, job, when)

        await asyncio.wait({self._outbox.write(change)})

    def postpone(self, claim: Claim, job: str, reply: str) -> Conclusion:
        """Defer a copy that cannot be tried here as yet."""
        now = self._clock.now()
        state = begun(claim).tried(now, reply)
        delay = next_delay(self._retry, state.tries, self._clock.age(state.since))
        if delay is None:
            return self.fail(claim, reply)
        metrics.deliveries.labels(self._name, "deferred").inc()
        self._tell(claim.id, state, events.DEFERRED, reply, delay)
        maillog.deferred(claim.id, self._name, len(state.owed or ()), state.attempts, reply, delay)
        return Conclusion(deferral=Deferral(replace(state, job=job), delay))

    def fail(self, claim: Claim, reply: str) -> Conclusion:
        """Put a copy (back) on the failed list that cannot be tried here."""
        self._tell(claim.id, claim.state, events.FAILED, reply)
        maillog.failed(claim.id, self._name, len(claim.state.owed or ()), claim.state.attempts, reply)
        return Conclusion(self._fail(claim.id, claim.state.tried(self._clock.now(), reply), None, reply, None))

    def _tell(self, message_id: str, state: CopyState, verdict: str, reply: str, delay: float | None = None) -> None:
        """Tell the trace of a copy that could not be tried here."""
        if (trace := emitter.current) is not None:
            parts = [(verdict, len(state.owed or ()), (), reply)]
            trace.note(events.tried(message_id, self._name, state.attempts, None, parts, delay))

    def forget(self, message_id: str) -> Conclusion:
        """Remove a pending copy whose body is gone."""
        return Conclusion(self._outbox.write(lambda pipe: changes.drop(pipe, self._name, [message_id], pending=True)))

    async def give_back(self, ids: Sequence[str], *, with_job: bool = False) -> None:
        """Give leases back untried; ``with_job`` for copies whose own may have been and gone."""

        def change(pipe: object) -> None:
            changes.unlease(pipe, self._name, self._worker, ids)
            if with_job:
                rq_jobs.enqueue(pipe, self._queue, self._name, ids)

        await asyncio.wait({self._outbox.write(change)})

    def _fail(
        self,
        message_id: str,
        failure: CopyState,
        remains: CopyState | None,
        reply: str,
        envelope: Envelope | None,
        diverged: Diverged | None = None,
    ) -> asyncio.Future[None]:
        name, ttl, noise = self._name, self._failed_ttl, self._divergences.noise

        def change(pipe: object) -> None:
            self._divergences.note(pipe, diverged)
            failed.add_failure(pipe, self._queue, name, message_id, failure, remains, reply, ttl, envelope, noise=noise)

        return self._outbox.write(change)
