"""Merges many small jobs into larger ones: copies released one by one while no worker ran are delivered in batches.

A job costs RQ 3 to 10 ms, whatever its size. Measured with 1,500 copies: in jobs of one 240 leave in a second, in
jobs of a hundred 1,600, with 1.3 ms of the worker's processor time and 600 octets of Redis less for each. Jobs are
taken from the front and go back merged to the end until each has been seen once, so that their order stays. Meanwhile
they are in RQ's intermediate list, from which they return to the queue after a crash. The new job owns the copies
that the merged jobs owned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from redis import Redis

from relay.ledger import changes, rq_jobs
from relay.ledger.rq_jobs import JOB_SIZE
from relay.mail.ids import text as as_text
from workers.rqworker import live_jobs

_LONG = 1000  # jobs; a shorter queue is left alone
_SMALL = 10  # ids in a job on average, below which merging pays
_TAKEN = 500  # jobs in one transaction

# KEYS: queue, intermediate list. ARGV: how many jobs.
_TAKE = """
local jobs = redis.call('LRANGE', KEYS[1], 0, ARGV[1] - 1)
if #jobs > 0 then
  redis.call('LTRIM', KEYS[1], #jobs, -1)
  redis.call('RPUSH', KEYS[2], unpack(jobs))
end
return jobs
"""

# KEYS: intermediate list. ARGV: jobs, which stand at its front in this order.
_GIVE = """
for _, job in ipairs(ARGV) do redis.call('LREM', KEYS[1], 1, job) end
"""


def is_worth_it(jobs: int, ids: int, job_size: int = JOB_SIZE) -> bool:
    """Return whether a queue with this number of jobs, and of ids in all of them, should be merged."""
    return jobs > _LONG and ids < jobs * min(_SMALL, job_size / 2)


def merge(
    connection: Redis,
    destination: str,
    jobs: int,
    tick: Callable[[], object] = lambda: None,
    job_size: int = JOB_SIZE,
) -> int:
    """Merge the first ``jobs`` jobs of a queue; returns by how many they became fewer. ``tick`` is called between."""
    queue = rq_jobs.queue(connection, destination)
    fewer = 0
    while jobs > 0:
        tick()
        taken = connection.eval(_TAKE, 2, queue.key, queue.intermediate_queue_key, str(min(jobs, _TAKEN)))
        names = [as_text(job) for job in cast("list[bytes]", taken)]
        if not names:
            break
        jobs -= len(names)
        fewer += len(names) - _put_back(connection, destination, names, job_size)
    return fewer


def _put_back(connection: Redis, destination: str, jobs: list[str], job_size: int) -> int:
    """Queue taken jobs again, the small ones merged; returns the new number of jobs."""
    queue = rq_jobs.queue(connection, destination)
    count = 0
    with connection.pipeline(transaction=True) as pipe:
        small: dict[str, str] = {}  # id -> its job
        old: list[str] = []

        def flush() -> None:
            nonlocal count
            if small:
                job = rq_jobs.enqueue(pipe, queue, destination, list(small))
                changes.reassign(pipe, destination, job, small)
                changes.reassign(pipe, destination, job, small, failed=True)
                count += 1
                small.clear()

        for job, ids in zip(jobs, live_jobs.calls(connection, jobs), strict=True):
            if len(ids) * 2 > job_size or not ids:  # large enough, or not a job of smtp-dup
                flush()
                pipe.rpush(queue.key, job)
                count += 1
                continue
            if len(small) + len(ids) > job_size:
                flush()
            small.update(dict.fromkeys(ids, job))
            old.append(job)
        flush()
        if old:
            pipe.delete(*("rq:job:" + job for job in old))
        pipe.eval(_GIVE, 1, queue.intermediate_queue_key, *jobs)
        pipe.execute()
    return count
