"""The failed list: copies that a backup refused for good or that were given up, kept for an operator.

Each failed copy is an RQ job of its own, so that rq-dashboard shows the reply and its Requeue retries the copy;
what is true is in the ledger, whose claim moves a copy back only for the job that owns it. Deleting the job in
the dashboard hides the copy there and nothing else. Ids that are not in the list raise UnknownId before
anything is changed; what leaves the list meanwhile is passed over.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from redis import Redis
from rq import Queue
from rq.job import Job, JobStatus

from relay import maillog
from relay.batches import batched
from relay.ledger import archive, changes, keys, queries, rq_jobs
from relay.ledger.copy_state import Attempt, CopyState
from relay.mail import encryption
from relay.mail.envelope import Envelope
from relay.mail.ids import text
from relay.mail.record import BodyElsewhere, Message
from relay.mail.stored import moment
from relay.mail.text import printable
from workers.queues import selection
from workers.queues.selection import FAILED, Filter
from workers.rqworker import live_jobs

_BATCH = 100  # copies looked at in one step
_PAGE = 500
_FOR_EVER = -1  # to RQ: until the ledger's entry goes, and the job with it
_NAMED = 3  # recipients in the description of a failed job
_DAY = 86400  # a failed job outlives its ledger entry, whose end is the one that is logged

# KEYS: the failed registry. ARGV: jobs. A job that somebody has just requeued is not in it and stays.
_FORGET_JOBS = """
local count = 0
for _, job in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], job) == 1 then
    redis.call('DEL', 'rq:job:' .. job, 'rq:job:' .. job .. ':dependents', 'rq:job:' .. job .. ':dependencies',
      'rq:results:' .. job, 'rq:executions:' .. job)
    count = count + 1
  end
end
return count
"""


@dataclass(frozen=True, slots=True)
class FailedCopy:
    """One failed copy: those recipients that failed, and the last reply. Times are seconds since the epoch."""

    id: str
    destination: str
    sender: str
    recipients: tuple[str, ...]
    size: int
    reply: str
    attempts: int
    failed_at: float


@dataclass(frozen=True, slots=True)
class FailedDetail(FailedCopy):
    """A failed copy with where its message came from and what was said at each attempt, oldest first."""

    received_at: float
    client_address: str
    history: tuple[Attempt, ...]


# --- for the courier: these add commands to a pipeline in MULTI -----------------------------------------------


def add_failure(
    pipe: Any,
    queue: Queue,
    destination: str,
    message_id: str,
    failure: CopyState,
    remains: CopyState | None,
    reply: str,
    ttl: float,
    envelope: Envelope | None = None,
    *,
    noise: float = changes.NOISE,
) -> CopyState:
    """Move a copy, or the recipients in ``failure.owed``, to the failed list, with a failed job of its own.

    Returns the failure's state with that job. The job's id follows from the copy and the attempt, so that a MULTI
    whose answer was lost can be repeated. ``ttl`` in seconds. What ``envelope`` says is in the job's description.
    """
    owned = replace(failure, job=_job_id(destination, message_id, failure.attempts))
    changes.fail(pipe, destination, message_id, owned, remains, noise=noise)
    _list_job(pipe, queue, _job(queue, destination, message_id, owned, envelope), reply, int(ttl) + _DAY)
    return owned


def adopt(pipe: Any, destination: str, ids: Collection[str], job: str) -> None:
    """Make a job the owner of failed copies: it retries them when it runs. Result: how many there are."""
    changes.reassign(pipe, destination, job, dict.fromkeys(ids), failed=True)


def relist(
    pipe: Any, queue: Queue, destination: str, message_id: str, failure: CopyState, envelope: Envelope | None
) -> CopyState:
    """Add a failed job for a copy that moves to another destination's failed list. Returns its state with that job."""
    owned = replace(failure, job=_job_id(destination, message_id, failure.attempts))
    _list_job(pipe, queue, _job(queue, destination, message_id, owned, envelope), failure.last_reply, _FOR_EVER)
    return owned


def _job_id(destination: str, message_id: str, attempts: int) -> str:
    return f"{message_id}-{zlib.crc32(destination.encode()):08x}-{attempts}"


def _job(queue: Queue, destination: str, message_id: str, failure: CopyState, envelope: Envelope | None) -> Job:
    """Return the failed job of a copy: as old as its message, and ended when the copy failed."""
    job = rq_jobs.create(queue, destination, [message_id], JobStatus.FAILED, failure.job)
    if failure.history:
        job.ended_at = datetime.fromtimestamp(failure.history[-1].at, UTC)
    if envelope is not None:
        job.created_at = datetime.fromtimestamp(envelope.received_at, UTC)
        job.description = _describe(destination, failure, envelope)
    return job


def _describe(destination: str, failure: CopyState, envelope: Envelope) -> str:
    """Return what rq-dashboard shows of a failed copy. RQ stores it as it is: where mail is sealed, no address."""
    size = f"{envelope.size / 1024:,.1f} KB"
    if encryption.is_on():
        return f"1 message to {destination}, {size}"
    indices = range(len(envelope.recipients)) if failure.owed is None else failure.owed
    addresses = [f"<{envelope.recipients[i].address}>" for i in indices if i < len(envelope.recipients)]
    more = f" and {len(addresses) - _NAMED} more" if len(addresses) > _NAMED else ""
    return printable(f"<{envelope.sender}> to {', '.join(addresses[:_NAMED])}{more}, {size}")


def _list_job(pipe: Any, queue: Queue, job: Job, reply: str, ttl: int) -> None:
    queue.failed_job_registry.add(job, ttl=ttl, exc_string=printable(reply), pipeline=pipe)
    job.save(pipeline=pipe)  # with the reply, which the registry leaves out
    pipe.sadd(Queue.redis_queues_keys, queue.key)


# --- for the operator -----------------------------------------------------------------------------------------


def rows(page: selection.Page) -> Iterator[FailedCopy]:
    """Yield the rows of a page of failed copies, which was read whole."""
    for detail in _details(page):
        yield FailedCopy(**{name: getattr(detail, name) for name in FailedCopy.__slots__})


def show(connection: Redis, message_id: str) -> list[FailedDetail]:
    """Return a message's failed copies, one per destination where it failed. Raises UnknownId."""
    pages = selection.select(connection, FAILED, Filter(ids=(message_id,)), whole=True)
    return [detail for page in pages for detail in _details(page)]


def retry_copies(
    connection: Redis,
    destination: str,
    ids: Sequence[str],
    folder: Path | None = None,
    job_size: int = rq_jobs.JOB_SIZE,
) -> int:
    """Have these failed copies of one destination tried again now. Returns how many.

    As Requeue in rq-dashboard, for many at once: they leave in jobs of ``job_size`` copies. Each stays in the failed
    list until its job runs. Bodies in files in ``folder`` come back into Redis while it has room; the others
    are read there by the workers of this host.
    """
    queue = rq_jobs.queue(connection, destination)
    count = 0
    for batch in batched(ids, job_size):
        archive.restore(connection, batch, folder)
        before = changes.owners(connection, destination, batch, failed=True)
        with connection.pipeline(transaction=True) as pipe:
            pipe.hincrby(keys.HEALTH + destination, "flush", 1)  # a paused one is probed: it may have been mended
            adopt(pipe, destination, batch, rq_jobs.enqueue(pipe, queue, destination, batch))
            forget_jobs(pipe, queue, before)
            count += pipe.execute()[-2]
    return count


def attempts_of(connection: Redis, destination: str, ids: Sequence[str]) -> dict[tuple[str, str], int]:
    """Return how often each of these failed copies was tried, by destination and id."""
    states = cast("list[bytes | None]", connection.hmget(keys.FAILURE + destination, ids)) if ids else []
    return {(destination, i): CopyState.from_wire(s).attempts for i, s in zip(ids, states, strict=True)}


def fates(
    connection: Redis, copies: Sequence[tuple[str, str]], before: Mapping[tuple[str, str], int]
) -> list[tuple[str, str]]:
    """Return for each copy what became of its retry (delivered, failed, deferred, "" for not yet) and the reply."""
    with connection.pipeline(transaction=True) as pipe:
        for destination, message_id in copies:
            pipe.zscore(keys.FAILED + destination, message_id)
            pipe.hget(keys.FAILURE + destination, message_id)
            pipe.zscore(keys.PENDING + destination, message_id)
            pipe.hget(keys.OWN + destination, message_id)
        answers = pipe.execute()
    found = []
    for copy, (is_failed, failure, waits, own) in zip(copies, zip(*[iter(answers)] * 4, strict=True), strict=True):
        state = CopyState.from_wire(failure if is_failed is not None else own)
        if is_failed is None and waits is None:
            found.append(("delivered", ""))
        elif state.attempts > before[copy]:
            found.append(("deferred" if is_failed is None else "failed", state.last_reply))
        else:
            found.append(("", state.last_reply))
    return found


def export(connection: Redis, message_id: str, folder: Path | None = None) -> bytes:
    """Return a message as it was before SMTP stuffed its dots, with our Received line.

    Raises UnknownId, and BodyElsewhere when its body was moved to a file on another host.
    """
    try:
        body = queries.message(connection, message_id).body
    except BodyElsewhere as place:
        body = Message.unpack(archive.fetch(place, message_id, folder), message_id).body
    return re.sub(rb"(\A|\r\n)\.", rb"\1", body)  # RFC 5321 4.5.2; only CRLF ends a line


# --- for the reconciler ---------------------------------------------------------------------------------------


def expire(connection: Redis, destination: str, ttl: float, before: float) -> list[str]:
    """Drop what failed before that time, ``ttl`` seconds ago, with a log line each. Returns the ids."""
    gone: list[str] = []
    for page in queries.pages(connection, keys.FAILED + destination, until=before, size=_BATCH):
        dropped = _dropped(connection, destination, dict(page))
        for message_id in dropped:
            maillog.failure_expired(message_id, destination, ttl)
        gone += dropped
    return gone


def has_stray_jobs(connection: Redis, destination: str) -> bool:
    """Say whether there are more failed jobs than failed copies, each of which has one."""
    with connection.pipeline(transaction=True) as pipe:
        pipe.zcard(rq_jobs.queue(connection, destination).failed_job_registry.key)
        pipe.zcard(keys.FAILED + destination)
        jobs, copies = pipe.execute()
    return bool(jobs > copies)


def forget_stray_jobs(connection: Redis, destination: str, tick: Callable[[], object] = lambda: None) -> list[str]:
    """Delete failed jobs that own no failed copy, so that a Requeue would do nothing. Returns their ids."""
    queue = rq_jobs.queue(connection, destination)
    gone: list[str] = []
    for page in queries.pages(connection, queue.failed_job_registry.key, size=_PAGE):
        tick()
        jobs = [job for job, _ in page]
        held = live_jobs.calls(connection, jobs)
        ids = sorted({message_id for call in held for message_id in call})
        owners = dict(zip(ids, changes.owners(connection, destination, ids, failed=True), strict=True))
        stray = [job for job, call in zip(jobs, held, strict=True) if all(owners[i] != job for i in call)]
        if stray:
            with connection.pipeline(transaction=True) as pipe:
                forget_jobs(pipe, queue, stray)
                pipe.execute()
        gone += stray
    return gone


def forget_jobs(pipe: Any, queue: Queue, jobs: Sequence[str]) -> None:
    """Delete failed jobs whose copies are dropped, or owned by another job now. Result: how many."""
    pipe.eval(_FORGET_JOBS, 1, queue.failed_job_registry.key, *(job for job in dict.fromkeys(jobs) if job))


def drop_copies(connection: Redis, destination: str, copies: Mapping[str, float]) -> int:
    """Forget failed copies of one destination for good: id -> its score as it was read. Returns how many.

    One that has failed anew since stays.
    """
    return len(_dropped(connection, destination, copies))


def _dropped(connection: Redis, destination: str, copies: Mapping[str, float]) -> list[str]:
    """Forget failed copies as above. Returns their ids."""
    queue = rq_jobs.queue(connection, destination)
    gone: list[str] = []
    for batch in batched(list(copies), _BATCH):
        scores = connection.zmscore(keys.FAILED + destination, batch)
        # As it stands there: what nobody of ours has written may be no time, and is read as the nearest one.
        found = ((i, score) for i, score in zip(batch, scores, strict=True) if score is not None)
        same = {i: score for i, score in found if moment(score) == copies[i]}
        jobs = changes.owners(connection, destination, list(same), failed=True)
        with connection.pipeline(transaction=True) as pipe:
            changes.drop_unchanged(pipe, destination, same)
            forget_jobs(pipe, queue, jobs)
            gone += map(text, pipe.execute()[0])
    return gone


def _details(page: selection.Page) -> Iterator[FailedDetail]:
    for message_id, at, state, envelope in page.found:
        yield FailedDetail(
            id=message_id,
            destination=page.target.name,
            sender=envelope.sender if envelope else "",
            recipients=queries.addressees(envelope, page.target, state),
            size=envelope.size if envelope else 0,
            reply=state.last_reply,
            attempts=state.attempts,
            failed_at=at,
            received_at=envelope.received_at if envelope else 0.0,
            client_address=envelope.client_address if envelope else "",
            history=state.history,
        )
