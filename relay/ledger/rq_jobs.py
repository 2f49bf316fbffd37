"""RQ jobs for copies: one queue for each backup, one job for many copies, only ids in its arguments.

A relay makes jobs for the copies it released through a Dispatcher, off the critical path: a job that cannot be written
is tried again, and copies that a dead process left without a job are pending in the ledger, where the reconciler finds
them. Queue name, function name and serializer are a wire format between versions.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any

import redis.asyncio
from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.job import Job, JobStatus, Retry
from rq.serializers import JSONSerializer

from relay import maillog
from relay.batches import batched
from relay.redisio.pipeline import CommandBatch, Pipelines
from relay.repeated import Backoff, until_done

FUNCTION = "workers.jobs.deliver"
JOB_OPTIONS: dict[str, Any] = {
    "timeout": -1,  # deadlines are per transaction
    "result_ttl": 0,
    "failure_ttl": -1,
    "ttl": None,
}
# The server version that RQ would ask for with every Queue: it decides only about commands that all versions have.
_SERVER_VERSION = (6, 2, 0)
JOB_SIZE = 100  # copies in one job at most, unless workers.batch says otherwise
# Seconds for each process: how long a copy waits for others while the workers keep up. A job costs Redis five synced
# writes and the worker some 1,700 calls, whatever it holds: at 1,000 messages a second it is full then. Half of it took
# the relay 8 % and Redis 5 % more processor time a message.
GATHER_SECONDS = 0.1
_LONGEST_WINDOW = 0.5
_LONG_WINDOW = 0.25  # used when the queue has more than a few jobs, where waiting delays no delivery
_FEW = 3
_PAUSE = 1.0  # seconds until a job that could not be written is tried again
_DRAIN_SECONDS = 5.0


def queue(connection: Redis, destination: str) -> Queue:
    """Return the RQ queue of a backup."""
    found = Queue(f"backup-{destination}", connection=connection, serializer=JSONSerializer)
    found.redis_server_version = _SERVER_VERSION
    return found


def description(destination: str, ids: Sequence[str]) -> str:
    """Return the description of a job in rq-dashboard, without addresses or content."""
    return f"{len(ids)} message{'' if len(ids) == 1 else 's'} to {destination}, first {ids[0]}"


def enqueue(pipe: Any, target: Queue, destination: str, ids: Sequence[str]) -> str:
    """Add one job for these copies to a pipeline; returns its id.

    RQ's Retry serves only for an unexpected end of the job; a failed delivery never raises there.
    """
    data = Queue.prepare_data(
        FUNCTION,
        args=[destination, list(ids)],
        description=description(destination, ids),
        retry=Retry(max=3),
        **JOB_OPTIONS,
    )
    (job,) = target.enqueue_many([data], pipeline=pipe)
    return str(job.id)


def create(target: Queue, destination: str, ids: Sequence[str], status: JobStatus, job_id: str | None = None) -> Job:
    """Return a job that is not yet saved: for the scheduled and the failed registries."""
    return target.create_job(
        FUNCTION,
        args=[destination, list(ids)],
        description=description(destination, ids),
        status=status,
        retry=Retry(max=3),
        job_id=job_id,
        **JOB_OPTIONS,
    )


def schedule(pipe: Any, target: Queue, job: Job, when: datetime) -> None:
    """Add a job to the scheduled registry of its queue."""
    target.schedule_job(job, when, pipeline=pipe)


# RQ only adds commands to a pipeline here; this client is never connected.
_OFFLINE = Redis()


@functools.lru_cache(maxsize=256)
def _offline_queue(destination: str) -> Queue:
    """Return the queue of a backup for a pipeline; kept, since to make one takes RQ as long as a message takes us."""
    return queue(_OFFLINE, destination)


class Dispatcher:
    """Collects the released ids of one process into one job for each backup and window."""

    def __init__(self, connection: redis.asyncio.Redis, *, processes: int = 1, job_size: int = JOB_SIZE) -> None:
        """``processes`` is the number of relay processes that make jobs for the same workers."""
        self._wires = Pipelines(connection)
        self._job_size = job_size
        self._window = min(_LONGEST_WINDOW, GATHER_SECONDS * processes)
        # By name: the spool may hold copies for a backup that is no longer in the settings.
        self._waiting: defaultdict[str, list[str]] = defaultdict(list)
        self._windows: defaultdict[str, float] = defaultdict(lambda: self._window)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._flights: dict[str, asyncio.Task[None]] = {}

    def add(self, destination: str, message_id: str) -> None:
        """Add a released id; its job is written within the window."""
        waiting = self._waiting[destination]
        waiting.append(message_id)
        if destination in self._flights:
            return
        if len(waiting) >= self._job_size:
            self._start(destination)
        elif destination not in self._timers:
            loop = asyncio.get_running_loop()
            self._timers[destination] = loop.call_later(self._windows[destination], self._start, destination)

    async def put(self, destination: str, ids: Sequence[str]) -> None:
        """Write jobs for these ids at once. Raises RedisError, OSError; they may nevertheless have been written."""
        for batch in batched(ids, self._job_size):
            await self._write(destination, batch)

    async def drain(self) -> None:
        """Write the waiting jobs; gives up silently if Redis is down, since the reconciler makes them later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while self._timers or self._flights:  # ids added during a write get their timer after it
                    for destination in list(self._timers):
                        self._start(destination)
                    await asyncio.wait(self._flights.values())

    def _start(self, destination: str) -> None:
        timer = self._timers.pop(destination, None)
        if timer:
            timer.cancel()
        if destination not in self._flights and self._waiting[destination]:
            self._flights[destination] = asyncio.get_running_loop().create_task(self._flush(destination))

    async def _flush(self, destination: str) -> None:
        try:
            waiting = self._waiting[destination]
            while waiting:
                length = await until_done(
                    partial(self._write_next, destination),
                    partial(self._note_trouble, destination),
                    Backoff(_PAUSE, _PAUSE),
                )
                self._windows[destination] = max(self._window, _LONG_WINDOW if length > _FEW else 0)
                if len(waiting) < self._job_size:
                    break
        finally:
            del self._flights[destination]
            if self._waiting[destination]:
                loop = asyncio.get_running_loop()
                self._timers[destination] = loop.call_later(self._windows[destination], self._start, destination)

    def _note_trouble(self, destination: str, error: Exception) -> None:
        if isinstance(error, RedisError | OSError):
            maillog.dispatch_delayed(destination, len(self._waiting[destination]), error)
        else:  # the border: an unexpected error is logged, and must not end the dispatcher
            maillog.task_failed(f"jobs for {destination}", error)

    async def _write_next(self, destination: str) -> int:
        """Write a job for the waiting ids; returns the length of the queue."""
        waiting = self._waiting[destination]
        batch = waiting[: self._job_size]
        length = await self._write(destination, batch)
        del waiting[: len(batch)]
        return length

    async def _write(self, destination: str, ids: Sequence[str]) -> int:
        """Write one job; returns the length of the queue."""
        target = _offline_queue(destination)
        job = _OFFLINE.pipeline()
        enqueue(job, target, destination, ids)
        batch = CommandBatch()
        batch.transaction([*(arguments for arguments, _ in job.command_stack), ("LLEN", target.key)])
        (answer,) = await self._wires.ask(batch)
        return int(answer[-1])
