"""The jobs that a worker has popped into its intermediate list, as they are read.

What is no job, cannot be read, or was deleted while it waited is taken out of that list; the copies of such a job are
in the ledger and get a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loguru import logger
from redis import Redis
from rq.queue import Queue

from relay.mail.ids import is_job_id, text
from workers.rqworker.delivery_job import DeliveryJob, NoJob


class PoppedJobs:
    """Reads the jobs of one worker. ``behind`` is how many waited in the queue behind those last read."""

    def __init__(self, worker: str, queue: Queue, connection: Redis) -> None:
        self._worker = worker
        self._queue = queue
        self._connection = connection
        self.behind = 0

    def read(self, popped: Sequence[Any]) -> list[DeliveryJob]:
        """Return the jobs of what was popped, as far as it is any. Raises RedisError."""
        ids = self._ids(popped)
        if not ids:
            return []
        with self._connection.pipeline(transaction=False) as pipeline:
            pipeline.llen(self._queue.key)
            for job_id in ids:
                pipeline.hgetall(DeliveryJob.key_for(job_id))
            behind, *records = pipeline.execute(raise_on_error=False)  # one job may be no hash
        self.behind = behind if isinstance(behind, int) else 0
        found = [self._restored(job_id, record) for job_id, record in zip(ids, records, strict=True)]
        return [job for job in found if job is not None]

    def _ids(self, popped: Sequence[Any]) -> list[str]:
        found = {text(raw): raw for raw in popped}
        for name, raw in found.items():
            if not is_job_id(name):
                logger.error("worker {}: {!r} in its queue is no job, and removed", self._worker, name[:200])
                self._connection.lrem(self._queue.intermediate_queue_key, 1, raw)
        return [name for name in found if is_job_id(name)]

    def _restored(self, job_id: str, record: object) -> DeliveryJob | None:
        try:
            if (job := DeliveryJob.of(job_id, record, self._connection)) is not None:
                return job
        except NoJob as error:
            logger.error("worker {}: job {} is unreadable and set aside: {}", self._worker, job_id, error)
        self._connection.lrem(self._queue.intermediate_queue_key, 1, job_id)
        return None
