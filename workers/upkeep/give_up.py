"""Gives up copies that are too old at a destination that is paused: they become failed ones.

A copy that is being delivered is left alone: each is claimed first, as the job that owns it. Copies are failed in
batches, and only so many in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from redis import Redis

from relay import maillog
from relay.config.loader import Settings
from relay.ledger import changes, divergence, queries, rq_jobs
from relay.ledger import keys as ledger_keys
from relay.ledger.changes import Claim
from relay.ledger.copy_state import Attempt, CopyState
from relay.ledger.divergence import Answer
from relay.ledger.health import Health
from relay.ledger.redis_clock import RedisClock
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.reply import Reply
from relay.mail.reply_text import Known
from relay.trace import emitter, events
from workers.queues import failed

_BATCH = 100
_AT_ONCE = 5000  # copies in one sweep
_CLAIM_SECONDS = 30.0


class GivingUp:
    """Gives up what is too old at one destination. ``ours`` is what replies are freed of before they are grouped."""

    def __init__(
        self, connection: Redis, settings: Settings, destination: Destination, clock: RedisClock, ours: Known
    ) -> None:
        self._connection = connection
        self._give_up, self._ttl = settings.retry.give_up, settings.failed.ttl
        self._destination = destination
        self._clock = clock
        self._ours = ours

    def run(self, tick: Callable[[], object]) -> Iterator[str]:
        """Fail copies that are pending for longer than retry.give_up while their destination is paused; yield them."""
        name = self._destination.name
        health = Health.read(self._connection, name)
        if not health.is_paused:
            return
        reply = f"given up while the destination was paused: {health.reason}"
        clock = self._clock
        before = clock.ago(self._give_up)

        def is_old(since: float) -> bool:
            """Return whether a copy is older than retry.give_up, not counting the time in which its backup was held."""
            return since <= clock.ago(self._give_up + health.held_seconds(since, clock.now()))

        done = 0
        for page in queries.pages(self._connection, ledger_keys.PENDING + name, until=before, size=_BATCH):
            tick()
            ids = [message_id for message_id, _ in page]
            states = cast("list[bytes | None]", self._connection.hmget(ledger_keys.OWN + name, ids))
            # For a moved copy, the time of its move counts.
            old = [
                message_id
                for (message_id, accepted), state in zip(page, states, strict=True)
                if is_old(max(accepted, CopyState.from_wire(state).since))
            ]
            if old:
                yield from self._fail(old, reply)
            done += len(old)
            if done >= _AT_ONCE:
                break

    def _fail(self, ids: Sequence[str], reply: str) -> list[str]:
        """Fail copies that are not being delivered; returns their ids."""
        connection, name = self._connection, self._destination.name
        with connection.pipeline(transaction=True) as pipe:
            for message_id, owner in zip(ids, changes.owners(connection, name, ids), strict=True):
                changes.claim(pipe, name, owner, "reconciler", _CLAIM_SECONDS, [message_id])
            claims = [claim for result in pipe.execute() for claim in changes.claimed(result)[0]]
        envelopes = queries.envelopes(connection, [claim.id for claim in claims])
        clock = round(changes.now(connection), 3)
        queue = rq_jobs.queue(connection, name)
        with connection.pipeline(transaction=True) as pipe:
            for claim, envelope in zip(claims, envelopes, strict=True):
                state = self._counted(pipe, claim, envelope, reply)
                failure = replace(state, history=(*state.history, Attempt(clock, reply)))
                failed.add_failure(pipe, queue, name, claim.id, failure, None, reply, self._ttl, envelope)
            pipe.execute()
        for claim, envelope in zip(claims, envelopes, strict=True):
            count = len(queries.addressees(envelope, self._destination, claim.state))
            maillog.failed(claim.id, name, count, claim.state.attempts, reply)
            if (trace := emitter.current) is not None:
                parts = [(events.FAILED, count, (), reply)]
                trace.note(events.tried(claim.id, name, claim.state.attempts, None, parts))
        return [claim.id for claim in claims]

    def _counted(self, pipe: Any, claim: Claim, envelope: Envelope | None, reply: str) -> CopyState:
        """Add the counting of a copy to a MULTI; returns its state."""
        if envelope is None:
            return claim.state
        destination = self._destination
        answer = Answer(divergence.GIVEN_UP, divergence.OWN, Reply.of(451, reply))
        owed = envelope.owed_to(destination) if claim.state.owed is None else claim.state.owed
        answers = dict.fromkeys((i for i in owed if i < len(envelope.recipients)), answer)
        state, noted = divergence.count(claim.state, envelope, destination.name, answers, self._ours)
        divergence.note(pipe, destination.name, envelope, claim.state.attempts, noted)
        return state
