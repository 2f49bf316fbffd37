"""The courier of one backup: claims the copies of jobs, delivers several at once, sees to every outcome.

Lives in one event loop for the whole life of a worker process, with its pool of kept connections. Its runners, at
most as many as the breaker's window allows, take copy after copy from whichever job has some left. Delivery
trouble never raises: a copy is settled, deferred, failed, or given back untried while the server is in trouble,
with its job, of which one is taken for each probe. Told to drain, it gives back what it has not tried. What still
waits for a slow reply when the rest of a job is done (a final dot may take ten minutes) keeps its lease, not the job.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from redis.exceptions import RedisError

from relay import faults, ledger, maillog, metrics
from relay.connection import ClientError, Connection
from relay.envelope import BodyElsewhere, Destination, LockedRecord, MalformedRecord, Reply, printable
from relay.ledger import Claim, CopyState
from relay.pool import Pool
from relay.redis_clients import async_client, sync_client
from relay.settings import Settings
from workers.bodies import Bodies
from workers.copies import Copy
from workers.health import Health
from workers.jobs import Interrupted
from workers.outbox import Outbox
from workers.outcomes import Outcomes
from workers.retry import Breaker, Width
from workers.transaction import Group, Outcome, Unfit, can_follow, group, send

_LEASE = 60.0
_RENEW = 15.0
_STRAGGLER = 30.0  # seconds that a job waits for its last copies
_LONGEST_PROBE = 60.0
_BULK_SECONDS = 30.0
_ROUNDS = 10  # copies that a connection delivers of what is in hand at once: the last ones leave others idle
_SMOOTH = 20  # copies taken one after the other, each soon, before the next one's MAIL is sent behind a dot
_SOON = 2.0  # seconds that a transaction may take for that
_BUSY_RETRY = 5.0  # seconds until a requeued copy is asked for again that is being delivered just now


@dataclass(slots=True)
class _Batch:
    """The copies of one job: what is to be tried, what is deferred, what is being written."""

    job: str
    work: deque[Claim | Copy]
    under_way: int = 0
    turned: asyncio.Event = field(default_factory=asyncio.Event)  # its work is given out, a copy is done with
    deferred: dict[str, tuple[CopyState, float]] = field(default_factory=dict)
    written: list[asyncio.Future[None]] = field(default_factory=list)
    is_over: bool = False  # the job has returned without its stragglers


@dataclass(slots=True)
class _Trial:
    """A copy on a connection; ``begun`` is what was sent behind the dot of the one before, ``following`` the next."""

    batch: _Batch
    copy: Copy
    begun: Group | None = None
    outcome: Outcome = field(default_factory=Outcome)
    following: _Trial | None = None


class Courier:
    """Delivers to one destination; see ``workers.jobs.Courier`` for the contract with the worker."""

    def __init__(self, settings: Settings, destination: Destination, worker: str, redis_url: str) -> None:
        seconds = settings.redis.timeout_seconds
        self._settings = settings
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
        self._bodies = Bodies(self._redis, self._bulk)
        self._width = Width(destination.connections)
        self._pool = Pool(
            destination,
            local_hostname=settings.smtp.domain,
            connect_timeout=settings.relay.timeout_seconds,
            limit=self._width.most,
        )
        self._health = Health(self._redis, destination.name, self._now)
        self._breaker = Breaker(
            self._width.now, min(_LONGEST_PROBE, settings.retry.longest), on_change=self._health.on_change
        )
        self._held: set[str] = set()  # ids whose leases are ours
        self._batches: list[_Batch] = []
        self._runners: set[asyncio.Task[None]] = set()
        self._is_probing = False
        self._smooth = 0  # copies taken soon, since there was anything else
        self._background: set[asyncio.Task[None]] = set()
        self._draining = False
        self._jobs_in_hand = 0
        self._clock_offset = 0.0  # seconds that Redis's clock is ahead of ours

    @property
    def accepting(self) -> bool:
        """Whether another job may be fetched; with the breaker open one must be when a probe is due."""
        return not (self._is_waiting_for_probe or self._outbox.is_late or self._draining)

    @property
    def room(self) -> int:
        """How many copies are worth having in hand at once; with the breaker open those of one job, for the probe."""
        return 0 if self._breaker.is_open else self._breaker.window * _ROUNDS

    @property
    def _is_waiting_for_probe(self) -> bool:
        return self._breaker.is_open and self._breaker.seconds_to_probe > 0

    @property
    def _is_held_up(self) -> bool:
        return self._breaker.is_open or self._outbox.is_late or self._draining

    async def start(self) -> None:
        """Begin to renew leases and to report our health."""
        self._spawn(self._renew())
        self._spawn(self._outbox.follow())
        self._spawn(self._health.watch(self._breaker))

    async def drain(self) -> None:
        """Start no further copy; finish those under way, stragglers too, and write their outcomes.

        What Redis does not take in time is left to its lease: the copies go out again, once, after the next start.
        """
        self._draining = True
        self._health.turned.set()
        for batch in self._batches:
            batch.turned.set()
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
        self._batches.append(batch)
        try:
            while batch.work and not self._draining:
                if self._is_waiting_for_probe and not batch.under_way:
                    break  # nobody holds copies for a server that is away: an operator may want to move them
                if self._is_held_up:
                    await self._wait_for_turn(batch)
                else:
                    self._hire()
                    batch.turned.clear()
                    await batch.turned.wait()
            await self._dismiss(batch)
        finally:
            self._batches.remove(batch)
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
        # A straggler has its own end, and what another job asks for is that one's. From here on they are ours, since
        # a claim gives a worker again what it has.
        ids = [message_id for message_id in dict.fromkeys(ids) if message_id not in self._held]
        self._held.update(ids)
        while ids:
            try:
                async with self._redis.pipeline(transaction=True) as pipe:
                    ledger.claim(pipe, self._destination.name, job_id, self._worker, _LEASE, ids)
                    claims, later = ledger.claimed((await pipe.execute())[0])
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

    def _undelivered(self, claims: list[Claim]) -> list[Claim]:
        """Return the claims without those of copies that we have delivered, which a failover made forget it."""
        for claim in claims:
            if self._outbox.has_settled(claim):
                maillog.notice(
                    "warning", "delivered before a failover", id=claim.id, destination=self._destination.name
                )
                self._outbox.settle(claim.id)
        return [claim for claim in claims if not self._outbox.has_settled(claim)]

    def _hire(self) -> None:
        """Have as many runners as the window allows and the work needs."""
        missing = self._breaker.window - len(self._runners)
        for _ in range(min(missing, sum(len(batch.work) for batch in self._batches)) if missing > 0 else 0):
            task = asyncio.create_task(self._run())
            self._runners.add(task)
            task.add_done_callback(self._leave)

    async def _run(self) -> None:
        while not self._is_held_up and len(self._runners) <= self._breaker.window:
            batch = next((batch for batch in self._batches if batch.work), None)
            if batch is None:
                break
            await self._next(batch)
            self._hire()

    def _leave(self, task: asyncio.Task[None]) -> None:
        """Let a runner go; what it leaves undone is seen to by the jobs."""
        self._runners.discard(task)
        for batch in self._batches:
            batch.turned.set()
        if not task.cancelled() and (fault := task.exception()) is not None:
            maillog.task_failed("delivery", fault)

    async def _next(self, batch: _Batch) -> None:
        """Try a batch's next copy, and those whose transactions follow on the same connection."""
        item = self._begin(batch)
        try:
            copy = item if isinstance(item, Copy) else await self._load(batch, item)
        except BaseException:
            self._end(batch, item.id, broken=True)
            raise
        if copy is None:
            self._end(batch, item.id)
        else:
            await self._attempt(_Trial(batch, copy))

    @staticmethod
    def _begin(batch: _Batch) -> Claim | Copy:
        batch.under_way += 1
        return batch.work.popleft()

    def _end(self, batch: _Batch, message_id: str, *, broken: bool = False) -> None:
        """Note that a copy is not under way any more."""
        if broken:
            self._held.discard(message_id)  # a fault of ours: its lease runs out, and the reconciler finds it
        batch.under_way -= 1
        if not (batch.work and batch.under_way):
            batch.turned.set()

    async def _wait_for_turn(self, batch: _Batch) -> None:
        """Wait for the breaker to close or the outbox to catch up; be the probe when one is due."""
        if self._breaker.is_open and self._breaker.seconds_to_probe == 0 and not self._is_probing:
            self._is_probing = True
            try:
                await self._next(batch)
            finally:
                self._is_probing = False
            return
        self._health.turned.clear()
        seconds = min(1.0, self._breaker.seconds_to_probe or 0.1) if self._breaker.is_open else 0.1
        try:
            async with asyncio.timeout(seconds):
                await self._health.turned.wait()
        except TimeoutError:
            pass

    async def _dismiss(self, batch: _Batch) -> None:
        """Wait for what is under way; what takes too long goes on as a straggler, without the job."""
        try:
            async with asyncio.timeout(_STRAGGLER):
                while batch.under_way:
                    batch.turned.clear()
                    await batch.turned.wait()
        except TimeoutError:
            pass
        batch.is_over = bool(batch.under_way)

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
        except LockedRecord as error:
            # Ours to mend, not the message's fault: it is tried again, and sent as soon as the key is here.
            self._note(batch, claim.id, *self._outcomes.postpone(claim, batch.job, f"451 4.3.5 {error}"))
            return None
        except MalformedRecord as error:
            self._note(batch, claim.id, self._outcomes.fail(claim, f"554 5.3.0 {printable(str(error))}"))
            return None
        if message is None:
            self._note(batch, claim.id, self._outcomes.forget(claim.id))
            return None
        copy = Copy.of(claim, message, self._destination)
        if not copy.owed:
            self._note(batch, claim.id, self._outbox.settle(claim.id))
            return None
        return copy

    async def _attempt(self, trial: _Trial) -> None:
        """Try a copy once, and others behind it: then each one's outcome is being written, or it is in its batch."""
        try:
            connection = await self._pool.lease(timeout=self._settings.relay.timeout_seconds)
        except ClientError as error:
            self._trouble()
            self._breaker.opens(str(error))
            self._untried(trial)
            return
        except BaseException:
            self._end(trial.batch, trial.copy.id, broken=True)
            raise
        reused = connection.transactions > 0
        following: _Trial | None = trial
        try:
            while following is not None:
                trial = following
                await self._transact(connection, trial, reused=reused)
                self._end(trial.batch, trial.copy.id)
                following, reused = trial.following, True
                if following is not None and not connection.is_open:
                    self._untried(following)
                    break
                self._hire()
        except BaseException:
            connection.close()
            while following is not None:
                self._end(following.batch, following.copy.id, broken=True)
                following = following.following
            raise
        finally:
            self._pool.give_back(connection)

    async def _transact(self, connection: Connection, trial: _Trial, *, reused: bool) -> None:
        """Carry out one transaction; the next one may begin behind its dot."""
        started = self._breaker.clock()

        def following() -> Group | None:
            trial.following = self._follower(connection)
            return None if trial.following is None else trial.following.begun

        try:
            await send(
                connection,
                trial.copy.message,
                list(trial.copy.owed),
                trial.outcome,
                timeout=self._settings.relay.timeout_seconds,
                final_timeout=self._settings.relay.final_timeout_seconds,
                begun=trial.begun,
                following=following,
            )
        except Unfit as unfit:
            trial.copy.refuse(unfit.reply)
            self._conclude(trial.batch, trial.copy)
        except ClientError as error:
            connection.close()
            self._smooth = 0
            self._broke_off(trial.batch, trial.copy, trial.outcome, error, reused=reused)
        else:
            if reused and trial.outcome.is_farewell:
                connection.close()
                self._put_back(trial.batch, trial.copy)  # so many messages and no more on one connection
                return
            is_smooth = trial.outcome.is_taken and self._breaker.clock() - started < _SOON
            self._smooth = self._smooth + 1 if is_smooth else 0
            if trial.following is not None and not trial.outcome.is_taken:
                connection.close()  # a server that refuses before the dot and again at it: whose reply would be next?
            self._read(trial.batch, trial.copy, trial.outcome)

    def _follower(self, connection: Connection) -> _Trial | None:
        """Return what may be begun on a connection before its last dot is answered, and is at hand."""
        batch = next((batch for batch in self._batches if batch.work), None)
        if batch is None or self._smooth < _SMOOTH or self._is_held_up or not self._pool.can_go_on(connection):
            return None
        item = batch.work[0]
        if not isinstance(item, Claim):
            return None
        message = self._bodies.at_hand(item.id)
        if message is None or not can_follow(connection, message):
            return None
        copy = Copy.of(item, message, self._destination)
        with suppress(Unfit):  # told when its turn comes
            if copy.owed:
                trial = _Trial(batch, copy, group(connection, message, copy.owed))
                self._begin(batch)
                self._bodies.drop([item.id])
                return trial
        return None

    def _untried(self, trial: _Trial) -> None:
        self._put_back(trial.batch, trial.copy)
        self._end(trial.batch, trial.copy.id)

    def _broke_off(self, batch: _Batch, copy: Copy, outcome: Outcome, error: ClientError, *, reused: bool) -> None:
        """The connection did not carry the transaction through."""
        if reused and ((not outcome.replies and error.reply is None) or outcome.is_farewell):
            # A kept connection that the server had closed meanwhile, or has had enough of: nobody's fault.
            self._put_back(batch, copy)
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
        if outcome.round_trip is not None:
            self._width.note(outcome.round_trip)
            self._breaker.limit = self._width.now
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
