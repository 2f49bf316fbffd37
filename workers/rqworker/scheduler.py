"""Moves scheduled jobs to their queues when they are due: RQ's scheduler, run in a thread.

The lock's name is stable (host and state folder), so that a restarted scheduler continues at once instead of waiting
for its own lock to expire. The loop survives a Redis that goes down. A scheduled job that cannot be read is removed
from the schedule, so that it does not block the others; its copies get a new job from the reconciler. Due times are by
Redis's clock; when that is set back, the schedule is moved with it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

from loguru import logger
from redis import Redis
from redis.exceptions import RedisError
from rq.exceptions import NoSuchJobError
from rq.job import Job
from rq.registry import ScheduledJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer

from relay import maillog
from relay.ledger.redis_clock import RedisClock, last_look, pull_in, shorten
from relay.repeated import Backoff, Repeated

_ROUND_SECONDS = 1.0
_LOCK_SECONDS = 15.0  # between two renewals; RQ's lock lives for 61 s
_LONGEST_PAUSE = 10.0  # seconds between rounds while Redis is away


class _Registry(ScheduledJobRegistry):
    """The scheduled jobs of a queue, due by a clock that is not this host's."""

    clock: RedisClock

    def get_jobs_to_schedule(self, timestamp: int | None = None, chunk_size: int = 1000) -> list[str]:
        return super().get_jobs_to_schedule(int(self.clock.now()), chunk_size)


class Scheduler(RQScheduler):
    """RQ's scheduler for a set of queues that may change, run round by round by ``keep_scheduling``.

    ``longest`` is how many seconds ahead of its time a job is scheduled at most.
    """

    def __init__(self, connection: Redis, name: str, longest: float = math.inf) -> None:
        super().__init__([], connection, logging_level=logging.WARNING, serializer=JSONSerializer, name=name)
        self._clock = RedisClock()
        self._longest = longest
        # RQ would make its own pool from the options of this one, which would not follow a failover.
        self._connection = connection  # type: ignore[assignment]
        self._renewed = float("-inf")
        self._was_asked = False
        self._behind = 0.0  # seconds by which Redis's clock was set back and the schedule must still be moved

    def round(self, queues: Iterable[str]) -> bool:
        """Move the due jobs, at most a thousand for each queue; returns whether more are due. Raises RedisError."""
        wanted = set(queues)
        step = self._clock.ask(self.connection, 0.0 if self._was_asked else last_look(self.connection))
        self._behind += max(0.0, -step)
        if step:
            maillog.notice("warning", "the clock of Redis has been set", seconds=round(step, 1))
        self._was_asked = True
        if wanted != self._queue_names or time.monotonic() - self._renewed >= _LOCK_SECONDS:
            self._let_go(self._queue_names - wanted)
            self._queue_names = wanted
            self.acquire_locks()  # type: ignore[no-untyped-call]  # takes or renews each
            self.register_birth()
            self.prepare_registries(self._acquired_locks)
            # Otherwise the lock of a dead scheduler would last for as long as the clock was set back.
            others = [self.get_locking_key(queue) for queue in wanted - self._acquired_locks]
            shorten(self.connection, others, self.interval + 60)
            self._pull_in()
            self._renewed = time.monotonic()
        elif self._behind:
            self._pull_in()
        self.enqueue_scheduled_jobs()  # type: ignore[no-untyped-call]
        return any(r.get_jobs_to_schedule(chunk_size=1) for r in self._registries)

    def prepare_registries(self, queue_names: Iterable[str] | None = None) -> None:
        """Make the registries of these queues, as RQ does, with Redis's clock."""
        self._scheduled_job_registries = []
        for name in queue_names or self._acquired_locks:
            registry = _Registry(name, connection=self.connection, serializer=self.serializer)  # type: ignore[no-untyped-call]
            registry.clock = self._clock
            self._scheduled_job_registries.append(registry)

    def _pull_in(self) -> None:
        """Move scheduled jobs nearer by the time that the clock was set back, and at most ``longest`` ahead."""
        for registry in self._registries:
            count = pull_in(self.connection, registry.key, self._clock.now(), by=self._behind, most=self._longest)
            if count:
                text = "scheduler: {}: {} jobs come earlier: they were too far ahead of Redis's clock"
                logger.warning(text, registry.name, count)
        self._behind = 0.0

    def forget_unreadable(self) -> None:
        """Remove due jobs that cannot be read from the schedule."""
        for registry in self._registries:
            for job_id in registry.get_jobs_to_schedule():
                try:
                    Job.fetch(job_id, self.connection, self.serializer)
                except (RedisError, NoSuchJobError):
                    continue
                except Exception as error:  # RQ may raise anything on a forged record
                    logger.error("scheduled job {} is unreadable and taken off the schedule: {}", job_id, error)
                    registry.remove(job_id)

    def start_anew(self) -> None:
        """Take the locks again in the next round, since Redis was down and may have lost them."""
        self._renewed = float("-inf")

    def close(self) -> None:
        """Release the locks."""
        self.release_locks()  # type: ignore[no-untyped-call]
        self.register_death()
        self.connection.close()

    @property
    def _registries(self) -> list[ScheduledJobRegistry]:
        return self._scheduled_job_registries if self._acquired_locks else []

    def _let_go(self, names: Iterable[str]) -> None:
        gone = self._acquired_locks & set(names)
        kept = self._acquired_locks - gone
        self._acquired_locks = gone
        self.release_locks()  # type: ignore[no-untyped-call]
        self._acquired_locks = kept


def keep_scheduling(
    connect: Callable[[], Redis],
    queues: Callable[[], Iterable[str]],
    name: str,
    stop: threading.Event,
    *,
    longest: float = math.inf,
) -> None:
    """Run the scheduler until ``stop``: a round a second, without a pause while more is due.

    ``queues`` returns the names and is called each round (it may raise RedisError); ``name`` is that of the lock and
    must be the same after a restart. No job should be scheduled more than ``longest`` seconds ahead.
    """
    scheduler = Scheduler(connect(), name, longest)
    away = Repeated("scheduler: Redis", logger.warning, logger.info)
    pauses = Backoff(_ROUND_SECONDS, _LONGEST_PAUSE)
    while not stop.is_set():
        try:
            more = scheduler.round(queues())
            away.is_over()
            pauses.reset()
            pause = 0.0 if more else _ROUND_SECONDS
        except RedisError as error:
            away.came(str(error))
            scheduler.start_anew()
            pause = pauses.next()
        except Exception:  # a job that RQ cannot read
            logger.exception("scheduler: a round failed")
            pause = _ROUND_SECONDS
            try:
                scheduler.forget_unreadable()
            except RedisError:
                scheduler.start_anew()
        if pause:
            stop.wait(pause)
    try:
        scheduler.close()
    except RedisError as error:
        logger.warning("scheduler: its locks end by themselves: {}", error)
