"""The backlog: what waits and why, and having it tried now or elsewhere."""

from __future__ import annotations

import pytest
import redis

from relay.ledger import changes, keys, overview
from relay.ledger.copy_state import CopyState
from relay.ledger.queries import UnknownDestination
from relay.mail.destination import Destination
from support import listed_copies
from support.ledger_contents import DAY, Contents, settings
from workers.delivery.copy import begun
from workers.queues import backlog
from workers.queues.backlog import Moved
from workers.upkeep.sweep import Sweeper


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client)


def _register(contents: Contents, name: str, *domains: str) -> None:
    contents.register(Destination(name=name, host="localhost", port=26, domains=domains))


# listing


def test_what_waits_is_listed_by_age(contents: Contents) -> None:
    """The oldest copy comes first, whatever the order of the ids."""
    ids = [contents.pending(age=age) for age in (10, 300, 20)]
    assert [row.id for row in listed_copies.waiting(contents.connection)] == [ids[1], ids[2], ids[0]]


def test_a_row_says_who_is_owed_what_was_said_and_when_it_is_tried(contents: Contents) -> None:
    """A deferred copy shows the recipients still owed, the last reply and its next attempt."""
    fresh, deferred = contents.pending(age=200), contents.pending("a@test", "b@test", age=100)
    contents.defer(deferred, seconds=300, owed=(1,))
    first, second = listed_copies.waiting(contents.connection)
    assert (first.id, first.attempts, first.next_attempt_at, first.last_reply) == (fresh, 0, None, "")
    assert (second.id, second.sender, second.recipients, second.attempts) == (deferred, "sender@test", ("b@test",), 1)
    assert second.last_reply == "451 4.7.1 later"
    assert second.next_attempt_at is not None
    assert 290 < second.next_attempt_at - changes.now(contents.connection) < 310
    assert second.size > 0


def test_a_scheduled_time_that_has_come_counts_as_now(contents: Contents) -> None:
    """A copy whose time has come has no next attempt: it is due."""
    contents.defer(contents.pending(), seconds=-5)
    (row,) = listed_copies.waiting(contents.connection)
    assert row.next_attempt_at is None


def test_paused_destination_says_why(contents: Contents) -> None:
    """Copies that nobody tries show the destination's trouble and its next probe, their own words first."""
    fresh, deferred = contents.pending(age=200), contents.pending(age=100)
    contents.defer(deferred)
    contents.pause(reason="connection refused", probe_in=30)
    first, second = listed_copies.waiting(contents.connection, "new")
    assert (first.id, first.last_reply) == (fresh, "connection refused")
    assert first.next_attempt_at is not None
    assert 20 < first.next_attempt_at - changes.now(contents.connection) < 40
    assert second.last_reply == "451 4.7.1 later"


def test_only_the_destination_that_is_asked_for(contents: Contents) -> None:
    """--destination narrows the list; one that nobody knows is an error."""
    _register(contents, "other")
    contents.pending()
    there = contents.pending(to=("other",))
    assert [row.id for row in listed_copies.waiting(contents.connection, "other")] == [there]
    with pytest.raises(UnknownDestination, match=r"nowhere.*new, other"):
        list(listed_copies.waiting(contents.connection, "nowhere"))


def test_a_copy_without_a_body_is_listed_all_the_same(contents: Contents) -> None:
    """What is wrong is seen, not hidden."""
    message_id = contents.pending()
    contents.connection.delete(keys.MESSAGE + message_id)
    (row,) = listed_copies.waiting(contents.connection)
    assert (row.id, row.recipients, row.size) == (message_id, (), 0)


def test_listing_is_complete_while_copies_leave(contents: Contents) -> None:
    """Copies that are delivered while the list is read do not make it skip others."""
    ids = [f"1d{n:014}" for n in range(1200)]
    contents.connection.zadd(keys.PENDING + "new", {i: float(n) for n, i in enumerate(ids)})
    rows = listed_copies.waiting(contents.connection)
    seen = [next(rows).id for _ in range(10)]
    contents.connection.zrem(keys.PENDING + "new", *ids[:400])
    seen += [row.id for row in rows]
    assert seen[-700:] == ids[500:]


def test_a_long_listing_takes_few_commands(contents: Contents) -> None:
    """A page of envelopes is one command: 20,000 copies are listed in two seconds."""
    ids = [contents.staged() for _ in range(1200)]
    with contents.connection.pipeline() as pipe:
        changes.release(pipe, [changes.Released(i, ("new",)) for i in ids])
        pipe.execute()

    def commands() -> int:
        return sum(
            stat["calls"] for name, stat in contents.connection.info("commandstats").items() if "getrange" not in name
        )

    before = commands()
    assert len(list(listed_copies.waiting(contents.connection))) == 1200
    assert commands() - before < 40


# flush


def test_flush_makes_everything_due(contents: Contents) -> None:
    """All scheduled jobs are due, and the courier is told; other destinations are left alone."""
    _register(contents, "other")
    ids = [contents.pending() for _ in range(3)]
    for message_id in ids:
        contents.defer(message_id, seconds=3600)
    contents.defer(contents.pending(to=("other",)), to="other", seconds=3600)
    assert backlog.flush(contents.connection, "new") == 3
    assert len(contents.queue().scheduled_job_registry.get_jobs_to_schedule()) == 3
    assert contents.queue("other").scheduled_job_registry.get_jobs_to_schedule() == []
    assert contents.connection.hget(keys.HEALTH + "new", "flush") == b"1"
    assert contents.connection.hget(keys.HEALTH + "other", "flush") is None
    assert all(row.next_attempt_at is None for row in listed_copies.waiting(contents.connection, "new"))


def test_flush_of_many_pages(contents: Contents) -> None:
    """A schedule longer than a page is flushed whole, and no job is made that was not there."""
    registry = contents.queue().scheduled_job_registry
    later = changes.now(contents.connection) + 3600
    contents.connection.zadd(registry.key, {f"job-{n}": later + n for n in range(2500)})
    backlog.flush(contents.connection)
    assert contents.connection.zcount(registry.key, f"({later - 1800}", "+inf") == 0
    assert contents.connection.zcard(registry.key) == 2500


# move


def test_move_takes_pending_and_failed_copies_with_their_jobs(contents: Contents) -> None:
    """All that waited or failed for the old destination does so for the new one, with jobs of its own."""
    _register(contents, "target")
    fresh, deferred, lost = contents.pending(), contents.pending("a@test", "b@test"), contents.failed("c@test")
    contents.enqueue(fresh)
    contents.defer(deferred, owed=(1,))
    assert backlog.move(contents.connection, "new", "target") == Moved(pending=2, failed=1, covered=0, left=0)
    assert contents.pending_ids() == contents.failed_ids() == []
    assert sorted(contents.pending_ids("target")) == sorted([fresh, deferred])
    claims = {
        c.id: c for job, held in contents.queued("target").items() for c in contents.claim(job, *held, to="target")
    }
    assert set(claims) == {fresh, deferred}
    assert claims[deferred].state.owed == (1,)
    assert (claims[deferred].state.attempts, claims[deferred].state.tries) == (1, 0)
    (row,) = listed_copies.failures(contents.connection, "target")
    assert (row.id, row.recipients, row.reply) == (lost, ("c@test",), "550 5.1.1 unknown")
    assert contents.queued() == {}
    assert contents.queue().scheduled_job_registry.count == contents.queue().failed_job_registry.count == 0


def test_what_is_moved_stays_as_old_as_it_is(contents: Contents) -> None:
    """It is listed by when it was accepted, before what came later; but its clock for giving up begins anew."""
    _register(contents, "target")
    later = contents.pending(to=("target",), age=3600.0)
    old, deferred = contents.pending(age=9 * DAY), contents.pending(age=8 * DAY)
    contents.defer(deferred, owed=(0,))
    before = changes.now(contents.connection)
    backlog.move(contents.connection, "new", "target")
    assert [row.id for row in listed_copies.waiting(contents.connection, "target")] == [old, deferred, later]
    (summary,) = [row for row in overview.summary(contents.connection) if row.destination == "target"]
    assert summary.oldest_age_s == pytest.approx(9 * DAY, abs=60)
    for claim in (c for job, ids in contents.queued("target").items() for c in contents.claim(job, *ids, to="target")):
        state = begun(claim)
        assert state.tries == 0
        assert state.since == pytest.approx(before, abs=60), "or it would be given up at its first 4xx"
        assert begun(claim._replace(state=state)) == state


def test_what_is_moved_to_a_paused_destination_is_not_given_up_at_once(contents: Contents) -> None:
    """The reconciler, too, goes by the clock there, and gives up what has none of its own."""
    _register(contents, "target")
    moved = contents.pending(age=9 * DAY)
    backlog.move(contents.connection, "new", "target")
    aged = contents.pending(to=("target",), age=9 * DAY)
    contents.connection.hset(keys.HEALTH + "target", mapping={"state": "paused", "reason": "refused"})
    report = Sweeper(contents.connection, settings(retry_give_up="5d")).sweep()
    assert report.counts["given up"] == 1
    assert contents.pending_ids("target") == [moved]
    assert contents.failed_ids("target") == [aged]


def test_moved_failure_can_be_requeued_there(contents: Contents) -> None:
    """The failed job at the new destination owns the copy."""
    _register(contents, "target")
    lost = contents.failed()
    backlog.move(contents.connection, "new", "target")
    queue = contents.queue("target")
    (job,) = queue.failed_job_registry.get_job_ids()
    queue.failed_job_registry.requeue(job)
    assert [c.id for c in contents.claim(job, lost, to="target")] == [lost]


def test_move_keeps_to_the_recipients_of_the_old_destination(contents: Contents) -> None:
    """Moving a copy for one domain does not send it to everybody."""
    _register(contents, "shadow", "two.test")
    _register(contents, "target")
    message_id = contents.pending("a@one.test", "b@two.test", to=("shadow",))
    backlog.move(contents.connection, "shadow", "target")
    (row,) = listed_copies.waiting(contents.connection, "target")
    assert (row.id, row.recipients) == (message_id, ("b@two.test",))


def test_move_sends_nobody_a_second_copy(contents: Contents) -> None:
    """Who gets the new destination's own copy is not sent the moved one, delivered already or not."""
    _register(contents, "target", "one.test")
    both = contents.pending("a@one.test", to=("new", "target"))
    part = contents.pending("a@one.test", "b@two.test", to=("new", "target"))
    with contents.connection.pipeline() as pipe:
        changes.settle(pipe, "target", [both, part])
        pipe.execute()
    assert backlog.move(contents.connection, "new", "target") == Moved(pending=1, failed=0, covered=1, left=0)
    (row,) = listed_copies.waiting(contents.connection, "target")
    assert (row.id, row.recipients) == (part, ("b@two.test",))
    assert not contents.has_body(both)


def test_move_leaves_what_is_being_delivered(contents: Contents) -> None:
    """A copy in flight stays where it is, with its state."""
    _register(contents, "target")
    message_id = contents.pending()
    job = contents.enqueue(message_id)
    contents.claim(job, message_id)
    assert backlog.move(contents.connection, "new", "target") == Moved(0, 0, 0, left=1)
    assert contents.pending_ids() == [message_id]
    assert contents.pending_ids("target") == []
    assert list(contents.queued()) == [job]


def test_move_leaves_what_waits_there_already(contents: Contents) -> None:
    """While the new destination's own copy waits, the other recipients' stays; nothing is mixed up."""
    _register(contents, "target", "one.test")
    message_id = contents.pending("a@one.test", "b@two.test", to=("new", "target"))
    assert backlog.move(contents.connection, "new", "target") == Moved(0, 0, 0, left=1)
    assert contents.state(message_id, "target") == CopyState()


def test_move_to_where_nobody_is_known_or_to_itself(contents: Contents) -> None:
    """A typo moves nothing."""
    contents.pending()
    with pytest.raises(UnknownDestination):
        backlog.move(contents.connection, "new", "nowhere")
    with pytest.raises(ValueError, match="itself"):
        backlog.move(contents.connection, "new", "new")
    assert len(contents.pending_ids()) == 1


# forget


def traces(contents: Contents, name: str) -> list[str]:
    """Return the keys and fields in Redis that have a name in them."""
    found = []
    for key in contents.connection.scan_iter():
        fields = contents.connection.hkeys(key) if contents.connection.type(key) == b"hash" else []
        members = contents.connection.smembers(key) if contents.connection.type(key) == b"set" else []
        found += [text for text in (key, *fields, *members) if name.encode() in text]
    return [text.decode() for text in found]


def test_a_destination_without_copies_is_forgotten_for_good(contents: Contents) -> None:
    """Nothing with its name stays in Redis, also after its copies went through every list."""
    _register(contents, "formerly")
    delivered, deferred, failing = (contents.pending(to=("formerly",)) for _ in range(3))
    contents.claim(contents.enqueue(delivered, to="formerly"), delivered, to="formerly")
    with contents.connection.pipeline() as pipe:
        changes.settle(pipe, "formerly", [delivered])
        pipe.execute()
    contents.defer(deferred, to="formerly")
    contents.fail(failing, to="formerly")
    contents.pause("formerly")
    listed_copies.drop_waiting(contents.connection, [deferred], "formerly")
    listed_copies.drop_failed(contents.connection, [failing])
    backlog.forget(contents.connection, "formerly")
    assert traces(contents, "formerly") == []
    assert [row.destination for row in overview.summary(contents.connection)] == ["new"]
    with pytest.raises(UnknownDestination):
        backlog.forget(contents.connection, "formerly")


@pytest.mark.parametrize("state", ["waiting", "failed", "being delivered", "on the way", "uncertain"])
def test_a_destination_that_something_names_is_kept(contents: Contents, state: str) -> None:
    """The refusal says what it is, and nothing has changed."""
    _register(contents, "formerly")
    if state in {"on the way", "uncertain"}:
        message_id = contents.staged(to=("formerly", "new"))
        if state == "uncertain":
            with contents.connection.pipeline() as pipe:
                changes.hold(pipe, [changes.Held(message_id, "", 3600.0)])
                pipe.execute()
    else:
        message_id = contents.pending(to=("formerly",))
        if state == "failed":
            contents.fail(message_id, to="formerly")
        elif state == "being delivered":
            contents.claim(contents.enqueue(message_id, to="formerly"), message_id, to="formerly")
    before = traces(contents, "formerly")
    with pytest.raises(backlog.StillNeeded, match=state):
        backlog.forget(contents.connection, "formerly")
    assert traces(contents, "formerly") == before
