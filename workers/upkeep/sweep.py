"""One sweep of the reconciler: compares the ledger with the RQ jobs, and repairs differences.

A copy that is pending, not leased and in no live job at two sweeps gets a new job. A sweep also does what no job does:
it recovers messages of dead relay processes, gives up copies that are too old at a paused destination, deletes failed
ones past ``failed.ttl``, and cleans up after RQ. Between sweeps only the suspects of the last one are kept. All steps
are small, may be repeated, and may run in two processes at once. A sweep that Redis interrupts is repeated.

When Redis's clock is set, expiry times are too early or too late: a worker counts as dead only after two sweeps miss
it, times too far ahead are moved nearer, and a jump of the clock makes nothing older.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from redis import Redis

from relay import maillog
from relay.batches import batched
from relay.config.loader import Settings
from relay.ledger import (
    archive,
    changes,
    divergence_upkeep,
    misplaced,
    queries,
    recovery,
    registry,
    rq_jobs,
)
from relay.ledger import keys as ledger_keys
from relay.ledger.continuity import Continuity, forget_kept
from relay.ledger.divergence_recount import recount
from relay.ledger.redis_clock import RedisClock, last_look, note_look, pull_in
from relay.mail.destination import Destination
from relay.mail.ids import text as as_text
from relay.mail.reply_text import Known
from relay.mail.text import count
from relay.topology import heartbeats
from workers.delivery import leases
from workers.queues import failed
from workers.rqworker import live_jobs
from workers.rqworker.revival import forget, revive, shorten_lives
from workers.upkeep import merge_jobs, orphan_bodies
from workers.upkeep.ended_leases import EndedLeases
from workers.upkeep.give_up import GivingUp
from workers.upkeep.report import Report

_SETTLED_SECONDS = 10.0  # a copy that is pending for less may be about to get its job
_THOROUGH_SECONDS = 3600.0  # between two thorough sweeps
_PAGE = 2000  # pending copies checked in one step, a few milliseconds of Redis
SILENT_SECONDS = 20.0  # between two checks for a worker; a living one restores an expired key within 15
_LEASE_SLACK = 5.0


@dataclass(slots=True)
class _Memory:
    """What the next sweep needs from this one."""

    suspects: dict[str, set[str]] = field(default_factory=dict)  # destination -> ids without a live job
    popped: dict[str, set[str]] = field(default_factory=dict)  # destination -> jobs between queue and worker
    silent: dict[str, dict[str, float]] = field(default_factory=dict)  # destination -> worker -> missed since
    uncertain: set[str] = field(default_factory=set)  # messages whose digests have been noted
    thorough_at: float = -math.inf


class Sweeper:
    """Runs sweeps. ``tick`` is called between the steps and may raise to end a sweep."""

    def __init__(self, connection: Redis, settings: Settings, tick: Callable[[], object] = lambda: None) -> None:
        self._connection = connection
        self._settings = settings
        self._job_size = settings.workers.job_size
        self._tick = tick
        self._memory = _Memory()
        self._report = Report()
        self._ended = EndedLeases()
        self._clock = RedisClock()
        self._was_asked = False
        self._behind = 0.0  # seconds by which Redis's clock was set back and deadlines must still be moved

    @property
    def misses_workers(self) -> bool:
        """Whether the last sweep found no key of a worker that has a job."""
        return any(self._memory.silent.values())

    def sweep(self, *, repair: bool = True, thorough: bool | None = None, kept: float = math.inf) -> Report:
        """Run one sweep; returns its report. Raises RedisError.

        Without ``repair`` the suspects are only noted and reported. ``thorough`` (None: once an hour) also checks every
        body, orphan bodies and the failed jobs of RQ.
        """
        begun = time.monotonic()
        self._report = report = Report(kept)
        if thorough is None:
            thorough = begun - self._memory.thorough_at >= _THOROUGH_SECONDS
        self._begin(repair=repair, thorough=thorough)
        for name, destination in registry.destinations(self._connection).items():
            self._tick()
            found = live_jobs.read(self._connection, name)
            self._put_back(name, found, repair=repair)
            self._requeue(name, found, repair=repair)
            if thorough:
                self._check_bodies(name, repair=repair)
            if repair:
                self._tidy(destination, found, thorough=thorough)
            if thorough:
                self._recount(destination, repair=repair)
        if repair:
            self._move_bodies()
        if thorough:
            for message_id, action in orphan_bodies.bodies(self._connection, self._tick, remove=repair):
                report.add("body that nobody lists", message_id, "", action)
            self._memory.thorough_at = begun
        report.seconds = time.monotonic() - begun
        return report

    def _begin(self, *, repair: bool, thorough: bool) -> None:
        """Do what the steps for each destination rely on."""
        if repair:
            self._report.add_aside(self.set_aside())
        self._look_at_the_clock(repair=repair)
        if repair:
            self._complete(thorough=thorough)
            self._recover()

    def set_aside(self) -> list[tuple[str, str]]:
        """Rename keys of another type, past which no step goes; returns (key, type found)."""
        return misplaced.set_aside(self._connection, (backup.name for backup in self._settings.copied))

    def _look_at_the_clock(self, *, repair: bool) -> None:
        """Check whether Redis's clock has been set, and if so move times that are too far ahead nearer."""
        connection, clock = self._connection, self._clock
        step = clock.ask(connection, 0.0 if self._was_asked else last_look(connection))
        self._was_asked = True
        self._behind += max(0.0, -step)
        if not repair:
            return
        note_look(connection, clock.now())
        for key in (ledger_keys.STAGED, ledger_keys.UNCERTAIN) if self._behind else ():
            self._nearer(key, "", "deadlines", by=self._behind)
        self._behind = 0.0
        for name in registry.destinations(connection):
            self._nearer(ledger_keys.BUSY + name, name, "leases", most=leases.SECONDS + _LEASE_SLACK)
            shorten_lives(connection, rq_jobs.queue(connection, name))

    def _nearer(self, key: str, name: str, what: str, *, by: float = 0.0, most: float = math.inf) -> None:
        if count := pull_in(self._connection, key, self._clock.now(), by=by, most=most):
            self._report.add("too far ahead", "", name, f"{count} {what} brought nearer")

    def _complete(self, *, thorough: bool) -> None:
        """Register every destination that has a list, before the sweep relies on the index."""
        connection = self._connection
        with connection.pipeline(transaction=False) as pipe:
            pipe.sismember(ledger_keys.LISTS, "")
            pipe.hkeys(ledger_keys.DESTINATIONS)
            is_whole, known = pipe.execute()
        wanted = {backup.name.encode() for backup in self._settings.copied}
        if thorough or not is_whole or not wanted.issubset(known):
            for name in Continuity(self._settings.copied, self._settings.state_dir).register(connection):
                self._report.add("unknown destination", "", name, "registered")
        heartbeats.forget_old(connection)
        if forgotten := forget_kept(connection):
            self._report.add("body kept while lists were unknown", "", "", f"{forgotten} deleted")

    def _tidy(self, destination: Destination, found: live_jobs.Live, *, thorough: bool) -> None:
        name = destination.name
        giving_up = GivingUp(self._connection, self._settings, destination, self._clock, self._ours(destination))
        for message_id in giving_up.run(self._tick):
            self._report.add("given up", message_id, name, "failed")
        ttl = self._settings.failed.ttl
        for message_id in failed.expire(self._connection, name, ttl, self._clock.ago(ttl)):
            self._report.add("failed copy expired", message_id, name, "dropped")
        keep = self._settings.divergence.keep
        for swept in divergence_upkeep.sweep(self._connection, name, self._clock.ago(keep), self._clock.age):
            maillog.notice("info", "divergence", destination=name, key=swept.key, what=swept.what)
            self._report.add("reason for refusals", swept.key, name, swept.what)
        if thorough or failed.has_stray_jobs(self._connection, name):
            for job in failed.forget_stray_jobs(self._connection, name, self._tick):
                self._report.add("stray failed job", job, name, "deleted")
        if merge_jobs.is_worth_it(found.queued_jobs, found.queued_ids, self._job_size):
            fewer = merge_jobs.merge(self._connection, name, found.queued_jobs, self._tick, self._job_size)
            self._report.add("many small jobs", "", name, count(fewer, "job") + " fewer")

    def _recount(self, destination: Destination, *, repair: bool) -> None:
        """Correct the number of open recipients in each group of divergence by the states of the copies."""
        name, connection = destination.name, self._connection
        for wrong in recount(connection, name, self._ours(destination), repair=repair, tick=self._tick):
            action = f"{count(wrong.was, 'recipient')}, {'mended to' if repair else 'should be'} {wrong.now}"
            self._report.add("wrong count of refusals", wrong.key, name, action)

    def _ours(self, destination: Destination) -> Known:
        return Known(ours=(self._settings.smtp.domain,), server=destination.host)

    def relieve(self) -> int:
        """Move failed bodies to disk now if Redis is filling up; returns their number. Raises RedisError."""
        self._report = Report(0)
        self._move_bodies()
        return self._report.counts["failed body moved"]

    def take_over(self) -> int:
        """Give a job to copies whose worker lets their leases end; returns their number. Raises RedisError."""
        self._report = Report(0)
        for name, ended in self._ended.look(self._connection):
            for start in range(0, len(ended), self._job_size):
                ids = self._with_body(name, ended[start : start + self._job_size], repair=True)
                owners = changes.owners(self._connection, name, ids)
                self._new_job(name, ids, dict(zip(ids, owners, strict=True)))
        return self._report.counts["no job"]

    def _move_bodies(self) -> None:
        """Move bodies of failed copies out of Redis beyond failed.max_bytes, and while Redis is filling up."""
        where = archive.folder(self._settings.state_dir)
        reason = "failed body moved" if archive.is_pressed(self._connection) else "failed.max_bytes exceeded"
        try:
            for message_id, path in archive.move_excess(
                self._connection, where, self._settings.failed.max_bytes, self._tick
            ):
                self._report.add(reason, message_id, "", f"body moved to {path}")
            archive.forget_delivered(self._connection, where)
        except OSError as error:
            maillog.notice("error", "failed bodies cannot be moved", folder=str(where), reason=str(error))

    # --- staged and uncertain messages ----------------------------------------------------------------------------

    def _recover(self) -> None:
        relay = self._settings.relay
        for message_id in recovery.hold_overdue(self._connection, relay.uncertain_hold):
            self._report.add("left staged", message_id, "", "held as uncertain")
        recovery.note_twins(self._connection, self._memory.uncertain)
        for message in recovery.copy_due(self._connection, self._settings.copied, self._job_size):
            for name, share in message.shares.items():
                self._report.add("uncertain", message.id, name, f"copied for {count(len(share.owed), 'recipient')}")
            if not message.shares:
                self._report.add("uncertain", message.id, "", "covered by a twin")

    # --- copies without a job -------------------------------------------------------------------------------------

    def _requeue(self, name: str, found: live_jobs.Live, *, repair: bool) -> None:
        suspects = self._suspects(name, found)
        before = self._memory.suspects.get(name)
        lost = {message_id: owner for message_id, owner in suspects.items() if message_id in (before or ())}
        self._memory.suspects[name] = set(suspects)
        if not repair:
            for message_id in lost if before is not None else suspects:
                self._report.add("no job", message_id, name, "none")
            return
        for batch in batched(list(lost), self._job_size):
            self._tick()
            self._new_job(name, self._with_body(name, batch, repair=True), lost)
        self._memory.suspects[name].difference_update(lost)

    def _suspects(self, name: str, found: live_jobs.Live) -> dict[str, str]:
        """Return the pending copies that are neither leased nor in a live job: id -> the job that owned it."""
        connection = self._connection
        clock = changes.now(connection)
        has_owners = bool(connection.hlen(ledger_keys.OWN + name))
        leased = cast("list[bytes]", connection.zrangebyscore(ledger_keys.BUSY + name, clock, "+inf"))
        busy = {as_text(message_id) for message_id in leased}
        suspects: dict[str, str] = {}
        for page in queries.pages(connection, ledger_keys.PENDING + name, until=clock - _SETTLED_SECONDS, size=_PAGE):
            self._tick()
            ids = [message_id for message_id, _ in page if message_id not in busy]
            if has_owners:
                pairs = zip(ids, changes.owners(connection, name, ids), strict=True)
                suspects |= {i: owner for i, owner in pairs if not found.covers(i, owner)}
            else:
                suspects |= dict.fromkeys(found.uncovered(ids), "")
        return suspects

    def _new_job(self, name: str, ids: Sequence[str], owners: dict[str, str]) -> None:
        if not ids:
            return
        with self._connection.pipeline(transaction=True) as pipe:
            job = rq_jobs.enqueue(pipe, rq_jobs.queue(self._connection, name), name, ids)
            changes.reassign(pipe, name, job, {i: owners[i] for i in ids if owners[i]})
            pipe.execute()
        for message_id in ids:
            maillog.requeued(message_id, name, job)
            self._report.add("no job", message_id, name, f"queued as {job}")

    def _with_body(self, name: str, ids: Sequence[str], *, repair: bool) -> list[str]:
        """Return the ids that have a body; the other copies are removed."""
        keys = [ledger_keys.MESSAGE + message_id for message_id in ids]
        if not keys or self._connection.exists(*keys) == len(keys):
            return list(ids)
        with self._connection.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.exists(key)
            present = pipe.execute()
        for message_id, is_there in zip(ids, present, strict=True):
            if not is_there:
                self._body_missing(name, message_id, repair=repair)
        return [message_id for message_id, is_there in zip(ids, present, strict=True) if is_there]

    def _body_missing(self, name: str, message_id: str, *, repair: bool) -> None:
        if repair:
            with self._connection.pipeline(transaction=True) as pipe:
                changes.drop(pipe, name, [message_id], pending=True)
                if not pipe.execute()[0]:
                    return  # it has been delivered meanwhile
            self._connection.hincrby(ledger_keys.COUNTERS, f"body_missing:{name}", 1)
            maillog.body_missing(message_id, name)
        elif self._connection.zscore(ledger_keys.PENDING + name, message_id) is None:
            return
        self._report.add("body missing", message_id, name, "removed" if repair else "none")

    def _check_bodies(self, name: str, *, repair: bool) -> None:
        for page in queries.pages(self._connection, ledger_keys.PENDING + name):
            self._tick()
            self._with_body(name, [message_id for message_id, _ in page], repair=repair)

    # --- what RQ leaves behind ------------------------------------------------------------------------------------

    def _put_back(self, name: str, found: live_jobs.Live, *, repair: bool) -> None:
        """Queue the jobs of dead workers again, and those that are stuck in the intermediate list."""
        before = self._memory.popped.get(name, set())
        self._memory.popped[name] = set(found.popped)
        now, silent = time.monotonic(), self._memory.silent.get(name, {})
        self._memory.silent[name] = silent = {worker: silent.get(worker, now) for worker in found.dead}
        if not repair:
            return
        queue = rq_jobs.queue(self._connection, name)
        dead = {worker for worker, since in silent.items() if now - since >= SILENT_SECONDS}
        if before.intersection(found.popped):
            dead.add("")
        for worker in sorted(dead):
            if worker:
                live_jobs.put_back_leased(self._connection, name, worker, found)
            for job in revive(self._connection, queue, worker):
                self._report.add("abandoned job", job, name, "queued again")
        forget(self._connection, queue, dead - {""})  # one that lives after all registers with its next beat
