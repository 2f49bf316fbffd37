"""The claims of one courier: the leases of copies taken in the ledger, their small bodies fetched with them.

Before a claimed copy is sent, the log says whether it may have been delivered already: another worker had it in hand,
or the ledger has turned out to be an older one. What was delivered here, and forgotten by Redis, is settled again.
While Redis does not answer, a claim is repeated until it does, or until the courier drains.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence

from redis.exceptions import RedisError

from relay import maillog
from relay.client.pool import Pool
from relay.ledger import changes, keys
from relay.ledger.changes import Claim, Heard
from relay.ledger.continuity import warning
from relay.mail.ids import text as as_text
from relay.redisio.pipeline import CommandBatch, Pipelines
from workers.delivery import leases
from workers.delivery.bodies import Bodies
from workers.delivery.gate import Gate
from workers.delivery.leases import Leases
from workers.delivery.outbox import Outbox
from workers.delivery.outcomes import Outcomes
from workers.jobs import Interrupted

_BUSY_RETRY = 5.0  # seconds until a requeued copy is asked for again that is being delivered just now
_SAMPLE, _NEWEST = 30, 10  # copies of the whole backlog, for one that is unlike what was refused


class Claiming:
    """Claims copies for one destination."""

    def __init__(
        self,
        destination: str,
        worker: str,
        pipelines: Pipelines,
        pool: Pool,
        bodies: Bodies,
        outcomes: Outcomes,
        outbox: Outbox,
        held: Leases,
        gate: Gate,
    ) -> None:
        self._destination = destination
        self._worker = worker
        self._pipelines = pipelines
        self._pool = pool
        self._bodies = bodies
        self._outcomes = outcomes
        self._outbox = outbox
        self._leases = held
        self._gate = gate
        self._in_turn = asyncio.Lock()
        self._heard: Heard | None = None  # how the ledger stood at the last claim
        self._flushes: object = None  # how often an operator has had all that waits tried
        self._doubt = 0.0  # what was accepted or tried until then may have been delivered since

    async def claim(self, job_id: str, ids: list[str]) -> list[Claim]:
        """Take the leases and fetch the small bodies, as often as it takes Redis to answer. Raises Interrupted."""
        async with self._in_turn:  # two jobs may name the same copies, of which at most one owns them
            await self._leases.have_left(ids)
            # A straggler has its own end, and what another job delivers is that one's. From here on the others are
            # ours, since a claim gives a worker again what it has.
            held, fresh = self._leases.held, self._leases.fresh
            in_hand = [message_id for message_id in ids if message_id in held and message_id not in fresh]
            ids = [message_id for message_id in dict.fromkeys(ids) if message_id not in held]
            self._leases.take(ids)
            while ids or in_hand:
                try:
                    if in_hand:  # to other recipients, perhaps, while an operator wants the failed ones retried
                        await self._outcomes.retry_later(await self._outcomes.requeued(job_id, in_hand), _BUSY_RETRY)
                        in_hand = []
                        continue
                    claims, later = await self._ask(job_id, ids)
                except (RedisError, OSError) as error:
                    maillog.ledger_trouble("claiming copies", error)
                    if self._gate.is_draining:
                        self._leases.free(ids)
                        raise Interrupted from error
                    await asyncio.sleep(0.5)
                else:
                    self._leases.free(set(ids).difference([claim.id for claim in claims]))
                    if later:
                        await self._outcomes.retry_later(later, _BUSY_RETRY)
                    return claims
            return []

    async def claim_sample(self, job_id: str) -> list[Claim]:
        """Claim some copies of the whole backlog that no job owns, or none while Redis is away. Raises Interrupted."""
        question = CommandBatch()
        key = keys.PENDING + self._destination
        question.add(("ZRANDMEMBER", key, _SAMPLE))
        question.add(("ZREVRANGE", key, 0, _NEWEST - 1))  # where nearly all others wait for their next try
        try:
            drawn, newest = await self._pipelines.ask(question)
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("looking for a probe", error)
            return []
        found: list[str] = [as_text(message_id) for message_id in (*drawn, *newest)]
        return await self.claim(job_id, [message_id for message_id in found if message_id not in self._leases.held])

    async def _ask(self, job_id: str, ids: list[str]) -> tuple[list[Claim], list[str]]:
        """Claim once: what is ours now, and which failed copies to ask for later. Raises RedisError, OSError."""
        question = CommandBatch()
        changes.claim(question, self._destination, job_id, self._worker, leases.SECONDS, ids)
        question.add(("HGET", keys.HEALTH + self._destination, "flush"))
        asked_at = time.monotonic()
        answer, flushes = await self._pipelines.ask(question)
        claims, later = changes.claimed(answer)
        self._leases.hear(changes.heard(answer).at, asked_at)
        if flushes != self._flushes or [claim for claim in claims if claim.was_failed]:
            self._flushes = flushes
            self._pool.renew()  # what an operator wants tried again is tried as for the first time
        claims = self._undelivered(claims)
        for claim in claims:
            if claim.before:  # logged before any is sent, by the process that sends them
                maillog.repeated(claim.id, self._destination, f"worker {claim.before} had it in hand")
        await self._compare(changes.heard(answer), claims)
        await self._bodies.read_ahead(claims)
        return claims, later

    def note(self, identity: str, count: int) -> None:
        """Take how the ledger stands, between two claims: first tries make none. What differs is for the next claim."""
        if self._in_turn.locked():  # what a claim that is under way has counted would look like an older ledger
            return
        known = self._heard
        if known is None or (identity == known.identity and count > known.progress):
            self._heard = Heard(identity, count, known.doubt if known else 0.0)

    async def _compare(self, heard: Heard, claims: Sequence[Claim]) -> None:
        """Log each copy that may have been delivered once, where the ledger has turned out to be an older one."""
        known, self._heard = self._heard, heard
        self._doubt = max(self._doubt, heard.doubt)
        if known and known.identity and (heard.identity != known.identity or heard.progress <= known.progress):
            question = CommandBatch()
            fresh = secrets.token_hex(8)
            changes.is_known(question, known.identity, known.progress + 1, fresh, count_on=False)
            ((identity, count, cause, *_),) = await self._pipelines.ask(question)
            self._heard = Heard(as_text(identity), int(count), heard.doubt)
            if cause:
                maillog.notice("error", warning(as_text(cause)), cause=as_text(cause))
                self._doubt = max(self._doubt, self._leases.clock.now())
        for claim in claims:
            last = claim.state.history[-1].at if claim.state.history else claim.accepted_at
            if last < self._doubt:
                maillog.repeated(claim.id, self._destination, "the ledger is an older one, or has changed")

    def _undelivered(self, claims: list[Claim]) -> list[Claim]:
        """Return the claims without those of copies that we have delivered: the ledger is older than that."""
        delivered = [claim for claim in claims if self._outbox.has_settled(claim)]
        for claim in delivered:
            text = "delivered before Redis lost that: not sent again"
            maillog.notice("warning", text, id=claim.id, destination=self._destination)
            self._outbox.settle(claim.id)
        if delivered:  # what others have delivered may be forgotten, too
            self._doubt = max(self._doubt, self._leases.clock.now())
        return [claim for claim in claims if claim not in delivered] if delivered else claims
