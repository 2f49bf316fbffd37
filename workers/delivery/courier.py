"""The courier of one backup: has the copies of jobs claimed, delivers several at once, sees to every outcome.

Lives in one event loop for the whole life of a worker process, with its pool of kept connections. A job's copies are
claimed (claiming.py) and in hand (jobs_in_hand.py); runners (runners.py) take copy after copy of whichever job has some
left, load its body (loading.py) and take it to the server (connection_run.py), as long as the gate is open (gate.py);
each comes back with its ending, and its outcome is written (outcomes.py). Delivery trouble never raises: a copy is
settled, deferred, failed, or, while the server is in trouble, given back untried with its job, of which one is taken
for each probe (probe_choice.py). At the stop signal the courier gives back what it has not tried. What still waits for
a slow reply when the rest of a job is done (a final dot may take ten minutes) keeps its lease, not the job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from functools import partial
from typing import cast

from redis.exceptions import RedisError

from relay import faultpoints, maillog
from relay.breaker import Breaker
from relay.client.pool import Pool
from relay.config.loader import Settings
from relay.handover.frames import Hello, ledger_of
from relay.ledger import archive
from relay.ledger.changes import Claim
from relay.ledger.greetings import Greetings
from relay.mail.destination import Destination
from relay.redisio.clients import async_client, sync_client
from relay.redisio.pipeline import Pipelines
from relay.trace import emitter
from workers.delivery.bare_probe import keep_looking
from workers.delivery.bodies import Bodies
from workers.delivery.claiming import Claiming
from workers.delivery.connection_run import ConnectionRuns
from workers.delivery.copy import Copy
from workers.delivery.divergences import Divergences
from workers.delivery.draining import DrainWatch, end
from workers.delivery.first_tries import FirstTries
from workers.delivery.gate import Gate
from workers.delivery.health import HealthReport
from workers.delivery.hold_and_throttle import HoldAndThrottle
from workers.delivery.jobs_in_hand import JobInHand, JobsInHand
from workers.delivery.leases import Leases
from workers.delivery.loading import Loading
from workers.delivery.outbox import Outbox
from workers.delivery.outcomes import Conclusion, Outcomes
from workers.delivery.probe_choice import ProbeChoice
from workers.delivery.refusals import RefusalMemory
from workers.delivery.retry import Width
from workers.delivery.runners import SLOW, Runner, Runners
from workers.jobs import Interrupted

_REFUSALS = 5  # on one connection in a row; a Postfix slows down after ten
_STRAGGLER = SLOW + 1.0  # seconds that a job waits for its last copies, as the next job does for it
_LONGEST_PROBE = 60.0
_BULK_SECONDS = 30.0
_IN_HAND = 10  # copies that a connection delivers of what is in hand at once: the last ones leave others idle
_MEMORY = "memory"  # in place of a job's id
_BODY_PAUSE = 0.5  # seconds until Redis is asked again for a body


class Courier:
    """Delivers to one destination; see ``workers.jobs.Deliverer`` for the contract with the worker."""

    def __init__(
        self,
        settings: Settings,
        destination: Destination,
        worker: str,
        redis_url: str,
        *,
        takes_first_tries: bool = False,
    ) -> None:
        """``takes_first_tries``: relays of this host hand it copies."""
        seconds = settings.redis.timeout_seconds
        name = destination.name
        server = settings.redis.at(redis_url)
        self._name = name
        self._redis = async_client(server, seconds)
        self._bulk = async_client(server, max(_BULK_SECONDS, seconds))
        self._rq = jobs = sync_client(server, seconds)
        self._pipelines = pipelines = Pipelines(self._redis)
        width = Width(destination.connections)
        refusals = RefusalMemory()

        self._width = width
        self._leases = Leases(self._redis, name)
        clock = self._leases.clock
        self._hold_and_throttle = HoldAndThrottle(self._redis, name, worker, clock)
        self._outbox = Outbox(
            self._redis,
            jobs,
            name,
            now=clock.now,
            has_sentinels=bool(server.sentinels),
            noise=settings.divergence.noise,
        )
        self._divergences = Divergences(destination, settings.divergence, pipelines, settings.smtp.domain)
        self._outcomes = Outcomes(
            destination,
            worker,
            jobs,
            self._outbox,
            settings.retry,
            failed_ttl=settings.failed.ttl,
            divergences=self._divergences,
            clock=clock,
            held_seconds=self._hold_and_throttle.held_seconds,
            names_recipients=settings.log.addresses,
        )
        self._jobs = JobsInHand(self._outcomes, self._leases)
        self._health = HealthReport(self._redis, pipelines, name, self._leases, self._hold_and_throttle)
        self._breaker = Breaker(
            width.now, min(_LONGEST_PROBE, settings.retry.longest), on_change=self._health.on_change
        )
        self._gate = Gate(self._breaker, self._outbox, self._hold_and_throttle)
        self._greetings = Greetings(self._redis)
        self._pool = Pool(
            destination,
            local_hostname=settings.smtp.domain,
            timeouts=settings.relay.timeouts,
            limit=width.most,
            max_refusals=_REFUSALS,
            on_open=self._greetings.note,
        )
        self._bodies = Bodies(pipelines, self._bulk, archive.folder(settings.state_dir))
        self._claiming = Claiming(
            name, worker, pipelines, self._pool, self._bodies, self._outcomes, self._outbox, self._leases, self._gate
        )
        self._health.on_ledger = self._claiming.note
        self._loading = Loading(destination, self._bodies, self._outcomes)
        self._runners = Runners(self._pool, self._jobs, self._breaker)
        self._runs = ConnectionRuns(
            destination,
            settings.relay,
            self._pool,
            self._bodies,
            self._jobs,
            self._gate,
            self._breaker,
            width,
            refusals,
        )
        self._hold_and_throttle.wake = self._wake
        self._first_tries: FirstTries | None = None
        if takes_first_tries:
            hello = Hello(name, worker, ledger_of(redis_url))
            self._first_tries = FirstTries(
                settings.state_dir,
                hello,
                self._bodies,
                self._leases,
                self._outcomes,
                pipelines,
                wants_more=lambda: not (self._gate.is_closed or self._hold_and_throttle.is_throttled),
                begin=lambda ours, late: self._spawn(self._try_first(ours, late)),
            )
        self._probe_choice = ProbeChoice(self._breaker, self._runs, refusals, self._bodies, self._claiming)
        self._is_probing = self._is_given_up = False
        self._background: set[asyncio.Task[None]] = set()
        self._deliveries: set[asyncio.Task[object]] = set()  # calls of ``deliver`` that have not returned

    @property
    def accepting(self) -> bool:
        """Whether another job may be fetched; with the breaker open one must be when a probe is due."""
        return self._gate.accepts_jobs

    @property
    def room(self) -> int:
        """How many copies are worth having in hand at once; with the breaker open those of one job, for the probe."""
        return 0 if self._breaker.is_open else int(min(self._breaker.window * _IN_HAND, self._hold_and_throttle.most))

    async def start(self) -> None:
        """Begin to renew leases and to report our health; from then on it is known whether the destination is held."""
        emitter.use(asyncio.get_running_loop())
        with suppress(RedisError, OSError):  # the watch goes on asking
            await self._health.look(self._breaker)
        if self._gate.is_draining:  # told to stop meanwhile: nobody would end these
            return
        self._spawn(self._leases.renew())
        self._spawn(self._runners.watch())
        self._spawn(self._outbox.follow())
        self._spawn(self._health.watch(self._breaker))
        self._spawn(self._divergences.report())
        self._spawn(self._hold_and_throttle.share(lambda: self._jobs.copies_left, self._narrow))
        self._spawn(keep_looking(self._gate, self._pool, self._breaker))
        if self._first_tries is not None:
            self._spawn(self._first_tries.run())

    async def drain(self) -> None:
        """Start no further copy; finish those under way, stragglers too, and write their outcomes.

        A transaction whose dot has been sent may be answered for ten minutes; any other is broken off after a while,
        and its copy goes back to the queue.

        What Redis does not take in time is left to its lease: the copies go out again, once, after the next start. So
        is what waits for nothing that is known: no wait of a drain is without an end (draining.py).
        """
        self._gate.is_draining = True
        if self._first_tries is not None:
            self._first_tries.stop()
        self._wake()
        held = self._leases.held
        watch = DrainWatch(self._name)
        while (held or self._deliveries) and not (self._outbox.is_stuck or watch.is_over):
            if watch.cuts(copies=len(held), jobs=len(self._deliveries), with_server=len(self._runners)):
                self._runners.cut()
            await asyncio.sleep(0.02)
        if held or self._deliveries:
            self._is_given_up = True
            maillog.notice("error", "outcomes lost", destination=self._name, copies=len(held))
            for delivery in self._deliveries:
                delivery.cancel()
        for task in self._background:
            task.cancel()
        counts = [] if self._outbox.is_late else [("the counts by domain", self._divergences.write())]
        if self._first_tries is not None and not self._is_given_up:
            counts.insert(0, ("the copies handed over", self._first_tries.close()))
        await end(
            self._name,
            [
                *counts,
                ("the connections to the server", self._pool.close()),
                ("the notes of what it offers", self._greetings.close()),
                ("the questions to Redis", self._pipelines.close()),
                ("the outcomes", self._outbox.close()),
                ("the connections to Redis", self._redis.aclose()),
                ("the connections for bodies", self._bulk.aclose()),
            ],
        )
        if not self._outbox.is_stuck:  # else a thread may still wait for an answer on it
            self._rq.close()
        emitter.flush()

    # --- one job ----------------------------------------------------------------------------------------------

    async def deliver(self, job_id: str, ids: list[str]) -> None:
        """Deliver what this job can claim.

        Raises Interrupted with copies untried: in a drain, or when the server is away and its probe not yet due. A
        drain that Redis keeps from its end interrupts what is in hand: a worker without a supervisor must end all the
        same.
        """
        task = cast("asyncio.Task[object]", asyncio.current_task())
        self._deliveries.add(task)
        try:
            await self._deliver(job_id, ids)
        except asyncio.CancelledError:
            if self._is_given_up:
                raise Interrupted from None
            raise
        finally:
            self._deliveries.discard(task)

    async def _deliver(self, job_id: str, ids: list[str]) -> None:
        faultpoints.reach("job fetched")
        # In a drain nobody waits for a job that is only handed over now: what it claimed would stay leased.
        if self._gate.is_draining or self._hold_and_throttle.is_barred:
            raise Interrupted
        if self._first_tries is not None:
            self._first_tries.read_now()
        job = self._jobs.open(job_id, await self._claiming.claim(job_id, ids))
        if await self._tried(job):
            raise Interrupted

    async def _try_first(self, ours: list[Claim], late: list[str]) -> None:
        """Deliver what a relay has handed over; ``late`` is to be claimed before."""
        job = self._jobs.open(_MEMORY, ours)
        task = cast("asyncio.Task[object]", asyncio.current_task())
        self._deliveries.add(task)
        try:
            if late:
                with suppress(Interrupted):
                    job.work += await self._claiming.claim(_MEMORY, late)
                self._bodies.drop([message_id for message_id in late if message_id not in self._leases.held])
            await self._tried(job, with_job=True)
        finally:
            self._deliveries.discard(task)
        if self._first_tries is not None:
            self._first_tries.tell()

    async def _tried(self, job: JobInHand, *, with_job: bool = False) -> bool:
        """See a job through; returns whether copies were given back untried, ``with_job`` in a job of their own."""
        try:
            await self._see_through(job)
        finally:
            self._jobs.close(job)
        untried = self._jobs.leave_untried(job)
        if untried:
            self._bodies.drop(untried)
            async with self._leases.leaving(untried):
                await self._outcomes.give_back(untried, with_job=with_job)
        if job.written:
            await asyncio.wait(job.written)
        return bool(untried)

    async def _see_through(self, job: JobInHand) -> None:
        """Have a job's copies tried, as far as that can be now; then it is over."""
        while not self._gate.is_draining:
            if not job.work:
                await job.wait(_STRAGGLER, or_work=True)
                if not job.work:
                    break
            elif self._gate.gives_back:
                break  # nobody has copies in hand for a server that is away or held: an operator may want to move them
            elif not self._gate.is_closed:
                self._runners.start_missing(self._try_all)
                job.changed.clear()
                await job.changed.wait()
            elif self._gate.is_probe_due and not self._is_probing:
                await self._probe(job)
            else:
                await self._wait_for_turn()
        if job.work or self._gate.is_draining:
            await job.wait(_STRAGGLER, or_work=False)
        job.is_over = job.under_way > 0  # what takes too long goes on as a straggler, without the job

    async def _wait_for_turn(self) -> None:
        """Wait a little for the breaker to close or the outbox to catch up."""
        breaker = self._breaker
        self._hold_and_throttle.ask_now()
        self._health.changed.clear()
        seconds = min(1.0, breaker.seconds_to_probe or 0.1) if breaker.is_open else 0.1
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._health.changed.wait()

    async def _probe(self, job: JobInHand) -> None:
        """Try one copy alone. One that hangs is not waited for."""
        self._is_probing = True
        try:
            await self._probe_choice.bring_forward(job)
            if job.work and self._gate.is_probe_due:
                probe = self._runners.start(partial(self._try_next, job, is_look=True))
                _, hangs = await asyncio.wait({probe}, timeout=SLOW)
                if hangs and self._breaker.is_open:
                    self._breaker.opens(self._breaker.reason)
        finally:
            self._is_probing = False

    def _narrow(self, part: int) -> None:
        """Take how many of a throttle's connections are ours; 0: there is no throttle."""
        self._width.part = part
        self._pool.set_limit(self._width.most)
        self._breaker.limit = self._width.now
        self._breaker.window = min(self._breaker.window, self._breaker.limit)

    def _wake(self) -> None:
        self._health.changed.set()
        self._jobs.wake()

    # --- one runner -------------------------------------------------------------------------------------------

    async def _try_all(self, runner: Runner) -> None:
        """Try copy after copy."""
        while not self._gate.is_closed and self._runners.has_turn(runner):
            job = self._jobs.next()
            if job is None:
                break
            await self._try_next(job, runner)
            self._runners.start_missing(self._try_all)

    async def _try_next(self, job: JobInHand, runner: Runner, *, is_look: bool = False) -> None:
        """Try a job's next copy, and those whose transactions follow on the same connection."""
        self._gate.begins()
        item = self._jobs.begin(job)
        try:
            copy = item if isinstance(item, Copy) else await self._loading.load(item, job.id)
        except (RedisError, OSError) as error:
            maillog.ledger_trouble(f"body of {item.id}", error)
            await asyncio.sleep(_BODY_PAUSE)
            self._jobs.put_back(job, item, last=True)
            return
        except BaseException:
            self._jobs.abandon(job, item.id)
            raise
        if isinstance(copy, Conclusion):
            self._jobs.note(job, item.id, copy)
            self._jobs.end(job)
            return
        async with aclosing(self._runs.run(job, copy, runner, is_look=is_look)) as trials:
            async for trial in trials:
                self._jobs.finish(trial.job, trial.copy, trial.ending)
                self._runners.start_missing(self._try_all)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
