"""The reconciler: no copy is forgotten, whatever becomes of jobs, workers and relay processes."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import redis
from loguru import logger
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker

from relay import log_lines
from relay.ledger import changes, keys, queries, recovery
from relay.ledger.changes import Released
from relay.ledger.copy_state import CopyState
from relay.mail.destination import Destination
from relay.mail.headers import equality_digest
from relay.mail.ids import IdSource, made_at, owner_of
from relay.mail.record import Message
from support import listed_copies
from support.ledger_contents import BODY, DAY, Contents, settings
from support.redis_servers import RedisServer
from support.waiting import wait_until
from workers.queues import backlog
from workers.rqworker import live_jobs
from workers.upkeep import merge_jobs, reconciler, sweep
from workers.upkeep.ended_leases import EndedLeases
from workers.upkeep.report import Report
from workers.upkeep.sweep import Sweeper


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client)


def _sweep_twice(contents: Contents, **options: str) -> Report:
    sweeper = Sweeper(contents.connection, settings(**options))
    sweeper.sweep(repair=False, thorough=False)
    return sweeper.sweep(thorough=True)


# Copies without a job


def test_a_copy_whose_job_is_lost_gets_a_new_one_at_the_second_sweep(contents: Contents) -> None:
    """One sweep only suspects; the second makes a job, the third has nothing to do."""
    ids = [contents.pending() for _ in range(3)]
    sweeper = Sweeper(contents.connection, settings())
    assert sweeper.sweep().counts == {}
    assert contents.queued() == {}
    report = sweeper.sweep()
    assert report.counts == {"no job": 3}
    assert list(contents.queued().values()) == [ids]
    assert {f.id for f in report.findings} == set(ids)
    assert sweeper.sweep().counts == {}


def test_a_lease_that_is_renewed_no_more(contents: Contents) -> None:
    """Its copy gets one job once the lease has stayed ended for a while; its claim names that worker."""
    connection, now = contents.connection, [0.0]
    handed, renewed = contents.pending(), contents.pending()
    contents.claim("job", handed, renewed, worker="stopped")
    sweeper = Sweeper(connection, settings())
    sweeper._ended = EndedLeases(lambda: now[0])
    assert sweeper.take_over() == 0

    def ended(*ids: str) -> None:
        connection.zadd(keys.BUSY + "new", dict.fromkeys(ids, changes.now(connection) - 1))

    ended(handed, renewed)
    assert sweeper.take_over() == 0
    now[0] = 15.0
    connection.zadd(keys.BUSY + "new", {renewed: changes.now(connection) + 60})
    assert sweeper.take_over() == 0
    now[0] = 25.0
    ended(renewed)
    assert sweeper.take_over() == 1
    assert list(contents.queued().values()) == [[handed]]
    now[0] = 30.0
    assert sweeper.take_over() == 0
    (claim,) = contents.claim("another", handed, worker="next")
    assert claim.before == "stopped"


def test_new_jobs_hold_a_hundred(contents: Contents) -> None:
    """Many lost copies are few jobs, the oldest first."""
    ids = [contents.pending(age=1000 - n) for n in range(250)]
    _sweep_twice(contents)
    assert [len(held) for held in contents.queued().values()] == [100, 100, 50]
    assert [i for held in contents.queued().values() for i in held] == ids


@pytest.mark.parametrize(("batch", "expected"), [("1", [1] * 7), ("3", [3, 3, 1]), ("5000", [7])])
def test_jobs_hold_as_many_copies_as_workers_batch_says(contents: Contents, batch: str, expected: list[int]) -> None:
    """Whoever makes a job keeps to it: the reconciler, a merge, a dead relay's successor, a retry and a move."""
    given = settings(workers_batch=batch)
    size = given.workers.job_size

    def made(name: str = "new") -> list[int]:
        jobs = contents.queued(name)
        contents.queue(name).empty()
        return [len(held) for held in jobs.values()]

    ids = [contents.pending() for _ in range(7)]
    _sweep_twice(contents, workers_batch=batch)
    assert made() == expected
    _hold(contents, *(contents.staged() for _ in range(7)))
    Sweeper(contents.connection, given).sweep()
    assert made() == expected
    for message_id in ids:
        contents.enqueue(message_id)
    merge_jobs.merge(contents.connection, "new", len(ids), job_size=size)
    assert made() == expected
    for message_id in contents.pending_ids():
        contents.connection.zrem(keys.PENDING + "new", message_id)
    contents.register(Destination("other", "localhost", 25))
    for message_id in [contents.pending() for _ in range(7)]:
        contents.fail(message_id)
    contents.queue().empty()
    assert listed_copies.retry(contents.connection, listed_copies.EVERY, job_size=size) == 7
    assert made() == expected
    for _ in range(7):
        contents.pending()
    assert backlog.move(contents.connection, "new", "other", size).pending == 7
    assert made("other") == expected


def test_a_long_queue_of_jobs_that_hold_all_they_may_is_left_alone() -> None:
    """With a small workers.batch there is nothing to merge, however long the queue is."""
    assert merge_jobs.is_worth_it(2000, 2000)
    assert not merge_jobs.is_worth_it(2000, 2000, 1)
    assert not merge_jobs.is_worth_it(2000, 6000, 3)


def test_copies_in_live_jobs_are_left_alone(contents: Contents) -> None:
    """Queued, scheduled, popped, started or leased: somebody is going to deliver it."""
    queued, scheduled, popped, started, leased, lost = (contents.pending() for _ in range(6))
    contents.claim(contents.enqueue(leased), leased)
    contents.connection.delete(contents.queue().key)
    contents.defer(scheduled)
    contents.enqueue(popped)
    contents.connection.lmove(contents.queue().key, contents.queue().intermediate_queue_key)
    _start(contents, contents.enqueue(started), "living")
    contents.connection.hset("rq:worker:living", "name", "living")
    contents.enqueue(queued)
    sweeper = Sweeper(contents.connection, settings())
    assert [f.id for f in sweeper.sweep(repair=False).findings] == [lost]
    assert [f.id for f in sweeper.sweep(repair=False).findings] == [lost]


def test_a_young_copy_is_not_suspected(contents: Contents) -> None:
    """What was released a moment ago is on its way into a job."""
    contents.pending(age=1)
    assert _sweep_twice(contents).findings == []


def test_a_copy_whose_owner_is_lost_goes_to_the_new_job(contents: Contents) -> None:
    """A deferred copy only obeys the job that owns it: the new one owns it, with its history kept."""
    message_id = contents.pending("a@test", "b@test")
    job = contents.defer(message_id, owed=(1,))
    other = contents.enqueue(message_id)  # holds it, but may not deliver it
    Job.fetch(job, contents.connection, JSONSerializer).delete()
    assert _sweep_twice(contents).counts == {"no job": 1}
    (new,) = set(contents.queued()) - {other}
    assert contents.claim(other, message_id) == []
    (claim,) = contents.claim(new, message_id)
    assert (claim.state.owed, claim.state.attempts) == ((1,), 1)


def test_a_lease_that_begins_meanwhile_is_respected(contents: Contents) -> None:
    """A copy that is claimed between suspicion and repair keeps its owner."""
    message_id = contents.pending()
    owner = contents.defer(message_id)
    contents.claim(owner, message_id)
    with contents.connection.pipeline() as pipe:
        changes.reassign(pipe, "new", "another", {message_id: owner})
        assert pipe.execute() == [0]
    assert contents.state(message_id).job == owner


def test_a_pending_copy_without_a_body_is_removed_and_counted(contents: Contents) -> None:
    """Nothing can be delivered: it is logged, counted and not tried for ever."""
    message_id, whole = contents.pending(), contents.pending()
    contents.claim(contents.enqueue(message_id), message_id, lease=0.0)  # a lease that is over
    contents.connection.delete(contents.queue().key, keys.MESSAGE + message_id)
    report = _sweep_twice(contents)
    assert report.counts == {"body missing": 1, "no job": 1}
    assert contents.pending_ids() == [whole]
    assert contents.connection.hget(keys.COUNTERS, "body_missing:new") == b"1"
    assert contents.connection.exists(keys.BUSY + "new", keys.HOLDERS + "new") == 0


def test_reporting_does_not_count_what_is_on_its_way_into_a_job(
    contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that has a job at the second look is no finding of `queue verify --dry-run`."""
    lost, late = contents.pending(), contents.pending()
    monkeypatch.setattr(reconciler.time, "sleep", lambda _: contents.enqueue(late))
    assert [f.id for f in reconciler.verify(contents.connection, settings(), repair=False).findings] == [lost]


def test_reporting_changes_nothing(contents: Contents) -> None:
    """`queue verify` without repair finds what is wrong and leaves it."""
    message_id, bodiless = contents.pending(), contents.pending()
    contents.connection.delete(keys.MESSAGE + bodiless)
    before = sorted(contents.connection.keys())
    report = reconciler.verify(contents.connection, settings(), repair=False, pause=0)
    assert {(f.finding, f.id, f.action) for f in report.findings} == {
        ("no job", message_id, "none"),
        ("no job", bodiless, "none"),
        ("body missing", bodiless, "none"),
    }
    assert sorted(contents.connection.keys()) == before
    assert asdict(report.findings[0]) == {
        "finding": "no job",
        "id": message_id,
        "destination": "new",
        "action": "none",
    }


def test_verify_repairs(contents: Contents) -> None:
    """`queue verify` sweeps twice and reports what it did."""
    message_id = contents.pending()
    (finding,) = reconciler.verify(contents.connection, settings(), pause=0).findings
    ((job, held),) = contents.queued().items()
    assert held == [message_id]
    assert finding.action == f"queued as {job}"


@pytest.mark.parametrize("state", ["released", "straggler", "retried straggler", "leased"])
def test_the_reconciler_alone_repairs_a_copy_whose_process_died(contents: Contents, state: str) -> None:
    """No successor, no other worker: two sweeps, after the end of its lease, give it a job that may claim it.

    A relay was killed between release and job; a worker was killed with a copy whose job had ended before it, at its
    first attempt or a later one; a worker's host is gone and its leases are left to run out.
    """
    message_id = contents.pending()
    if state != "released":
        job = contents.defer(message_id) if state == "retried straggler" else contents.enqueue(message_id)
        assert contents.claim(job, message_id, worker="dead", lease=0.3 if state == "leased" else 60.0)
        Job.fetch(job, contents.connection, JSONSerializer).delete()  # it has ended; the copy went on without it
        if state != "leased":
            changes.release_leases(contents.connection, "new", "dead")
    sweeper = Sweeper(contents.connection, settings())
    if state == "leased":
        assert sweeper.sweep().counts == {}
        assert sweeper.sweep().counts == {}
        wait_until(
            lambda: not contents.connection.zrangebyscore(keys.BUSY + "new", changes.now(contents.connection), "+inf")
        )
    assert sweeper.sweep().counts == {}
    assert sweeper.sweep().counts == {"no job": 1}
    ((job, held),) = contents.queued().items()
    (claim,) = contents.claim(job, *held, worker="another")
    assert claim.id == message_id
    assert claim.before == ("" if state == "released" else "dead")  # it may have been sent, and the log says so


# What dead workers leave behind


def _start(contents: Contents, job_id: str, worker: str) -> None:
    """Have a worker of this name start a queued job."""
    job = Job.fetch(job_id, contents.connection, JSONSerializer)
    with contents.connection.pipeline() as pipe:
        Execution.create(job, 420, pipeline=pipe, worker_name=worker)
        job.prepare_for_execution(worker, pipeline=pipe)
        pipe.lrem(contents.queue().key, 1, job_id)
        pipe.execute()


@pytest.mark.parametrize("remnant", ["", "state", "successful_job_count", "another type"])
def test_the_job_of_a_worker_that_is_gone_is_queued_again(
    contents: Contents, monkeypatch: pytest.MonkeyPatch, remnant: str
) -> None:
    """A worker of another host that nobody has heard of for minutes, at two looks, loses its job and its leases.

    So does one of whose key a late command, which it sent before it was killed, has left a remnant without an end.
    """
    message_id = contents.pending()
    key = f"{BaseWorker.redis_worker_namespace_prefix}worker"
    if remnant == "another type":
        contents.connection.set(key, "x")
    elif remnant:
        contents.connection.hset(key, remnant, "busy")
    job = contents.enqueue(message_id)
    _start(contents, job, "worker")
    contents.claim(job, message_id)
    sweeper = Sweeper(contents.connection, settings())
    assert sweeper.sweep().findings == []
    assert sweeper.sweep().findings == []  # not long enough after the first
    later = time.monotonic() + 20
    monkeypatch.setattr(sweep.time, "monotonic", lambda: later)
    report = sweeper.sweep()
    assert [(f.finding, f.id) for f in report.findings] == [("abandoned job", job)]
    assert list(contents.queued()) == [job]
    assert contents.queue().started_job_registry.get_job_ids(cleanup=False) == []
    assert not contents.connection.exists(key)
    assert [c.id for c in contents.claim(job, message_id)] == [message_id]


def test_a_job_stranded_between_queue_and_worker_is_queued_again(contents: Contents) -> None:
    """What a worker popped and never started goes back at the second sweep."""
    job = contents.enqueue(contents.pending())
    contents.connection.lmove(contents.queue().key, contents.queue().intermediate_queue_key)
    sweeper = Sweeper(contents.connection, settings())
    assert sweeper.sweep().counts == {}
    assert sweeper.sweep().counts == {"abandoned job": 1}
    assert list(contents.queued()) == [job]
    assert contents.connection.llen(contents.queue().intermediate_queue_key) == 0


def test_jobs_that_are_not_ours_hold_nothing(contents: Contents) -> None:
    """A forged, damaged or deleted job keeps no copy from getting a real one."""
    ids = [contents.pending() for _ in range(4)]
    forged, damaged, deleted, nonsense = (contents.enqueue(i) for i in ids)
    call = contents.queue().create_job("os.system", args=["new", [ids[0]]])
    contents.connection.hset(f"rq:job:{forged}", "data", call.to_dict()["data"])
    contents.connection.hset(f"rq:job:{damaged}", "data", b"\x00no zlib")
    contents.connection.delete(f"rq:job:{deleted}")
    call = contents.queue().create_job("workers.jobs.deliver", args=["new", {"a": 1}])
    contents.connection.hset(f"rq:job:{nonsense}", "data", call.to_dict()["data"])
    assert _sweep_twice(contents).counts == {"no job": 4}


# What a dead process had not yet made jobs of


def test_what_a_dead_relay_released_last_gets_jobs_however_long_its_successor_took(contents: Contents) -> None:
    """Others have gone on meanwhile: its last moments count from its own newest copy, among thousands of theirs."""
    dead, living = IdSource(), IdSource()
    early = contents.pending(message_id=dead.next(), age=500)
    last = [contents.pending(message_id=dead.next(), age=303 - n) for n in range(3)]
    clock = changes.now(contents.connection)
    contents.connection.zadd(keys.PENDING + "new", {living.next(): clock - n / 100 for n in range(25_000)})
    contents.connection.hset(keys.OWNERS, dead.owner, "here relay-1")
    recovery.take_over(contents.connection, "here relay-1", IdSource().owner, 60)
    assert list(contents.queued().values()) == [last]
    assert early not in last


def test_a_process_of_other_settings_at_the_same_place_is_not_dead(contents: Contents) -> None:
    """What one has staged that still drains there stays its own; once it has gone it is taken over."""
    leaving, coming = IdSource(), IdSource()
    recovery.take_over(contents.connection, "here relay-1", leaving.owner, 60, instance="7.1")
    staged = contents.staged(message_id=leaving.next())
    both = frozenset({"7.1", "8.2"})
    take_over = partial(recovery.take_over, contents.connection, "here relay-1", coming.owner, 60, instance="8.2")
    assert take_over(living=both) == []
    assert contents.connection.zscore(keys.STAGED, staged) is not None
    assert take_over(living=both - {"7.1"}) == [staged]
    assert contents.connection.hkeys(keys.OWNERS) == [coming.owner.encode()]


# Staged and uncertain messages


def test_left_staged_becomes_uncertain_with_its_digest(contents: Contents) -> None:
    """Past its deadline by a minute, a message has lost its owner; the digest lets a twin cover it."""
    late, soon = contents.staged(deadline=-61), contents.staged(deadline=-30)
    report = Sweeper(contents.connection, settings()).sweep()
    assert [(f.finding, f.id) for f in report.findings] == [("left staged", late)]
    assert [i for i, _ in contents.connection.zscan_iter(keys.UNCERTAIN)] == [late.encode()]
    assert contents.connection.zscore(keys.STAGED, soon) is not None
    digest = equality_digest("sender@test", BODY % late.encode())
    assert contents.connection.hgetall(keys.TWINS) == {digest.encode(): late.encode()}


def _hold(contents: Contents, *ids: str, seconds: float = -1.0, digest: str = "") -> None:
    with contents.connection.pipeline() as pipe:
        for message_id in ids:
            changes.hold(pipe, [changes.Held(message_id, digest, seconds)])
        pipe.execute()


def test_uncertain_is_copied_when_its_hold_is_over(contents: Contents) -> None:
    """A duplicate beats a loss: copies go out, in one job per backup, for what each backup wants."""
    contents.register(Destination(name="shadow", host="localhost", port=26, domains=("two.test",)))
    ids = [contents.staged("a@one.test", "b@two.test", to=("new", "shadow")) for _ in range(3)]
    held = contents.staged()
    _hold(contents, *ids)
    _hold(contents, held, seconds=3600)
    report = Sweeper(contents.connection, settings()).sweep()
    assert report.counts == {"uncertain": 6}
    for name in ("new", "shadow"):
        assert sorted(contents.pending_ids(name)) == sorted(ids)
        assert list(contents.queued(name).values()) == [ids]
        assert contents.state(ids[0], name) == CopyState()
    assert contents.connection.zcard(keys.UNCERTAIN) == 1


def test_the_spare_of_a_forked_message_names_that_in_the_log(
    contents: Contents, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own id is in no other line: who looks for the message finds what became of it. Damage names nothing."""
    message = contents.staged("b@test")
    spare, other = contents.staged("a@test", spare_of=message), contents.staged("a@test", spare_of="no id\n")
    _hold(contents, message, spare, other)
    log_lines.configure("info", "json")
    recovered = {found.id: found.spare_of for found in recovery.copy_due(contents.connection)}
    logger.remove()
    assert recovered == {message: "", spare: message, other: ""}
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    copied = {line["id"]: line.get("message") for line in lines if line["event"] == "uncertain copied"}
    assert copied == {message: None, spare: message, other: None}


def test_recipients_that_a_twin_has_served_get_no_second_copy(contents: Contents) -> None:
    """Only who is not covered is sent the uncertain one, addresses compared exactly."""
    first = contents.staged("a@test", "B@test", "c@test", body=BODY % b"same")
    second = contents.staged("a@test", "b@test", body=BODY % b"same")
    third = contents.staged("c@test", body=BODY % b"same")
    digest = equality_digest("sender@test", BODY % b"same")
    _hold(contents, first, digest=digest)
    with contents.connection.pipeline() as pipe:
        changes.release(pipe, [Released(second, ("new",), digest, ("a@test", "b@test"))])
        changes.release(pipe, [Released(third, ("new",), digest, ("c@test",))])
        pipe.execute()
    (recovered,) = recovery.copy_due(contents.connection)
    assert recovered.id == first
    assert recovered.shares["new"][:2] == ((1,), 2)
    assert contents.state(first).owed == (1,)
    ((job, _),) = contents.queued().items()
    assert [c.state.owed for c in contents.claim(job, first)] == [(1,)]


def test_an_uncertain_message_that_is_covered_is_forgotten(contents: Contents) -> None:
    """When a twin was accepted for everybody, nothing is left to send."""
    message_id = contents.staged("a@test")
    _hold(contents, message_id)
    contents.connection.hset(keys.COVERED, message_id, json.dumps(["a@test"]))
    report = Sweeper(contents.connection, settings()).sweep()
    assert [(f.id, f.action) for f in report.findings] == [(message_id, "covered by a twin")]
    assert not contents.has_body(message_id)
    assert contents.queued() == {}


def test_digests_are_noted_for_messages_held_without_one(contents: Contents) -> None:
    """What was made uncertain in haste is covered by a twin all the same; old notes go."""
    message_id = contents.staged()
    _hold(contents, message_id, seconds=3600)
    contents.connection.hset(keys.TWINS, "stale", "0000000000000000")
    Sweeper(contents.connection, settings()).sweep()
    digest = equality_digest("sender@test", BODY % message_id.encode())
    assert contents.connection.hgetall(keys.TWINS) == {digest.encode(): message_id.encode()}


def test_unreadable_uncertain_message_is_set_aside(contents: Contents) -> None:
    """A record of another version is never dropped."""
    message_id = contents.staged()
    contents.connection.set(keys.MESSAGE + message_id, b"\xff\xff")
    _hold(contents, message_id)
    Sweeper(contents.connection, settings()).sweep()
    assert contents.has_body(message_id)
    due = contents.connection.zscore(keys.UNCERTAIN, message_id)
    assert due is not None
    assert due > changes.now(contents.connection) + 3000


def test_abandon_holds_what_a_dead_process_had_staged(contents: Contents) -> None:
    """Only the messages of that owner, at once and not at their deadline."""
    dead, living = IdSource(), IdSource()
    theirs = [contents.staged(message_id=dead.next()) for _ in range(3)]
    ours = contents.staged(message_id=living.next())
    contents.connection.hset(keys.OWNERS, owner_of(theirs[0]), "a process")
    assert sorted(recovery.abandon(contents.connection, owner_of(theirs[0]), 3600)) == theirs
    assert contents.connection.zcard(keys.UNCERTAIN) == 3
    assert contents.connection.hlen(keys.TWINS) == 3
    assert [i for i, _ in contents.connection.zscan_iter(keys.STAGED)] == [ours.encode()]
    assert contents.connection.hlen(keys.OWNERS) == 0


# Age


def test_too_old_for_a_paused_destination_is_given_up(contents: Contents) -> None:
    """Nobody tries it, so nobody else would give it up: it fails with the destination's trouble as the reason."""
    old, young, fresh = contents.pending(age=6 * DAY), contents.pending(age=4 * DAY), contents.pending(age=5.5 * DAY)
    job = contents.defer(old)
    sweeper = Sweeper(contents.connection, settings(retry_give_up="5d"))
    sweeper.sweep()
    assert contents.failed_ids() == []
    contents.pause(reason="connection refused")
    assert sweeper.sweep().counts["given up"] == 2
    assert sorted(contents.failed_ids()) == sorted([old, fresh])
    assert contents.pending_ids() == [young]
    state = contents.state(old, failure=True)
    assert state.last_reply == "given up while the destination was paused: connection refused"
    assert state.attempts == 1
    assert state.job != job
    assert contents.queue().failed_job_registry.count == 2


def test_a_copy_in_flight_is_not_given_up(contents: Contents) -> None:
    """The probe that a paused destination gets may be the one that is taken."""
    message_id = contents.pending(age=6 * DAY)
    contents.claim(contents.enqueue(message_id), message_id)
    contents.pause()
    Sweeper(contents.connection, settings(retry_give_up="5d")).sweep()
    assert contents.pending_ids() == [message_id]
    assert contents.failed_ids() == []


def test_the_failed_list_ends_with_a_finding_each(contents: Contents) -> None:
    """Past failed.ttl a failed copy goes, and is told of."""
    old, young = contents.failed(ago=31 * DAY), contents.failed()
    report = Sweeper(contents.connection, settings(failed_ttl="30d")).sweep()
    assert [(f.finding, f.id, f.action) for f in report.findings] == [("failed copy expired", old, "dropped")]
    assert contents.failed_ids() == [young]


def test_bodies_that_nobody_lists(contents: Contents) -> None:
    """Reported after an hour, removed after a week; a key that is no id of ours is never touched."""
    record = contents.connection.get(keys.MESSAGE + contents.pending())
    clock = changes.now(contents.connection)
    ages = {"week": 8 * DAY, "hours": 7200.0, "now": 0.0}
    ids = {name: _id_made(clock - age) for name, age in ages.items()}
    for message_id in (*ids.values(), "not-one-of-our-ids"):
        contents.connection.set(keys.MESSAGE + message_id, record)
    report = _sweep_twice(contents)
    rows = {f.id: f.action for f in report.findings if f.finding == "body that nobody lists"}
    assert rows == {ids["week"]: "removed", ids["hours"]: "none"}
    assert not contents.has_body(ids["week"])
    assert contents.has_body(ids["hours"])
    assert contents.has_body(ids["now"])
    assert contents.has_body("not-one-of-our-ids")


def _id_made(at: float) -> str:
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    time = "".join(alphabet[(int(at * 1000) >> shift) & 31] for shift in range(40, -1, -5))
    assert abs(made_at(time + "abcd001") - at) < 0.01
    return time + "abcd001"


def test_an_old_body_that_is_listed_stays(contents: Contents) -> None:
    """Staged, uncertain, pending or failed: however old, it is wanted."""
    ids = [_id_made(changes.now(contents.connection) - 9 * DAY - n) for n in range(4)]
    contents.staged(message_id=ids[0])
    contents.staged(message_id=ids[1])
    _hold(contents, ids[1], seconds=3600)
    contents.pending(message_id=ids[2])
    contents.fail(contents.pending(message_id=ids[3]))
    _sweep_twice(contents)
    with contents.connection.pipeline() as pipe:
        changes.purge(pipe, ids)  # listed between the look and the removal
        assert pipe.execute() == [0]
    assert all(contents.has_body(i) for i in ids)


# Merging


def test_a_long_queue_of_small_jobs_is_merged(contents: Contents) -> None:
    """The same copies in the same order, in hundreds; owned, failed and requeued ones too."""
    ids = [contents.pending() for _ in range(1203)]
    for message_id in ids[:3]:
        contents.fail(message_id)
        contents.queue().failed_job_registry.requeue(contents.state(message_id, failure=True).job)
    owned = contents.enqueue(ids[3])
    with contents.connection.pipeline() as pipe:
        changes.defer(pipe, "new", {ids[3]: CopyState(job=owned).tried(1.0, "451 later")})
        pipe.execute()
    for message_id in ids[4:]:
        contents.enqueue(message_id)
    report = Sweeper(contents.connection, settings()).sweep()
    assert report.counts == {"many small jobs": 1}
    jobs = contents.queued()
    assert [i for held in jobs.values() for i in held] == ids
    assert max(map(len, jobs.values())) == 100
    assert len(jobs) < 20
    claims = [c.id for job, held in jobs.items() for c in contents.claim(job, *held)]
    assert claims == ids
    assert contents.connection.llen(contents.queue().intermediate_queue_key) == 0
    hashes = {key.decode().removeprefix("rq:job:") for key in contents.connection.scan_iter("rq:job:*")}
    assert hashes == set(jobs)


def test_full_jobs_are_not_touched_by_a_merge(contents: Contents) -> None:
    """A job that is full keeps its id; only the queue's order of the rest counts."""
    full = contents.enqueue(*(contents.pending() for _ in range(80)))
    small = [contents.enqueue(contents.pending()) for _ in range(3)]
    assert merge_jobs.merge(contents.connection, "new", 4) == 2
    jobs = contents.queued()
    assert full in jobs
    assert len(jobs) == 2
    assert not set(small) & set(jobs)


def test_a_merge_that_is_cut_off_loses_nothing(contents: Contents) -> None:
    """Taken jobs are in the intermediate list: the queue gets them back."""
    jobs = [contents.enqueue(contents.pending()) for _ in range(5)]
    queue = contents.queue()
    contents.connection.eval(merge_jobs._TAKE, 2, queue.key, queue.intermediate_queue_key, "5")
    assert queue.get_job_ids() == []
    sweeper = Sweeper(contents.connection, settings())
    sweeper.sweep()
    sweeper.sweep()
    assert sorted(queue.get_job_ids()) == sorted(jobs)


# The loop


def test_stray_failed_jobs_go(contents: Contents) -> None:
    """A failed job whose copy has been dropped is deleted by the next sweep, since there are more jobs than copies."""
    message_id = contents.failed()
    with contents.connection.pipeline() as pipe:
        changes.drop(pipe, "new", [message_id])
        pipe.execute()
    sweeper = Sweeper(contents.connection, settings())
    sweeper.sweep(repair=False, thorough=False)
    assert sweeper.sweep(thorough=False).counts == {"stray failed job": 1}
    assert contents.queue().failed_job_registry.count == 0


def test_one_of_several_hosts_leads(contents: Contents) -> None:
    """The lock is renewed by who has it, also after a restart, and is refused to others until it is given back."""
    us, restarted, them = (
        reconciler._Lock(contents.connection, name, threading.Event()) for name in ("us", "us", "them")
    )
    us.take()
    restarted.take()
    with pytest.raises(reconciler._Interrupted):
        them.take()
    them.give_back()
    with pytest.raises(reconciler._Interrupted):
        them.renew()
    us.give_back()
    them.take()
    with pytest.raises(reconciler._Interrupted):
        us.take()


def test_it_sweeps_until_it_is_stopped(redis_server: RedisServer, contents: Contents) -> None:
    """It waits while another host leads, then repairs, survives a lost connection and gives its lock back."""
    message_id = contents.pending()
    contents.connection.set(keys.RECONCILER, "another host", px=100)
    stop = threading.Event()
    thread = threading.Thread(
        target=reconciler.keep_reconciling, args=(redis_server.client, settings(), "us", stop), kwargs={"every": 0.02}
    )
    thread.start()
    try:
        wait_until(contents.queued)
        assert list(contents.queued().values()) == [[message_id]]
        assert contents.connection.get(keys.RECONCILER) == b"us"
        contents.connection.client_kill_filter(_type="normal", skipme=True)
        contents.connection.delete(contents.queue().key)
        wait_until(contents.queued)
    finally:
        stop.set()
        thread.join()
    assert contents.connection.get(keys.RECONCILER) is None


def test_live_reads_every_page_of_a_long_queue(contents: Contents) -> None:
    """A queue longer than a page is seen whole."""
    ids = [f"1d{n:014}" for n in range(2300)]
    for message_id in ids:
        contents.enqueue(message_id)
    found = live_jobs.read(contents.connection, "new")
    assert (found.queued_jobs, found.queued_ids) == (2300, 2300)
    assert all(found.covers(i, "") for i in ids)


def test_message_of_several_chunks_is_read_whole(contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large message is read in pieces, so that Redis is not held up."""
    monkeypatch.setattr("relay.ledger.queries._CHUNK", 64)
    body = BODY % b"long" + b"0123456789" * 100 + b"\r\n"
    message_id = contents.staged(body=body)
    message = queries.message(contents.connection, message_id)
    assert isinstance(message, Message)
    assert message.body == body


# What `queue verify` says of it


def test_only_a_repair_is_a_disagreement(contents: Contents, tmp_path: Path) -> None:
    """A lost job is one, looked for or repaired; the ordinary end of an old failed copy is none."""
    contents.failed(ago=40 * DAY)
    options = settings(state_dir=str(tmp_path))
    report = reconciler.verify(contents.connection, options, pause=0.0)
    assert report.counts == {"failed copy expired": 1}
    assert not report.disagreed
    contents.pending()
    assert reconciler.verify(contents.connection, options, pause=0.0, repair=False).disagreed
    assert reconciler.verify(contents.connection, options, pause=0.0).disagreed
    assert not reconciler.verify(contents.connection, options, pause=0.0).disagreed
