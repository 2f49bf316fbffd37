"""The backlog: what waits for each backup, as an operator sees it, and what they can do about it.

Copies are listed by age, in pages and without their bodies. ``flush`` is `postqueue -f`: everything is due now.
``move`` gives the copies of one destination to another; what is being delivered at that moment stays, and so
does what the other has a copy of its own waiting for, and a second call moves the rest. A destination that is
not in the ledger raises UnknownDestination. ``forget`` ends a destination that nothing names any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from redis import Redis

from relay import maillog
from relay.batches import batched
from relay.ledger import changes, keys, queries, rq_jobs
from relay.ledger.changes import Move
from relay.ledger.copy_state import Attempt, CopyState
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.ids import text as as_text
from relay.mail.stored import moment
from workers.queues import failed, selection
from workers.queues.selection import WAITING, Filter
from workers.rqworker import live_jobs

_PAGE = 500
_BATCH = 100  # copies dropped in one transaction


@dataclass(frozen=True, slots=True)
class WaitingCopy:
    """One pending copy: the recipients that are owed it. Times are seconds since the epoch.

    ``next_attempt_at`` is None when it is due now or under way.
    """

    id: str
    destination: str
    sender: str
    recipients: tuple[str, ...]
    size: int
    received_at: float
    attempts: int
    next_attempt_at: float | None
    last_reply: str


@dataclass(frozen=True, slots=True)
class WaitingDetail(WaitingCopy):
    """A pending copy with where its message came from and what was said at each attempt, oldest first."""

    client_address: str
    history: tuple[Attempt, ...]


@dataclass(frozen=True, slots=True)
class UncertainMessage:
    """A message whose fate at the primary is unknown; at ``copied_at`` its copies go out all the same."""

    id: str
    sender: str
    recipients: tuple[str, ...]
    size: int
    received_at: float
    copied_at: float


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move did, in copies. ``covered`` were dropped: the new destination had a copy for the same recipients."""

    pending: int
    failed: int
    covered: int
    left: int  # being delivered, or waiting there already


# --- listing --------------------------------------------------------------------------------------------------


def show(connection: Redis, message_id: str) -> list[WaitingDetail]:
    """Return a message's pending copies, one per destination where it waits. Raises UnknownId."""
    found: list[WaitingDetail] = []
    for page in selection.select(connection, WAITING, Filter(ids=(message_id,)), whole=True):
        for copy, row in zip(page.found, rows(connection, page), strict=True):
            fields = {name: getattr(row, name) for name in WaitingCopy.__slots__}
            client = copy.envelope.client_address if copy.envelope else ""
            found.append(WaitingDetail(**fields, client_address=client, history=copy.state.history))
    return found


def uncertain(connection: Redis) -> Iterator[UncertainMessage]:
    """Yield the messages whose fate at the primary is unknown, the next to be copied first."""
    for page in queries.pages(connection, keys.UNCERTAIN, size=_PAGE):
        ids = [message_id for message_id, _ in page]
        for (message_id, at), envelope in zip(page, queries.envelopes(connection, ids), strict=True):
            yield UncertainMessage(
                id=message_id,
                sender=envelope.sender if envelope else "",
                recipients=tuple(r.address for r in envelope.recipients) if envelope else (),
                size=envelope.size if envelope else 0,
                received_at=envelope.received_at if envelope else 0.0,
                copied_at=at,
            )


def drop_copies(connection: Redis, destination: str, copies: Mapping[str, float]) -> int:
    """Forget pending copies for good: id -> its score as it was read. Returns how many.

    One that is being delivered at this moment, or has another score by now, stays.
    """
    count = 0
    for batch in batched(list(copies.items()), _BATCH):
        with connection.pipeline(transaction=True) as pipe:
            changes.drop_unchanged(pipe, destination, dict(batch), pending=True)
            count += len(pipe.execute()[0])
    return count


def tidy(connection: Redis, destination: str, dropped: int) -> None:
    """Delete the jobs of copies that were dropped, unless looking at all jobs takes longer than the dropping did.

    A job that stays finds nothing to do when its turn comes.
    """
    queue = rq_jobs.queue(connection, destination)
    if connection.llen(queue.key) + connection.zcard(queue.scheduled_job_registry.key) <= dropped + _PAGE:
        live_jobs.forget_useless(connection, destination)


def rows(connection: Redis, page: selection.Page) -> Iterator[WaitingCopy]:
    """Yield the rows of a page of copies that wait, for which it was read whole."""
    if not page.found:
        return
    scheduled = rq_jobs.queue(connection, page.target.name).scheduled_job_registry.key
    times = connection.zmscore(scheduled, [copy.state.job for copy in page.found])
    clock = changes.now(connection)
    for (message_id, accepted, state, envelope), at in zip(page.found, times, strict=True):
        due = moment(at) if at is not None and at > clock else None
        yield WaitingCopy(
            id=message_id,
            destination=page.target.name,
            sender=envelope.sender if envelope else "",
            recipients=queries.addressees(envelope, page.target, state),
            size=envelope.size if envelope else 0,
            received_at=envelope.received_at if envelope else accepted,
            attempts=state.attempts,
            next_attempt_at=due or page.health.probe_at,
            last_reply=state.last_reply or page.health.reason,
        )


# --- flush ----------------------------------------------------------------------------------------------------


def flush(connection: Redis, destination: str | None = None) -> int:
    """Make everything that waits due now, and have paused destinations probed. Returns how many copies wait.

    Raises UnknownDestination.
    """
    waiting = 0
    for target in queries.destinations(connection, destination):
        # First: whoever claims one of these copies sees it, and opens new connections for them.
        connection.hincrby(keys.HEALTH + target.name, "flush", 1)
        key = rq_jobs.queue(connection, target.name).scheduled_job_registry.key
        clock = int(changes.now(connection))
        # As many rounds as there are jobs now: what is deferred meanwhile waits for its own time.
        for _ in range(0, connection.zcard(key), queries.PAGE):
            later = connection.zrangebyscore(key, f"({clock}", "+inf", start=0, num=queries.PAGE)
            if not later:
                break
            connection.zadd(key, dict.fromkeys(cast("list[bytes]", later), clock), xx=True)
        waiting += connection.zcard(keys.PENDING + target.name)
    return waiting


def flush_copies(connection: Redis, destination: str, ids: Sequence[str], job_size: int = rq_jobs.JOB_SIZE) -> int:
    """Make these copies due now, and have a paused destination probed. Returns how many still wait.

    Those whose turn is later leave in jobs of their own, which own them from then on: the jobs that they were in find
    the others only. What was never tried is due already.
    """
    connection.hincrby(keys.HEALTH + destination, "flush", 1)  # first, as above
    queue = rq_jobs.queue(connection, destination)
    owned = zip(ids, changes.owners(connection, destination, ids), strict=True)
    owners = {message_id: job for message_id, job in owned if job}
    times = connection.zmscore(queue.scheduled_job_registry.key, list(owners.values())) if owners else []
    clock = changes.now(connection)
    later = [i for i, at in zip(owners, times, strict=True) if at is not None and at > clock]
    for batch in batched(later, job_size):
        with connection.pipeline(transaction=True) as pipe:
            job = rq_jobs.enqueue(pipe, queue, destination, batch)
            changes.reassign(pipe, destination, job, {i: owners[i] for i in batch})
            pipe.execute()
    return sum(score is not None for score in connection.zmscore(keys.PENDING + destination, list(ids)))


# --- move -----------------------------------------------------------------------------------------------------


def move(connection: Redis, source: str, target: str, job_size: int = rq_jobs.JOB_SIZE) -> Moved:
    """Give the pending and failed copies of one destination to another, for the same recipients.

    They are tried there at once, and stay as old as they are; what counts for ``retry.give_up`` begins anew. Failed
    ones are listed there. Who gets another copy of the same message there anyway is not sent a second one.
    Raises UnknownDestination, ValueError.
    """
    if source == target:
        raise ValueError("a destination cannot be moved to itself")
    (old,), (new,) = queries.destinations(connection, source), queries.destinations(connection, target)
    mover = _Mover(connection, old, new, job_size)
    mover.move(failed_ones=False)
    mover.move(failed_ones=True)
    live_jobs.forget_useless(connection, old.name)
    return Moved(mover.pending, mover.failed, mover.covered, mover.left)


# --- forget ---------------------------------------------------------------------------------------------------


class StillNeeded(Exception):
    """A destination that cannot be forgotten; the text says what names it."""


def forget(connection: Redis, name: str) -> None:
    """Forget a destination with its counters and what RQ has of it. Raises UnknownDestination, StillNeeded.

    Only where no copy is pending, failed or being delivered, and no message that is staged or uncertain names it. What
    a relay that still copies to it accepts later makes it known again.
    """
    (target,) = queries.destinations(connection, name)
    for key, kind in ((keys.STAGED, "on the way to the primary"), (keys.UNCERTAIN, "uncertain")):
        for page in queries.pages(connection, key, size=_PAGE):
            ids = [message_id for message_id, _ in page]
            for message_id, envelope in zip(ids, queries.envelopes(connection, ids), strict=True):
                if envelope is None:
                    raise StillNeeded(f"message {message_id}, {kind}, cannot be read: it may name {name}")
                if name in envelope.destinations:
                    raise StillNeeded(f"message {message_id}, {kind}, is for {name} too")
    with connection.pipeline(transaction=True) as pipe:
        changes.forget(pipe, name)
        (counts,) = pipe.execute()
    left = [
        f"{count} {kind}" for count, kind in zip(counts, ("waiting", "failed", "being delivered"), strict=True) if count
    ]
    if left:
        raise StillNeeded(f"{name} has copies: {', '.join(left)}; see queue move, queue drop, failed drop")
    queue = rq_jobs.queue(connection, target.name)
    for registry in (queue.scheduled_job_registry, queue.failed_job_registry):
        for job in registry.get_job_ids():
            registry.remove(job, delete_job=True)
    queue.delete(delete_jobs=True)


class _Mover:
    """Moves the copies of one destination to another and counts them."""

    def __init__(self, connection: Redis, old: Destination, new: Destination, job_size: int) -> None:
        self._connection = connection
        self._job_size = job_size
        self._old, self._new = old, new
        self._queues = rq_jobs.queue(connection, old.name), rq_jobs.queue(connection, new.name)
        self.pending = self.failed = self.covered = self.left = 0

    def move(self, *, failed_ones: bool) -> None:
        key = (keys.FAILED if failed_ones else keys.PENDING) + self._old.name
        states = (keys.FAILURE if failed_ones else keys.OWN) + self._old.name
        for page in queries.pages(self._connection, key, size=self._job_size):
            ids = [message_id for message_id, _ in page]
            before = cast("list[bytes | None]", self._connection.hmget(states, ids))
            found = queries.envelopes(self._connection, ids)
            if failed_ones:
                self._move_failed(ids, before, found)
            else:
                self._move_pending(ids, before, found)

    def _move_pending(
        self, ids: Sequence[str], before: Sequence[bytes | None], found: Sequence[Envelope | None]
    ) -> None:
        clock = changes.now(self._connection)
        with self._connection.pipeline(transaction=True) as pipe:
            job = rq_jobs.enqueue(pipe, self._queues[1], self._new.name, ids)
            moves = []
            for message_id, data, envelope in zip(ids, before, found, strict=True):
                state = self._state(CopyState.from_wire(data), envelope)
                after = replace(state, job=job, tries=0, since=clock).to_wire() if state else None
                moves.append(Move(message_id, as_text(data) if data else "", after))
            changes.move(pipe, self._old.name, self._new.name, moves)
            done = pipe.execute()[-1]
        self.pending += self._count(moves, done)

    def _move_failed(
        self, ids: Sequence[str], before: Sequence[bytes | None], found: Sequence[Envelope | None]
    ) -> None:
        states = [CopyState.from_wire(data) for data in before]
        with self._connection.pipeline(transaction=True) as pipe:
            moves = []
            for message_id, data, state, envelope in zip(ids, before, states, found, strict=True):
                after = self._state(state, envelope)
                if after is not None:
                    after = failed.relist(pipe, self._queues[1], self._new.name, message_id, after, envelope)
                moves.append(Move(message_id, as_text(data) if data else "", after.to_wire() if after else None))
            failed.forget_jobs(pipe, self._queues[0], [state.job for state in states])
            changes.move(pipe, self._old.name, self._new.name, moves, failed=True)
            done = pipe.execute()[-1]
        self.failed += self._count(moves, done)

    def _state(self, state: CopyState, envelope: Envelope | None) -> CopyState | None:
        """Return a copy's state at the new destination, None when nobody is owed it there.

        What the old one said is no divergence of the new one.
        """
        state = replace(state, open=(), past=())
        if envelope is None:
            return state
        owed = envelope.owed_to(self._old) if state.owed is None else state.owed
        if self._new.name in envelope.destinations:
            covered = self._covered(envelope)
            owed = tuple(i for i in owed if i not in covered)
        if not owed:
            return None
        # With an old record everybody is written down: what it owes would be asked of today's filter again.
        is_all = owed == envelope.owed_to(self._new) and (envelope.promised is not None or not self._new.domains)
        return replace(state, owed=None if is_all else owed)

    def _covered(self, envelope: Envelope) -> tuple[int, ...]:
        """Return who gets the new destination's own copy; of an old record only who surely does."""
        covered = envelope.owed_to(self._new)
        if envelope.promised is None:
            covered = tuple(i for i in covered if self._new.wants(envelope.recipients[i]))
        return covered

    def _count(self, moves: Sequence[Move], done: Sequence[Any]) -> int:
        gone = [m for m, is_gone in zip(moves, done, strict=True) if is_gone]
        for m in gone:
            if m.after is not None:
                maillog.moved(m.id, self._old.name, self._new.name)
        covered = sum(m.after is None for m in gone)
        self.covered += covered
        self.left += len(moves) - len(gone)
        return len(gone) - covered
