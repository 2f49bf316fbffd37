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
from typing import cast

from loguru import logger
from redis import Redis
from redis.exceptions import RedisError, ResponseError
from rq import Queue
from rq.registry import ScheduledJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer

from relay import maillog
from relay.ledger.redis_clock import RedisClock, last_look, pull_in, shorten
from relay.mail.ids import is_job_id, text
from relay.mail.text import printable
from relay.repeated import Backoff, Repeated
from workers.rqworker.delivery_job import DeliveryJob, NoJob

_ROUND_SECONDS = 1.0
_LOCK_SECONDS = 15.0  # between two renewals; RQ's lock lives for 61 s
_AT_ONCE = 1000  # jobs of a queue moved in a round
_LONGEST_PAUSE = 10.0  # seconds between rounds while Redis is away


class Scheduler(RQScheduler):
    """RQ's scheduler for a set of queues that may change, run round by round by ``keep_scheduling``.

    ``longest`` is how many seconds ahead of its time a job is scheduled at most.
    """

    def __init__(self, connection: Redis, name: str, longest: float = math.inf) -> None:
        super().__init__([], connection, logging_level=logging.WARNING, serializer=JSONSerializer, name=name)
        self._clock = RedisClock()
        self._longest = longest
        # RQ would make its own pool from the options of this one, which would not follow a failover.
        self._connection = connection  # type: ignore[assignment]  # RQ says None
        self._renewed = float("-inf")
        self._was_asked = False
        self._behind = 0.0  # seconds by which Redis's clock was set back and the schedule must still be moved
        self._is_more_due = False
        self._told: set[str] = set()  # queues with a key of another type

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
            self.acquire_locks()  # takes or renews each
            self.register_birth()
            self.prepare_registries(self._acquired_locks)
            # Otherwise the lock of a dead scheduler would last for as long as the clock was set back.
            others = [self.get_locking_key(queue) for queue in wanted - self._acquired_locks]
            shorten(self.connection, others, self.interval + 60)
            self._pull_in()
            self._renewed = time.monotonic()
        elif self._behind:
            self._pull_in()
        self.enqueue_scheduled_jobs()
        return self._is_more_due

    def _pull_in(self) -> None:
        """Move scheduled jobs nearer by the time that the clock was set back, and at most ``longest`` ahead."""
        self._each(self._pull_in_one)
        self._behind = 0.0

    def _pull_in_one(self, registry: ScheduledJobRegistry) -> None:
        count = pull_in(self.connection, registry.key, self._clock.now(), by=self._behind, most=self._longest)
        if count:
            text = "scheduler: {}: {} jobs come earlier: they were too far ahead of Redis's clock"
            logger.warning(text, registry.name, count)

    def enqueue_scheduled_jobs(self) -> None:
        """Move the due jobs of each queue; one that cannot be read is taken off the schedule.

        RQ's own would decompress any amount of data, and stop all queues at the first key that is not what it should
        be.
        """
        self._is_more_due = False
        self._each(self._move_due)

    def _each(self, step: Callable[[ScheduledJobRegistry], None]) -> None:
        """Take a step for each queue; a key of another type stops its own queue only, until the sweep renames it."""
        for registry in self._registries:
            try:
                step(registry)
                self._told.discard(registry.name)
            except ResponseError as error:
                if "WRONGTYPE" not in str(error):
                    raise
                if registry.name not in self._told:
                    self._told.add(registry.name)
                    logger.warning("scheduler: {}: {}", registry.name, printable(str(error)))

    def _move_due(self, registry: ScheduledJobRegistry) -> None:
        connection, now = self.connection, int(self._clock.now())
        due = cast("list[bytes]", connection.zrangebyscore(registry.key, "-inf", now, start=0, num=_AT_ONCE))
        names = {name: member for member in due if is_job_id(name := text(member))}
        with connection.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hgetall(DeliveryJob.key_for(name))
            records = pipe.execute(raise_on_error=False)  # one may be no hash
        found = [self._restored(name, record) for name, record in zip(names, records, strict=True)]
        queue = Queue(registry.name, connection=connection, serializer=self.serializer)
        with connection.pipeline() as pipe:
            for job in filter(None, found):
                queue._enqueue_job(job, pipeline=pipe, at_front=job.should_enqueue_at_front())  # noqa: SLF001  (as RQ)
            if due:
                pipe.zrem(registry.key, *due)
            pipe.execute()
        self._is_more_due = self._is_more_due or len(due) == _AT_ONCE

    def _restored(self, job_id: str, record: object) -> DeliveryJob | None:
        try:
            return DeliveryJob.of(job_id, record, self.connection)
        except NoJob as error:  # its copies are in the ledger and get a new job
            logger.error("scheduled job {} is unreadable and taken off the schedule: {}", job_id, error)
            return None

    def start_anew(self) -> None:
        """Take the locks again in the next round, since Redis was down and may have lost them."""
        self._renewed = float("-inf")

    def close(self) -> None:
        """Release the locks."""
        self.release_locks()
        self.register_death()
        self.connection.close()

    @property
    def _registries(self) -> list[ScheduledJobRegistry]:
        return self._scheduled_job_registries if self._acquired_locks else []

    def _let_go(self, names: Iterable[str]) -> None:
        gone = self._acquired_locks & set(names)
        kept = self._acquired_locks - gone
        self._acquired_locks = gone
        self.release_locks()
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
        except Exception:  # the border: other queues wait for the next round
            logger.exception("scheduler: a round failed")
            pause = _ROUND_SECONDS
        if pause:
            stop.wait(pause)
    try:
        scheduler.close()
    except RedisError as error:
        logger.warning("scheduler: its locks end by themselves: {}", error)
