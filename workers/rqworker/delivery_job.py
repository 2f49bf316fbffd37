"""The job class of the workers, which calls only the functions in ``workers.jobs``.

Anybody who can write to Redis can forge a job, and RQ would call any importable function by its name, as the job or as
one of its callbacks. A job that names anything except ``workers.jobs.deliver`` raises Refused when it is run.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

from redis import Redis
from redis.client import Pipeline
from rq.exceptions import DeserializationError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.results import Result
from rq.serializers import JSONSerializer

from relay.mail.text import printable
from workers import jobs
from workers.rqworker import live_jobs

_ARGUMENTS = 2  # destination and ids
_LONGEST = 200  # characters of a reason


class NoJob(ValueError):
    """A record that is no job."""


class DeliveryJob(Job):
    """A job that can call only the functions in workers.jobs that are meant for it."""

    def restore(self, raw_data: Any) -> None:
        # RQ would decompress any amount of data, both of the call and of the reason for a failure.
        raw_data = {name: value for name, value in raw_data.items() if name != b"exc_info"}
        try:
            live_jobs.unfolded(raw_data.get(b"data", b""))
        except ValueError:
            raw_data[b"data"] = b""
        super().restore(raw_data)
        self._success_callback_name = self._failure_callback_name = self._stopped_callback_name = None
        self.webhooks = []

    @classmethod
    def of(cls, job_id: str, record: object, connection: Redis) -> DeliveryJob | None:
        """Make the job of a record from Redis; None without a record. Raises NoJob."""
        if not isinstance(record, dict):
            raise NoJob("another type of key")
        job = cls(job_id, connection=connection, serializer=JSONSerializer)
        try:
            if record:
                job.restore(record)
                return job
        except Exception as error:  # RQ may raise anything on a forged record
            raise NoJob(printable(f"{type(error).__name__}: {error}"[:_LONGEST])) from error
        return None

    def function(self) -> Callable[..., Future[None]]:
        """Return the function to call. Raises Refused."""
        try:
            name, instance = self.func_name or "", self.instance
        except DeserializationError as error:
            raise jobs.Refused("unreadable call") from error
        module, _, function = name.rpartition(".")
        if module != jobs.__name__ or function not in jobs.ALLOWED or instance is not None:
            raise jobs.Refused(f"only {jobs.__name__} may be called, not {name!r}")
        return cast("Callable[..., Future[None]]", getattr(jobs, function))

    @property
    def copies(self) -> int:
        """The number of copies in the job; 0 if its call cannot be read."""
        try:
            return len(self.args[1])
        except (DeserializationError, IndexError, TypeError):
            return 0

    def perform(self) -> Future[None]:
        """Start the job; returns the future of the called function. Raises Refused, and what the call raises."""
        begun = cast("Future[None]", super().perform())
        self._result = None  # the job has no result
        return begun

    def _execute(self) -> Future[None]:
        function = self.function()
        if self.kwargs or len(self.args) != _ARGUMENTS:
            raise jobs.Refused("wrong arguments")
        return function(*self.args)

    @property
    def is_forgotten_when_done(self) -> bool:
        """Whether neither results nor dependent jobs exist, so that one transaction ends it."""
        return self.result_ttl == 0 and not (
            self.group_id or self.has_rate_limit or self.repeats_left or self._dependency_ids
        )

    def forget(self, pipeline: Pipeline) -> None:
        """Delete all keys that the job can have while it runs."""
        results: str = Result.get_key(self.id)
        pipeline.delete(self.key, self.dependents_key, self.dependencies_key, results, self.execution_registry.key)

    def record_failure(self, reason: str, pipeline: Pipeline, worker: str, execution: Execution) -> None:
        """Put the job into the failed registry, where rq-dashboard shows it."""
        self.set_status(JobStatus.FAILED, pipeline=pipeline)
        self._handle_failure(reason, pipeline, worker, execution.id, execution.created_at, self.ended_at)
