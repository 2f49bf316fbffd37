"""The DeliveryWorker: an RQ worker for one queue and one destination, which hands its jobs to the courier.

The main thread takes a job, and more jobs behind it while the courier has room, and waits for the courier, which has
an event loop in a thread of its own as long as the process lives. Jobs taken together start in one transaction and end
in one: a job costs more than ten copies. Signals only set a flag. The worker survives a Redis that goes down: its jobs
are put back or written later. It overrides everything in RQ that would end the worker (time-outs, unknown exceptions),
mark an abandoned job as failed, or cost a round trip and a sync for each job.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import FrameType
from typing import Any

from loguru import logger
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import SimpleWorker, WorkerStatus
from rq.worker_registration import clean_worker_registry, register

from relay.redisio import blocking_batch
from relay.redisio.blocking import Blocking
from relay.redisio.sentinel import master_of
from relay.repeated import Backoff
from workers import jobs
from workers.rqworker.delivery_job import DeliveryJob
from workers.rqworker.popped_jobs import PoppedJobs
from workers.rqworker.revival import BORN, LIFE, PLACE, born, place, revive

_POLL_SECONDS = 1  # how long a pop blocks
_NOT_ACCEPTING_SECONDS = 0.1  # between two checks of a courier that accepts no jobs
_BEAT_SECONDS = 15.0
_WORKER_TTL = LIFE - 60  # RQ adds 60: a worker without a beat for 2 minutes is gone
_EXECUTION_TTL = 420  # RQ's own for jobs without a time limit
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between tries while Redis is away
_TOGETHER = 20  # jobs taken at once
_GIVE_UP_SECONDS = 10.0  # once told to stop, how long to wait for a Redis that is away


class DeliveryWorker(SimpleWorker):
    """Works on one queue until ``stopping``.

    ``accepts`` returns whether to take jobs now, ``room`` the number of copies to take beyond those of a first job.
    """

    job_class = DeliveryJob
    log_result_lifespan = False

    def __init__(self, queue: str, *, connection: Redis, name: str, accepts: Callable[[], bool] = lambda: True) -> None:
        logging.getLogger("rq.worker").setLevel(logging.WARNING)  # RQ has several lines per job at info
        super().__init__([queue], name=name, connection=connection, serializer=JSONSerializer, worker_ttl=_WORKER_TTL)
        self.accepts = accepts
        self.room: Callable[[], int] = lambda: 0
        self.queue = self.queues[0]
        self._pop = Blocking(connection)
        self._popped = PoppedJobs(name, self.queue, connection)
        self._place, self._born = place(), born(os.getpid())
        self._running: list[tuple[Job, Execution]] = []
        self._beating = threading.Lock()  # a heartbeat must not restore an execution that has just ended
        self._ended = threading.Event()
        self._master: object = None  # with Sentinels
        self._in_doubt = False  # a command failed: it may or may not have been executed
        self._pauses = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        self._give_up_at = 0.0
        self._last_job = time.monotonic()

    @property
    def stopping(self) -> bool:
        """Whether it ends after the current jobs."""
        return self._pop.is_ended

    def stop(self) -> None:
        """End after the current jobs, at once where it waits for one; for any thread or signal handler."""
        self._pop.end()

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last job ended; 0 while one runs."""
        return 0.0 if self._running else time.monotonic() - self._last_job

    # The loop

    def work(self, burst: bool = False, *_args: Any, max_jobs: int | None = None, **_kwargs: Any) -> bool:
        """Work until a stop; with ``burst`` until the queue is empty. Returns whether a job was done."""
        done = 0
        heart = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        heart.start()
        try:
            while not self.stopping and (max_jobs is None or done < max_jobs):
                try:
                    worked = self._step(wait=not burst, most=_TOGETHER if max_jobs is None else max_jobs - done)
                except RedisError as error:
                    self._outlast(error)
                    continue
                done += worked
                if burst and not worked:
                    break
        finally:
            self._ended.set()
            heart.join()
            self._end()
        return bool(done)

    def _step(self, *, wait: bool, most: int) -> int:
        """Take and run at most ``most`` jobs together; returns their number."""
        if self.birth_date is None:
            self.register_birth()
        if (master := master_of(self.connection)) != self._master:
            # At a new master, a job that ended at the old one may still be started; only this worker can end it.
            self._in_doubt = self._in_doubt or self._master is not None
            self._master = master
        if self._in_doubt:
            self._put_back()
        if self.should_run_maintenance_tasks:
            self.run_maintenance_tasks()
        if not self.accepts():
            time.sleep(_NOT_ACCEPTING_SECONDS)
            return 0
        job = self.take(wait=wait)
        if not self._pauses.is_at_first:
            logger.info("worker {}: Redis is back", self.name)
            self._pauses.reset()
        if job is None:
            return 0
        taken = [job, *self._take_company(job, most)]
        self.execute_jobs(taken)
        return len(taken)

    def _outlast(self, error: RedisError) -> None:
        """Pause while Redis is down; the state of the current jobs is unknown then, see _put_back."""
        self._in_doubt = True
        if self._pauses.is_at_first:
            logger.warning("worker {}: Redis: {}", self.name, error)
        time.sleep(self._pauses.next())

    def take(self, *, wait: bool) -> DeliveryJob | None:
        """Pop a job into the intermediate list, waiting up to a second, and read it; an unreadable one is set aside."""
        here, there = self.queue.key, self.queue.intermediate_queue_key
        waiting = ("BLMOVE", here, there, "LEFT", "RIGHT", _POLL_SECONDS)
        while popped := self._pop.execute(*waiting) if wait else self.connection.lmove(here, there):
            if self.stopping:
                break
            for job in self._popped.read([popped]):
                return job
        if self.stopping:  # a job may have been popped at the same moment: left to the next worker
            self._put_back()
        return None

    def _take_company(self, first: DeliveryJob, most: int) -> list[DeliveryJob]:
        """Pop further jobs while the courier has room for their copies."""
        count = min(most, _TOGETHER, self.room() // max(1, first.copies), self._popped.behind + 1) - 1
        if count < 1 or self.stopping:
            return []
        with self.connection.pipeline(transaction=False) as pipeline:
            for _ in range(count):
                pipeline.lmove(self.queue.key, self.queue.intermediate_queue_key)
            popped = [job_id for job_id in blocking_batch.execute(pipeline) if job_id]
        return self._popped.read(popped)

    def execute_jobs(self, taken: Sequence[DeliveryJob]) -> None:
        """Run jobs at the same time, and write the end of each, waiting for Redis if needed."""
        executions = self._begin(*taken)
        done: list[tuple[DeliveryJob, Execution]] = []
        interrupted = False
        running = [(job, execution, self._perform(job)) for job, execution in zip(taken, executions, strict=True)]
        for job, execution, performed in running:
            try:
                performed.result()
            except jobs.Interrupted:
                interrupted = True
            except jobs.Refused as error:
                logger.error("worker {}: job {} refused: {}", self.name, job.id, error)
                self._until_written(partial(self._fail, job, execution, f"refused: {error}", retry=False))
            except Exception as error:  # the border: an unexpected error must not end the worker
                logger.exception("worker {}: job {} failed", self.name, job.id)
                reason = f"{type(error).__name__}: {error}"
                self._until_written(partial(self._fail, job, execution, reason, retry=True))
            else:
                done.append((job, execution))
        if done:
            self._until_written(partial(self._succeed, done))
        if interrupted:  # all others have been written, so that only those go back
            self._until_written(self._put_back)
        self._last_job = time.monotonic()
        with self._beating:
            self._running = []
        self.executions.clear()

    @staticmethod
    def _perform(job: DeliveryJob) -> Future[None]:
        """Hand a job to the courier; the returned future also holds an exception raised before that."""
        try:
            return job.perform()
        except Exception as error:
            refused: Future[None] = Future()
            refused.set_exception(error)
            return refused

    # A job's states, each one transaction

    def _begin(self, *taken: DeliveryJob) -> list[Execution]:
        with self.connection.pipeline() as pipeline:
            executions = []
            for job in taken:
                executions.append(Execution.create(job, _EXECUTION_TTL, pipeline=pipeline, worker_name=self.name))
                job.prepare_for_execution(self.name, pipeline=pipeline)
                pipeline.persist(job.key)
                pipeline.lrem(self.queue.intermediate_queue_key, 1, job.id)
            self.set_state(WorkerStatus.BUSY, pipeline=pipeline)
            blocking_batch.execute(pipeline)
        self.executions.update((execution.id, execution) for execution in executions)
        self._running = list(zip(taken, executions, strict=True))
        return executions

    def _succeed(self, done: list[tuple[DeliveryJob, Execution]]) -> None:
        for job, execution in [ended for ended in done if not ended[0].is_forgotten_when_done]:
            job.ended_at = now()
            self.handle_job_success(job, self.queue, self.queue.started_job_registry, execution)
            done.remove((job, execution))
        with self._beating, self.connection.pipeline() as pipeline:
            for job, execution in done:
                job.ended_at = now()
                job.forget(pipeline)
                self._count(job, execution, pipeline, "successful_job_count")
            blocking_batch.execute(pipeline)
            self._running = [pair for pair in self._running if pair not in done]

    def _fail(self, job: DeliveryJob, execution: Execution, reason: str, *, retry: bool) -> None:
        job.ended_at = now()
        left = job.retries_left
        try:
            with self._beating, self.connection.pipeline() as pipeline:
                if retry and job.should_retry:
                    job.retry(self.queue, pipeline)
                else:
                    job.record_failure(reason, pipeline, self.name, execution)
                self._count(job, execution, pipeline, "failed_job_count")
                pipeline.execute()
                self._running.remove((job, execution))
        except RedisError:
            job.retries_left = left
            raise

    def _count(self, job: Job, execution: Execution, pipeline: Pipeline, counter: str) -> None:
        execution.delete(job, pipeline)
        pipeline.hincrby(self.key, counter, 1)
        if job.started_at and job.ended_at:
            self.increment_total_working_time(job.ended_at - job.started_at, pipeline)
        self.set_state(WorkerStatus.IDLE, pipeline=pipeline)

    def _put_back(self) -> None:
        """Put the started or popped jobs of this worker back to the front of the queue."""
        with self._beating:
            again = revive(self.connection, self.queue, self.name)
            self._running = []
        self._in_doubt = False
        if again:
            logger.info("worker {}: back to the queue: {}", self.name, ", ".join(again))

    def _until_written(self, write: Callable[[], None]) -> None:
        """Repeat an idempotent write until Redis has accepted it; after a stop, for ``_GIVE_UP_SECONDS`` only."""
        pauses = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            try:
                write()
            except RedisError as error:
                if pauses.is_at_first:
                    logger.warning("worker {}: a job's end waits for Redis: {}", self.name, error)
                if self._gives_up():
                    raise
                time.sleep(pauses.next())
            else:
                return

    def _gives_up(self) -> bool:
        if not self.stopping:
            return False
        self._give_up_at = self._give_up_at or time.monotonic() + _GIVE_UP_SECONDS
        return time.monotonic() >= self._give_up_at

    # Life signs

    def _beat_on(self) -> None:
        delay = _BEAT_SECONDS
        while not self._ended.wait(delay):
            try:
                self.beat()
                delay = _BEAT_SECONDS
            except RedisError:  # the main thread logs it
                delay = 1.0

    def beat(self) -> None:
        """Send a heartbeat of worker and execution, so that a job that runs for hours does not count as abandoned."""
        if self.birth_date is None:
            return
        with self._beating, self.connection.pipeline() as pipeline:
            self.heartbeat(pipeline=pipeline)
            for job, execution in self._running:
                execution.heartbeat(job.started_job_registry, _EXECUTION_TTL, pipeline=pipeline)
                pipeline.sadd(self.executions_key, execution.composite_key)
            if pipeline.execute()[0]:  # a new field: the worker's key was gone
                self._register()

    def register_birth(self) -> None:
        """Register under a new unique name."""
        self.birth_date = self.last_heartbeat = now()
        self._register()
        self.set_state(WorkerStatus.IDLE)

    def _register(self) -> None:
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping={**self.serialize(), PLACE: self._place, BORN: self._born})
            pipeline.expire(self.key, LIFE)
            register(self, pipeline)
            pipeline.execute()

    def _end(self) -> None:
        try:
            if self._in_doubt:
                self._put_back()
            self.register_death()
        except RedisError as error:
            logger.warning("worker {}: Redis: {}; the next worker puts its job back", self.name, error)

    # What RQ must not do

    @property
    def connection_timeout(self) -> int:
        """Seconds after which a silent Redis counts as gone: a pop's second and time for a slow disk."""
        return _POLL_SECONDS + 9

    def run_maintenance_tasks(self) -> None:
        self.clean_registries()

    def clean_registries(self) -> None:
        """Remove expired entries; RQ's method would also mark started jobs as failed, which the reconciler repairs."""
        self.queue.failed_job_registry.cleanup()
        self.queue.finished_job_registry.cleanup()
        try:
            clean_worker_registry(self.queue)
        except ValueError as error:  # RQ takes every member for text of its own
            logger.warning("worker {}: the list of workers makes no sense: {}", self.name, error)
        self.last_cleaned_at = now()  # type: ignore[assignment]  # RQ only says None

    def request_stop(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """Handle a signal: stop after the current jobs. RQ's handler would send commands to Redis.

        Only a second SIGINT ends at once: service managers send SIGTERM both to this process and to the supervisor,
        which passes it on; and the supervisor kills after a second signal.
        """
        if self.stopping and signum == signal.SIGINT:
            os._exit(128 + signum)
        self.stop()
