"""The courier of one backup: claims the copies of a job, delivers several at once, sees to every outcome.

Lives in one event loop for the whole life of a worker process, with its pool of kept connections. Delivery
trouble never raises: a copy is settled, deferred, failed, or given back untried while the server is in trouble,
with its job, of which one is taken for each probe. Told to drain, it gives back what it has not tried. What still
waits for a slow reply when the rest of a job is done (a final dot may take ten minutes) keeps its lease, not the job.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from relay import faults, ledger, maillog, metrics
from relay.connection import ClientError
from relay.envelope import BodyElsewhere, Destination, Reply
from relay.ledger import Claim, CopyState
from relay.pool import Pool
from relay.server import async_client, sync_client
from relay.settings import Settings
from workers.bodies import Bodies
from workers.copies import Copy
from workers.health import Health
from workers.jobs import Interrupted
from workers.outbox import Outbox
from workers.outcomes import Outcomes
from workers.retry import Breaker
from workers.transaction import Outcome, Unfit, send

_LEASE = 60.0
_RENEW = 15.0
_STRAGGLER = 30.0  # seconds that a job waits for its last copies
_LONGEST_PROBE = 60.0
_BULK_SECONDS = 30.0
_BUSY_RETRY = 5.0  # seconds until a requeued copy is asked for again that is being delivered just now


@dataclass(slots=True)
class _Batch:
    """The copies of one job: what is to be tried, what is deferred, what is being written."""

    job: str
    work: deque[Claim | Copy]
    deferred: dict[str, tuple[CopyState, float]] = field(default_factory=dict)
    written: list[asyncio.Future[None]] = field(default_factory=list)
    runners: set[asyncio.Task[None]] = field(default_factory=set)
    is_over: bool = False  # the job has returned without its stragglers


class Courier:
    """Delivers to one destination; see ``workers.jobs.Courier`` for the contract with the worker."""

    def __init__(self, settings: Settings, destination: Destination, worker: str, redis_url: str) -> None:
        seconds = settings.redis.timeout_seconds
        self._settings = settings
        self._destination = destination
        self._worker = worker
        self._redis = async_client(redis_url, seconds)
        self._bulk = async_client(redis_url, max(_BULK_SECONDS, seconds))
        jobs = sync_client(redis_url, seconds)
        self._outbox = Outbox(self._redis, jobs, destination.name)
        self._outcomes = Outcomes(
            destination, jobs, self._outbox, settings.retry, failed_ttl=settings.failed.ttl, now=self._now
        )
        self._bodies = Bodies(self._redis, self._bulk)
        self._pool = Pool(
            destination,
            local_hostname=settings.smtp.domain,
            connect_timeout=settings.relay.timeout_seconds,
            limit=destination.connections,
        )
        self._health = Health(self._redis, destination.name, self._now)
        self._breaker = Breaker(
            destination.connections, min(_LONGEST_PROBE, settings.retry.longest), on_change=self._health.on_change
        )
        self._held: set[str] = set()  # ids whose leases are ours
        self._stragglers: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._draining = False
        self._jobs_in_hand = 0
        self._clock_offset = 0.0  # seconds that Redis's clock is ahead of ours

    @property
    def accepting(self) -> bool:
        """Whether another job may be fetched; with the breaker open one must be when a probe is due."""
        return not (self._is_waiting_for_probe or self._outbox.is_late or self._draining)

    @property
    def _is_waiting_for_probe(self) -> bool:
        return self._breaker.is_open and self._breaker.seconds_to_probe > 0

    @property
    def _is_held_up(self) -> bool:
        return self._breaker.is_open or self._outbox.is_late or self._draining

    async def start(self) -> None:
        """Begin to renew leases and to report our health."""
        self._spawn(self._renew())
        self._spawn(self._health.watch(self._breaker))

    async def drain(self) -> None:
        """Start no further copy; finish those under way, stragglers too, and write their outcomes.

        What Redis does not take in time is left to its lease: the copies go out again, once, after the next start.
        """
        self._draining = True
        self._health.turned.set()
        while (self._held or self._jobs_in_hand) and not self._outbox.is_stuck:  # noqa: ASYNC110 - three conditions
            await asyncio.sleep(0.02)
        if self._outbox.is_stuck:
            maillog.notice("error", "outcomes lost", destination=self._destination.name, copies=len(self._held))
        for task in self._background:
            task.cancel()
        await self._pool.close()
        await self._redis.aclose()
        await self._bulk.aclose()

    # --- one job ----------------------------------------------------------------------------------------------

    async def deliver(self, job_id: str, ids: list[str]) -> None:
        """Deliver what this job can claim.

        Raises Interrupted with copies untried: told to drain, or the server is away and its probe not yet due.
        """
        self._jobs_in_hand += 1
        try:
            await self._deliver(job_id, ids)
        finally:
            self._jobs_in_hand -= 1

    async def _deliver(self, job_id: str, ids: list[str]) -> None:
        faults.reach("job fetched")
        batch = _Batch(job_id, deque(await self._claim(job_id, ids)))
        while batch.work and not self._draining:
            if self._is_waiting_for_probe and not batch.runners:
                break  # nobody holds copies for a server that is away: an operator may want to move them
            if self._is_held_up:
                await self._wait_for_turn(batch)
            else:
                self._hire(batch)
                await self._until_change(batch)
        await self._dismiss(batch)
        untried = [item for item in batch.work if isinstance(item, Claim) or not item.is_touched]
        for item in batch.work:
            if isinstance(item, Copy) and item.is_touched:
                self._note(batch, item.id, *self._outcomes.interrupted(item, batch.job))
        await self._defer(batch)
        if untried:
            self._bodies.drop([item.id for item in untried])
            await self._outcomes.give_back([item.id for item in untried])
        if batch.written:
            await asyncio.gather(*batch.written)
        if untried:
            self._held.difference_update(item.id for item in untried)
            raise Interrupted

    async def _claim(self, job_id: str, ids: list[str]) -> list[Claim]:
        """Take the leases and fetch the small bodies, as often as it takes Redis to answer."""
        ids = [message_id for message_id in ids if message_id not in self._held]  # a straggler has its own end
        while ids:
            try:
                async with self._redis.pipeline(transaction=True) as pipe:
                    ledger.claim(pipe, self._destination.name, job_id, self._worker, _LEASE, ids)
                    claims, later = ledger.claimed((await pipe.execute())[0])
                self._held.update(claim.id for claim in claims)
                await self._bodies.read_ahead([claim.id for claim in claims])
            except (RedisError, OSError) as error:
                maillog.ledger_trouble("claiming copies", error)
                if self._draining:
                    self._held.difference_update(ids)
                    raise Interrupted from error
                await asyncio.sleep(0.5)
            else:
                if later:
                    await self._outcomes.retry_later(later, _BUSY_RETRY)
                return claims
        return []

    def _hire(self, batch: _Batch) -> None:
        """Have as many runners as the window allows and the work needs."""
        for _ in range(min(self._breaker.window - len(batch.runners), len(batch.work))):
            task = asyncio.create_task(self._run(batch))
            batch.runners.add(task)
            task.add_done_callback(batch.runners.discard)

    async def _run(self, batch: _Batch) -> None:
        while batch.work and not self._is_held_up and len(batch.runners) <= self._breaker.window:
            await self._next(batch)
            self._hire(batch)

    async def _next(self, batch: _Batch) -> None:
        item = batch.work.popleft()
        copy = item if isinstance(item, Copy) else await self._load(batch, item)
        if copy is not None:
            await self._attempt(batch, copy)

    async def _until_change(self, batch: _Batch) -> None:
        """Wait while the runners run: until the work is given out, or something holds us up."""
        while batch.runners and batch.work and not self._is_held_up:
            await asyncio.wait(batch.runners, return_when=asyncio.FIRST_COMPLETED)

    async def _wait_for_turn(self, batch: _Batch) -> None:
        """Wait for the breaker to close or the outbox to catch up; be the probe when one is due."""
        if self._breaker.is_open and self._breaker.seconds_to_probe == 0:
            await self._next(batch)
            return
        self._health.turned.clear()
        seconds = min(1.0, self._breaker.seconds_to_probe) if self._breaker.is_open else 0.1
        try:
            async with asyncio.timeout(seconds):
                await self._health.turned.wait()
        except TimeoutError:
            pass

    async def _dismiss(self, batch: _Batch) -> None:
        """Wait for the runners; whoever takes too long goes on as a straggler, without the job."""
        if batch.runners:
            _, slow = await asyncio.wait(set(batch.runners), timeout=_STRAGGLER)
            self._background.update(slow)
            for task in slow:
                task.add_done_callback(self._background.discard)
        batch.is_over = bool(batch.runners)

    async def _defer(self, batch: _Batch) -> None:
        deferred, batch.deferred = batch.deferred, {}
        if deferred:
            await self._outcomes.defer(deferred)
            self._held.difference_update(deferred)

    # --- one copy ---------------------------------------------------------------------------------------------

    async def _load(self, batch: _Batch, claim: Claim) -> Copy | None:
        """Return the copy to deliver, None when there is nothing left to deliver."""
        try:
            message = await self._bodies.take(claim.id)
        except (RedisError, OSError) as error:
            maillog.ledger_trouble(f"body of {claim.id}", error)
            batch.work.append(claim)
            await asyncio.sleep(0.5)
            return None
        except BodyElsewhere as place:
            self._note(batch, claim.id, self._outcomes.fail(claim, f"554 5.3.0 {place}: run failed retry there"))
            return None
        if message is None:
            self._note(batch, claim.id, self._outcomes.forget(claim.id))
            return None
        copy = Copy.of(claim, message, self._destination)
        if not copy.owed:
            self._note(batch, claim.id, self._outbox.settle(claim.id))
            return None
        return copy

    async def _attempt(self, batch: _Batch, copy: Copy) -> None:
        """Try a copy once: when this returns its outcome is being written, or it is back in the batch."""
        try:
            connection = await self._pool.lease(timeout=self._settings.relay.timeout_seconds)
        except ClientError as error:
            self._trouble()
            self._breaker.opens(str(error))
            self._put_back(batch, copy)
            return
        outcome = Outcome()
        reused = connection.transactions > 0
        try:
            await send(
                connection,
                copy.message,
                list(copy.owed),
                outcome,
                timeout=self._settings.relay.timeout_seconds,
                final_timeout=self._settings.relay.final_timeout_seconds,
            )
        except Unfit as unfit:
            copy.refuse(unfit.reply)
            self._conclude(batch, copy)
        except ClientError as error:
            connection.close()
            self._broke_off(batch, copy, outcome, error, reused=reused)
        except BaseException:
            connection.close()
            raise
        else:
            self._read(batch, copy, outcome)
        finally:
            self._pool.give_back(connection)

    def _broke_off(self, batch: _Batch, copy: Copy, outcome: Outcome, error: ClientError, *, reused: bool) -> None:
        """The connection did not carry the transaction through."""
        if reused and not outcome.replies and error.reply is None:
            self._put_back(batch, copy)  # a kept connection that the server had closed meanwhile: nobody's fault
            return
        self._trouble()
        if not outcome.replies:
            self._breaker.opens(str(error))
            self._put_back(batch, copy)
            return
        self._breaker.breaks(str(error))
        if outcome.sent:
            maillog.repeated(copy.id, self._destination.name, str(error))
        elif error.reply is not None and error.reply.is_permanent:
            copy.read(outcome, soft_bounce=self._destination.soft_bounce)  # it refused the body before its end
        copy.defer(Reply.of(451, f"4.4.2 {error}"))
        self._conclude(batch, copy)

    def _read(self, batch: _Batch, copy: Copy, outcome: Outcome) -> None:
        """Read what the server said of a transaction that it carried through."""
        server = copy.read(outcome, soft_bounce=self._destination.soft_bounce)
        if server is not None:
            self._trouble()
            self._breaker.opens(server.text)
        elif copy.is_refused and self._breaker.refuses(next(iter(copy.never.values()))):
            copy.take_back_refusals()
        else:
            if copy.taken:
                self._breaker.took()
            self._breaker.works()
        if copy.owed:  # the server is in trouble, or there were too many recipients for one transaction
            self._put_back(batch, copy)
        else:
            self._conclude(batch, copy)

    def _conclude(self, batch: _Batch, copy: Copy) -> None:
        faults.reach("backup answered")
        self._note(batch, copy.id, *self._outcomes.conclude(copy, batch.job))

    def _note(
        self,
        batch: _Batch,
        message_id: str,
        written: asyncio.Future[None] | None,
        deferred: tuple[CopyState, float] | None = None,
    ) -> None:
        """Keep track of an outcome; the lease is ours until it is in the ledger."""
        if deferred is not None:
            batch.deferred[message_id] = deferred
            if batch.is_over:
                self._spawn(self._defer(batch))
        elif written is not None:
            written.add_done_callback(lambda _: self._held.discard(message_id))
        if written is not None and not batch.is_over:
            batch.written.append(written)

    def _put_back(self, batch: _Batch, copy: Copy) -> None:
        """Have a copy tried again, without an attempt being counted."""
        if not batch.is_over:
            batch.work.appendleft(copy)
        elif copy.is_touched:
            self._note(batch, copy.id, *self._outcomes.interrupted(copy, batch.job))
        else:
            self._spawn(self._again_soon(copy))

    async def _again_soon(self, copy: Copy) -> None:
        await self._outcomes.again_soon(copy)
        self._held.discard(copy.id)

    def _trouble(self) -> None:
        metrics.deliveries.labels(self._destination.name, "trouble").inc()

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
                        ledger.renew(pipe, self._destination.name, self._now() + _LEASE, list(self._held))
                        await pipe.execute()
            except (RedisError, OSError) as error:
                maillog.ledger_trouble("renewing leases", error)
                pause = 1.0
            await asyncio.sleep(pause)

    def _spawn(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._background.add(task)
        task.add_done_callback(self._background.discard)
