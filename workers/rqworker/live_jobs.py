"""The copies that are in RQ jobs of a backup: queued, scheduled or running.

Jobs are read in pages and without Job objects: only the call, which holds the ids. The registries are read in the order
in which a job moves (scheduled, queued, popped, started), the queue from its end, so that a job that moves meanwhile is
not missed. A job that is created meanwhile may be: so the reconciler reads twice. Foreign or unreadable jobs count as
empty.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from redis import Redis
from rq import Queue
from rq.worker import BaseWorker

from relay.ledger import changes, queries, rq_jobs
from relay.ledger import keys as ledger_keys
from relay.mail.ids import are_ids
from relay.mail.ids import text as as_text
from relay.mail.stored import parsed

_LONGEST = 1 << 20  # octets of the call of a job
_PAGE = 1000
_JOB = "rq:job:"
_EXECUTION = "rq:execution:"


@dataclass(slots=True)
class Live:
    """The copies in jobs of one backup. ``dead`` workers, and ``popped`` jobs that stay popped, need a repair."""

    queued_jobs: int = 0
    queued_ids: int = 0
    popped: list[str] = field(default_factory=list)  # jobs in the intermediate list
    dead: set[str] = field(default_factory=set)  # dead workers of started jobs; "" if the name is unknown
    _jobs: dict[str, str] = field(default_factory=dict)  # id -> a job that holds it
    _more: set[tuple[str, str]] = field(default_factory=set)  # (id, job) when several hold it

    def add(self, job: str, ids: Sequence[str]) -> None:
        """Note that a job holds these copies."""
        if self._jobs.keys().isdisjoint(ids):  # the usual case, for all ids at once
            self._jobs.update(dict.fromkeys(ids, job))
            return
        for message_id in ids:
            if self._jobs.setdefault(message_id, job) != job:
                self._more.add((message_id, job))

    def covers(self, message_id: str, owner: str) -> bool:
        """Return whether a job will deliver this copy: its owner, or any job if it has none."""
        job = self._jobs.get(message_id)
        return job is not None and (not owner or job == owner or (message_id, owner) in self._more)

    def uncovered(self, ids: Iterable[str]) -> list[str]:
        """Return those of these copies, which have no owner, that are in no job."""
        return [message_id for message_id in ids if message_id not in self._jobs]


def read(connection: Redis, destination: str) -> Live:
    """Read all jobs of a backup. Raises RedisError."""
    queue = rq_jobs.queue(connection, destination)
    live = Live()
    for page in queries.pages(connection, queue.scheduled_job_registry.key):
        _add(connection, live, [job for job, _ in page])
    for jobs in queued(connection, queue):
        live.queued_jobs += len(jobs)
        live.queued_ids += _add(connection, live, jobs)
    live.popped = _texts(connection.lrange(queue.intermediate_queue_key, 0, -1))
    _add(connection, live, live.popped)
    started = _texts(connection.zrange(queue.started_job_registry.key, 0, -1))
    _add(connection, live, [entry.partition(":")[0] for entry in started])
    live.dead = _dead(connection, started)
    return live


def queued(connection: Redis, queue: Queue) -> Iterator[list[str]]:
    """Yield the ids of queued jobs in pages, from the end, since workers take from the front."""
    last = -1
    while jobs := _texts(connection.lrange(queue.key, last - _PAGE + 1, last)):
        yield jobs
        last -= _PAGE


def calls(connection: Redis, jobs: Sequence[str]) -> list[list[str]]:
    """Return the message ids in each of these jobs."""
    if not jobs:
        return []
    with connection.pipeline(transaction=False) as pipe:
        for job in jobs:
            pipe.hget(_JOB + job, "data")
        return [_ids(data) for data in pipe.execute(raise_on_error=False)]  # one may be no hash


def put_back_leased(connection: Redis, destination: str, worker: str, found: Live | None = None) -> None:
    """End the leases of a dead worker; its copies that are in no job any more, tried from memory, get one.

    ``found`` are the jobs, if they have been read. Raises RedisError. What a crash leaves undone here is found by the
    reconciler.
    """
    ended = _texts(changes.release_leases(connection, destination, worker))
    if not ended:
        return
    ids = (found or read(connection, destination)).uncovered(ended)
    for start in range(0, len(ids), rq_jobs.JOB_SIZE):
        with connection.pipeline(transaction=True) as pipe:
            page = ids[start : start + rq_jobs.JOB_SIZE]
            rq_jobs.enqueue(pipe, rq_jobs.queue(connection, destination), destination, page)
            pipe.execute()


def forget_useless(connection: Redis, destination: str) -> int:
    """Delete queued and scheduled jobs whose copies are neither pending nor failed any more; returns their number."""
    queue = rq_jobs.queue(connection, destination)
    scheduled = queue.scheduled_job_registry.key
    count = 0
    lists = list(queued(connection, queue))
    lists += [[job for job, _ in page] for page in queries.pages(connection, scheduled)]
    for jobs in lists:
        held = zip(jobs, calls(connection, jobs), strict=True)
        useless = [job for job, ids in held if not _waits(connection, destination, ids)]
        with connection.pipeline(transaction=True) as pipe:
            for job in useless:
                pipe.lrem(queue.key, -1, job)
                pipe.zrem(scheduled, job)
                pipe.delete(_JOB + job)
            pipe.execute()
        count += len(useless)
    return count


def _texts(entries: Any) -> list[str]:
    return [as_text(entry) for entry in entries]


def _waits(connection: Redis, destination: str, ids: list[str]) -> bool:
    keys = (ledger_keys.PENDING, ledger_keys.FAILED)
    return bool(ids) and any(s is not None for key in keys for s in connection.zmscore(key + destination, ids))


def _add(connection: Redis, live: Live, jobs: Sequence[str]) -> int:
    count = 0
    for job, ids in zip(jobs, calls(connection, jobs), strict=True):
        live.add(job, ids)
        count += len(ids)
    return count


def _ids(data: object) -> list[str]:
    """Read the call of a job: zlib over JSON ``[function, instance, arguments, keywords]``."""
    if not isinstance(data, bytes):
        return []
    try:
        function, _, (_, ids), _ = parsed(unfolded(data))
    except (ValueError, TypeError):
        return []
    return ids if function == rq_jobs.FUNCTION and are_ids(ids) else []


def unfolded(data: bytes) -> bytes:
    """Decompress the call of a job, up to the size of a genuine one. Raises ValueError."""
    unfolding = zlib.decompressobj()
    try:
        call = unfolding.decompress(data, _LONGEST)
    except zlib.error as error:
        raise ValueError("it cannot be unfolded") from error
    if not unfolding.eof:
        raise ValueError("it is cut off, or too long")
    return call


def _dead(connection: Redis, started: Sequence[str]) -> set[str]:
    """Return the workers of started jobs that are registered no more: their key has expired, or is a mere remnant.

    A command that a killed worker had under way may reach Redis after its successor has removed the key, and make it
    again, without the fields of a registration and without an end.
    """
    if not started:
        return set()
    with connection.pipeline(transaction=False) as pipe:
        for entry in started:
            pipe.hget(_EXECUTION + entry, "worker_name")
            pipe.hget(_JOB + entry.partition(":")[0], "worker_name")
        names = [name if isinstance(name, bytes) else b"" for name in pipe.execute(raise_on_error=False)]
        workers = {as_text(execution or job) for execution, job in zip(names[::2], names[1::2], strict=True)}
        ordered = sorted(workers)
        for name in ordered:
            pipe.hexists(BaseWorker.redis_worker_namespace_prefix + name, "birth")
        found = pipe.execute(raise_on_error=False)  # another type of key is no registration either
        return {name for name, is_registered in zip(ordered, found, strict=True) if is_registered is not True}
