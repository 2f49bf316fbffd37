"""The courier of one backup: claims the copies of jobs, delivers several at once, sees to every outcome.

Lives in one event loop for the whole life of a worker process, with its pool of kept connections. Its runners
(runners.py) take copy after copy from whichever job has some left (batches.py) to the server (rounds.py). Delivery
trouble never raises: a copy is settled, deferred, failed, or given back untried while the server is in trouble, with
its job, of which one is taken for each probe. A probe is never the same copy again where there is another; when the
server seems to refuse everything, it is one of the whole backlog that is least like what was refused. Told to drain, it
gives back what it has not tried. What still waits for a slow reply when the rest of a job is done (a final dot may take
ten minutes) keeps its lease, not the job.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import cast

from redis.exceptions import RedisError

from relay import faultpoints, maillog, metrics
from relay.client.pool import Pool
from relay.config.loader import Settings
from relay.ledger import archive, changes, keys
from relay.ledger.changes import Claim, Heard
from relay.ledger.continuity import warning
from relay.mail.destination import Destination
from relay.mail.envelope import MalformedRecord
from relay.mail.ids import text as as_text
from relay.mail.record import BodyElsewhere, LockedRecord
from relay.mail.text import printable
from relay.redisio import pipeline
from relay.redisio.clients import async_client, sync_client
from workers.delivery.batches import Batch, Batches
from workers.delivery.bodies import Bodies
from workers.delivery.connection_run import ConnectionRuns
from workers.delivery.copy import Copy
from workers.delivery.health import Health
from workers.delivery.outbox import Outbox
from workers.delivery.outcomes import Outcomes
from workers.delivery.refusals import Refusals
from workers.delivery.retry import Breaker, Width
from workers.delivery.runners import SLOW, Runner, Runners
from workers.jobs import Interrupted

_REFUSALS = 5  # on one connection in a row; a Postfix slows down after ten
_LEASE = 60.0
_RENEW = 15.0
_STRAGGLER = SLOW + 1.0  # seconds that a job waits for its last copies, as the next job does for it
_LONGEST_PROBE = 60.0
_BULK_SECONDS = 30.0
_SAMPLE, _NEWEST = 30, 10  # copies of the whole backlog, for one that is unlike what was refused
_IN_HAND = 10  # copies that a connection delivers of what is in hand at once: the last ones leave others idle
_BUSY_RETRY = 5.0  # seconds until a requeued copy is asked for again that is being delivered just now


class Courier:
    """Delivers to one destination; see ``workers.jobs.Courier`` for the contract with the worker."""

    def __init__(self, settings: Settings, destination: Destination, worker: str, redis_url: str) -> None:
        seconds = settings.redis.timeout_seconds
        self._destination = destination
        self._worker = worker
        server = settings.redis.at(redis_url)
        self._redis = async_client(server, seconds)
        self._bulk = async_client(server, max(_BULK_SECONDS, seconds))
        jobs = sync_client(server, seconds)
        self._outbox = Outbox(self._redis, jobs, destination.name, now=self._now, remembers=bool(server.sentinels))
        self._outcomes = Outcomes(
            destination, jobs, self._outbox, settings.retry, failed_ttl=settings.failed.ttl, now=self._now
        )
        self._wires = pipeline.Pipelines(self._redis)
        self._bodies = Bodies(self._wires, self._bulk, archive.folder(settings.state_dir))
        self._width = Width(destination.connections)
        self._pool = Pool(
            destination,
            local_hostname=settings.smtp.domain,
            timeouts=settings.relay.timeouts,
            limit=self._width.most,
            max_refusals=_REFUSALS,
        )
        self._health = Health(self._redis, destination.name, self._now)
        self._breaker = Breaker(
            self._width.now, min(_LONGEST_PROBE, settings.retry.longest), on_change=self._health.on_change
        )
        self._batches = Batches(self._outcomes, self._spawn)
        self._held = self._batches.held
        self._refusals = Refusals()
        self._runners = Runners(self._pool, self._batches, self._breaker, run=self._go_on)
        self._rounds = ConnectionRuns(
            destination,
            settings.relay,
            self._pool,
            self._bodies,
            self._batches,
            self._breaker,
            self._width,
            self._refusals,
            hire=self._runners.hire,
            is_held_up=lambda: self._is_held_up,
        )
        self._is_probing = False
        self._claiming = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()
        self._draining = False
        self._jobs_in_hand: set[asyncio.Task[object]] = set()
        self._heard: Heard | None = None  # how the ledger stood at the last claim
        self._flushes: object = None  # how often an operator has had all that waits tried
        self._doubt = 0.0  # what was accepted or tried until then may have been delivered since
        self._clock_offset = 0.0  # seconds that Redis's clock is ahead of ours

    @property
    def accepting(self) -> bool:
        """Whether another job may be fetched; with the breaker open one must be when a probe is due."""
        return not (self._is_waiting_for_probe or self._outbox.is_late or self._draining)

    @property
    def room(self) -> int:
        """How many copies are worth having in hand at once; with the breaker open those of one job, for the probe."""
        return 0 if self._breaker.is_open else self._breaker.window * _IN_HAND

    @property
    def _is_waiting_for_probe(self) -> bool:
        return self._breaker.is_open and self._breaker.seconds_to_probe > 0

    @property
    def _is_held_up(self) -> bool:
        return self._breaker.is_open or self._breaker.is_in_doubt or self._outbox.is_late or self._draining

    async def start(self) -> None:
        """Begin to renew leases and to report our health."""
        self._spawn(self._renew())
        self._spawn(self._runners.watch())
        self._spawn(self._outbox.follow())
        self._spawn(self._health.watch(self._breaker))

    async def drain(self) -> None:
        """Start no further copy; finish those under way, stragglers too, and write their outcomes.

        What Redis does not take in time is left to its lease: the copies go out again, once, after the next start.
        """
        self._draining = True
        self._health.turned.set()
        self._batches.wake()
        while (self._held or self._jobs_in_hand) and not self._outbox.is_stuck:  # noqa: ASYNC110 - three conditions
            await asyncio.sleep(0.02)
        if self._outbox.is_stuck:
            maillog.notice("error", "outcomes lost", destination=self._destination.name, copies=len(self._held))
            for delivering in self._jobs_in_hand:
                delivering.cancel()
        for task in self._background:
            task.cancel()
        await self._pool.close()
        await self._redis.aclose()
        await self._bulk.aclose()

    # --- one job ----------------------------------------------------------------------------------------------

    async def deliver(self, job_id: str, ids: list[str]) -> None:
        """Deliver what this job can claim.

        Raises Interrupted with copies untried: told to drain, or the server is away and its probe not yet due. A drain
        that Redis keeps from its end interrupts what is in hand: a worker without a supervisor must end all the same.
        """
        task = cast("asyncio.Task[object]", asyncio.current_task())
        self._jobs_in_hand.add(task)
        try:
            await self._deliver(job_id, ids)
        except asyncio.CancelledError:
            if self._draining and self._outbox.is_stuck:
                raise Interrupted from None
            raise
        finally:
            self._jobs_in_hand.discard(task)

    async def _deliver(self, job_id: str, ids: list[str]) -> None:
        faultpoints.reach("job fetched")
        batch = self._batches.open(job_id, await self._claim(job_id, ids))
        try:
            await self._see_through(batch)
        finally:
            self._batches.close(batch)
        untried = [item for item in batch.work if isinstance(item, Claim) or not item.is_touched]
        for item in batch.work:
            if isinstance(item, Copy) and item.is_touched:
                self._batches.interrupt(batch, item)
        await self._batches.defer(batch)
        if untried:
            self._bodies.drop([item.id for item in untried])
            await self._outcomes.give_back([item.id for item in untried])
        if batch.written:
            await asyncio.gather(*batch.written)
        if untried:
            self._held.difference_update(item.id for item in untried)
            raise Interrupted

    async def _see_through(self, batch: Batch) -> None:
        """Have a batch's copies tried, as far as that can be now; then it is over for its job."""
        while not self._draining:
            if not batch.work:
                if not await self._is_put_back(batch):
                    break
            elif self._is_waiting_for_probe:
                break  # nobody holds copies for a server that is away: an operator may want to move them
            elif self._is_held_up:
                await self._wait_for_turn(batch)
            else:
                self._runners.hire()
                batch.turned.clear()
                await batch.turned.wait()
        if batch.work or self._draining:
            await self._wait_while(batch, lambda: batch.under_way > 0)
        batch.is_over = batch.under_way > 0  # what takes too long goes on as a straggler, without the job

    async def _claim(self, job_id: str, ids: list[str]) -> list[Claim]:
        """Take the leases and fetch the small bodies, as often as it takes Redis to answer."""
        async with self._claiming:  # two jobs may name the same copies, of which at most one owns them
            return await self._claim_in_turn(job_id, ids)

    async def _claim_in_turn(self, job_id: str, ids: list[str]) -> list[Claim]:
        # A straggler has its own end, and what another job delivers is that one's. From here on they are ours, since
        # a claim gives a worker again what it has.
        in_hand = [message_id for message_id in ids if message_id in self._held]
        ids = [message_id for message_id in dict.fromkeys(ids) if message_id not in self._held]
        self._held.update(ids)
        while ids or in_hand:
            try:
                if in_hand:  # to other recipients, perhaps, while an operator wants the failed ones retried
                    await self._outcomes.retry_later(await self._outcomes.requeued(job_id, in_hand), _BUSY_RETRY)
                    in_hand = []
                    continue
                question = pipeline.CommandBatch()
                changes.claim(question, self._destination.name, job_id, self._worker, _LEASE, ids)
                question.add(("HGET", keys.HEALTH + self._destination.name, "flush"))
                answer, flushes = await self._wires.ask(question)
                claims, later = changes.claimed(answer)
                if flushes != self._flushes or any(claim.was_failed for claim in claims):
                    self._flushes = flushes
                    self._pool.renew()  # what an operator wants tried again is tried as for the first time
                self._tell_of(claims)
                await self._hear(changes.heard(answer), claims)
                claims = self._undelivered(claims)
                await self._bodies.read_ahead([claim.id for claim in claims])
            except (RedisError, OSError) as error:
                maillog.ledger_trouble("claiming copies", error)
                if self._draining:
                    self._held.difference_update(ids)
                    raise Interrupted from error
                await asyncio.sleep(0.5)
            else:
                self._held.difference_update(set(ids).difference(claim.id for claim in claims))
                if later:
                    await self._outcomes.retry_later(later, _BUSY_RETRY)
                return claims
        return []

    async def _hear(self, heard: Heard, claims: Sequence[Claim]) -> None:
        """Tell of each copy that may have been delivered once, where the ledger has turned out to be an older one."""
        known, self._heard = self._heard, heard
        self._doubt = max(self._doubt, heard.doubt)
        if known and known.identity and (heard.identity != known.identity or heard.progress <= known.progress):
            question = pipeline.CommandBatch()
            fresh = secrets.token_hex(8)
            changes.is_known(question, known.identity, known.progress + 1, fresh, count_on=False)
            ((identity, count, cause, *_),) = await self._wires.ask(question)
            self._heard = Heard(as_text(identity), int(count), heard.doubt)
            if cause:
                maillog.notice("error", warning(as_text(cause)), cause=as_text(cause))
                self._doubt = max(self._doubt, self._now())
        for claim in claims:
            last = claim.state.history[-1].at if claim.state.history else claim.accepted_at
            if last < self._doubt:
                maillog.repeated(claim.id, self._destination.name, "the ledger is an older one, or has changed")

    def _undelivered(self, claims: list[Claim]) -> list[Claim]:
        """Return the claims without those of copies that we have delivered, which a failover made forget it."""
        for claim in claims:
            if self._outbox.has_settled(claim):
                maillog.notice(
                    "warning", "delivered before a failover", id=claim.id, destination=self._destination.name
                )
                self._outbox.settle(claim.id)
        return [claim for claim in claims if not self._outbox.has_settled(claim)]

    def _tell_of(self, claims: list[Claim]) -> None:
        """Log which copies may be there already: before any is sent, by the process that sends them."""
        for claim in claims:
            if claim.before:
                maillog.repeated(claim.id, self._destination.name, f"worker {claim.before} had it in hand")

    async def _go_on(self, runner: Runner) -> None:
        """Try copy after copy, as a runner does."""
        while not self._is_held_up and self._runners.has_turn(runner):
            batch = self._batches.next()
            if batch is None:
                break
            await self._next(batch, runner)
            self._runners.hire()

    async def _next(self, batch: Batch, runner: Runner, *, is_look: bool = False) -> None:
        """Try a batch's next copy, and those whose transactions follow on the same connection."""
        item = self._batches.begin(batch)
        try:
            copy = item if isinstance(item, Copy) else await self._load(batch, item)
        except BaseException:
            self._batches.end(batch, item.id, broken=True)
            raise
        if copy is None:
            self._batches.end(batch, item.id)
        else:
            await self._rounds.make(batch, copy, runner, is_look=is_look)

    async def _wait_for_turn(self, batch: Batch) -> None:
        """Wait for the breaker to close or the outbox to catch up; be the probe when one is due."""
        breaker = self._breaker
        is_due = breaker.is_in_doubt or (breaker.is_open and breaker.seconds_to_probe == 0)
        if is_due and not (self._is_probing or self._outbox.is_late):
            self._is_probing = True
            try:
                await self._probe(batch)
            finally:
                self._is_probing = False
            return
        self._health.turned.clear()
        seconds = min(1.0, breaker.seconds_to_probe or 0.1) if breaker.is_open else 0.1
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._health.turned.wait()

    async def _probe(self, batch: Batch) -> None:
        """Try one copy alone: the one that tells most about the server. One that hangs is not waited for."""
        breaker = self._breaker
        if breaker.is_in_doubt or breaker.is_refusing or all(self._rounds.has_met_trouble(i.id) for i in batch.work):
            await self._draw(batch)
        if not batch.work:
            return
        likeness = [(self._likeness(item), random.random()) for item in batch.work]
        chosen = likeness.index(min(likeness))
        item = batch.work[chosen]
        del batch.work[chosen]
        batch.work.appendleft(item)
        probe = self._runners.employ(lambda runner: self._next(batch, runner, is_look=True))
        _, hangs = await asyncio.wait({probe}, timeout=SLOW)
        if hangs and breaker.is_open:
            breaker.opens(breaker.reason)

    async def _draw(self, batch: Batch) -> None:
        """Add copies to a batch from the whole backlog: its own may all be like what was refused."""
        question = pipeline.CommandBatch()
        key = keys.PENDING + self._destination.name
        question.add(("ZRANDMEMBER", key, _SAMPLE))
        question.add(("ZREVRANGE", key, 0, _NEWEST - 1))  # where nearly all others wait for their next try
        try:
            drawn, newest = await self._wires.ask(question)
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("looking for a probe", error)
            return
        found: list[str] = [as_text(message_id) for message_id in (*drawn, *newest)]
        ids = [message_id for message_id in found if message_id not in self._held]
        batch.work.extend(await self._claim(batch.job, ids))

    def _likeness(self, item: Claim | Copy) -> int:
        """Return how little a copy would tell about the server."""
        message = item.message if isinstance(item, Copy) else self._bodies.at_hand(item.id)
        likeness = 8 * self._rounds.has_met_trouble(item.id)
        if message is None:  # a large one
            return likeness + 3
        return likeness + self._refusals.likeness(message.envelope, tried=item.state.attempts > 0)

    async def _is_put_back(self, batch: Batch) -> bool:
        """Wait for what is under way; says whether some of it is to be tried again."""
        await self._wait_while(batch, lambda: batch.under_way > 0 and not batch.work)
        return bool(batch.work)

    @staticmethod
    async def _wait_while(batch: Batch, condition: Callable[[], bool]) -> None:
        """Wait while this is so, but no longer than for a straggler."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_STRAGGLER):
                while condition():
                    batch.turned.clear()
                    await batch.turned.wait()

    async def _load(self, batch: Batch, claim: Claim) -> Copy | None:
        """Return the copy to deliver, None when there is nothing left to deliver."""
        try:
            message = await self._bodies.take(claim.id)
        except (RedisError, OSError) as error:
            maillog.ledger_trouble(f"body of {claim.id}", error)
            batch.work.append(claim)
            await asyncio.sleep(0.5)
            return None
        except BodyElsewhere as place:
            self._batches.note(
                batch, claim.id, self._outcomes.fail(claim, f"554 5.3.0 {place}: run failed retry there")
            )
            return None
        except LockedRecord as error:
            # Ours to mend, not the message's fault: it is tried again, and sent as soon as the key is here.
            self._batches.note(batch, claim.id, *self._outcomes.postpone(claim, batch.job, f"451 4.3.5 {error}"))
            return None
        except MalformedRecord as error:
            reason = printable(str(error))
            metrics.damaged_records.labels("redis").inc()
            maillog.record_damaged(claim.id, self._destination.name, reason)
            self._batches.note(batch, claim.id, self._outcomes.fail(claim, f"554 5.3.0 {reason}"))
            return None
        if message is None:
            self._batches.note(batch, claim.id, self._outcomes.forget(claim.id))
            return None
        copy = Copy.of(claim, message, self._destination)
        if not copy.owed:  # never settled unsent: what is promised to nobody is no copy, so this record is at odds
            reason = "554 5.3.0 neither its record nor its state names a recipient"
            self._batches.note(batch, claim.id, self._outcomes.fail(claim, reason))
            return None
        return copy

    # --- in the background ------------------------------------------------------------------------------------

    def _now(self) -> float:
        return time.time() + self._clock_offset

    async def _renew(self) -> None:
        while True:
            pause = _RENEW
            try:
                seconds, micros = await self._redis.time()
                self._clock_offset = int(seconds) + int(micros) / 1e6 - time.time()
                if self._held:
                    async with self._redis.pipeline(transaction=False) as pipe:
                        changes.renew(pipe, self._destination.name, self._now() + _LEASE, list(self._held))
                        await pipe.execute()
            except (RedisError, OSError) as error:
                maillog.ledger_trouble("renewing leases", error)
                pause = 1.0
            await asyncio.sleep(pause)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
