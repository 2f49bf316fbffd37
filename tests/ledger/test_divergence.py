"""Groups of divergence: what is counted, once, and what becomes of it; bounded whatever a server says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import redis

from relay.ledger import changes, copy_state, divergence, divergence_groups, divergence_upkeep, keys, queries
from relay.ledger.copy_state import CopyState
from relay.ledger.divergence import DOT, MAIL, RCPT, Coverage
from relay.ledger.divergence_groups import HOUR, Acknowledgement, Group
from relay.ledger.divergence_recount import Mended, recount
from relay.ledger.divergence_upkeep import Swept
from relay.mail import encryption
from support import listed_copies
from support.diverged_copies import OURS, Backup, deferred, given_up, refused
from support.ledger_contents import Contents
from workers.queues import backlog, failed

DAY = 24 * HOUR


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client, "new", "other")


@pytest.fixture
def new(contents: Contents) -> Backup:
    return Backup(contents)


def _swept(contents: Contents, passed: float | None = None) -> list[Swept]:
    """Sweep after a month; ``passed``: so many seconds have passed since anything, whatever the clock says."""
    now = changes.now(contents.connection)
    elapsed = (lambda at: now - at) if passed is None else (lambda _: passed)
    return divergence_upkeep.sweep(contents.connection, "new", now - 30 * DAY, elapsed)


def _numbers(group: Group) -> tuple[int, ...]:
    return (group.seen, group.open, group.resolved, group.noise, group.dropped, group.moved)


# What is counted ----------------------------------------------------------------------------------------------------


def test_three_recipients_with_three_replies_are_three_groups(contents: Contents, new: Backup) -> None:
    """Each has one recipient, one message and one example; what the worker writes twice counts once."""
    message_id = contents.pending("ann@a.test", "bob@b.test", "cid@a.test")
    answers = {0: refused(), 1: refused("552 5.2.2 mailbox full"), 2: deferred("450 4.7.1 greylisted")}
    new.attempt(message_id, answers, times=3)
    groups = new.groups()
    assert set(groups) == {"no such user", "mailbox full", "greylisted"}
    assert {_numbers(group) for group in groups.values()} == {(1, 1, 0, 0, 0, 0)}
    assert {group.messages for group in groups.values()} == {1}
    assert [groups[text].reason for text in ("no such user", "mailbox full", "greylisted")] == [
        "no such mailbox", "mailbox full", "greylisting",
    ]  # fmt: skip
    for text, address in (("no such user", "ann@a.test"), ("mailbox full", "bob@b.test"), ("greylisted", "cid@a.test")):
        key = groups[text].key
        assert [name for name, _ in divergence_groups.examples(contents.connection, "new", key)] == [message_id]
        assert divergence_groups.whom(contents.connection, "new", key, 20) == [(address, 1)]
        assert dict(groups[text].domains) == {address.partition("@")[2]: 1}


def test_a_retry_with_the_same_reply_does_not_count_again(contents: Contents, new: Backup) -> None:
    """The unit is a recipient of a copy, however often it is tried."""
    message_id = contents.pending("ann@a.test", "bob@a.test")
    for _ in range(4):
        new.attempt(message_id, {0: deferred(), 1: deferred()})
    assert _numbers(new.group()) == (2, 2, 0, 0, 0, 0)
    assert new.group().messages == 1


def test_another_reason_takes_the_place_of_the_one_before(contents: Contents, new: Backup) -> None:
    """Greylisted, then refused: open in the second group alone. And back again is open, but not counted twice."""
    message_id = contents.pending("ann@a.test")
    for answer in (deferred("450 first"), deferred("450 second"), deferred("450 first")):
        new.attempt(message_id, {0: answer})
    assert {text: _numbers(group) for text, group in new.groups().items()} == {
        "first": (1, 1, 0, 0, 0, 0), "second": (1, 0, 0, 0, 0, 0),
    }  # fmt: skip
    new.attempt(message_id, {0: refused("550 third")})
    assert {text: group.open for text, group in new.groups().items()} == {"first": 0, "second": 0, "third": 1}


def test_the_same_reply_at_another_stage_is_another_group(contents: Contents, new: Backup) -> None:
    """At MAIL it is the server's opinion of the sender, at RCPT of the recipient, at the dot of the message."""
    for stage in (MAIL, RCPT, DOT):
        new.attempt(contents.pending("ann@a.test"), {0: refused(stage=stage)})
    found = divergence_groups.groups(contents.connection, "new")
    assert sorted(group.stage for group in found) == sorted((MAIL, RCPT, DOT))


def test_given_up_is_its_own_kind(contents: Contents, new: Backup) -> None:
    """What was only put off moves to the group of what was given up."""
    message_id = contents.pending("ann@a.test")
    new.attempt(message_id, {0: deferred()})
    new.attempt(message_id, {0: given_up()})
    found = {group.kind: group.open for group in divergence_groups.groups(contents.connection, "new")}
    assert found == {"deferred": 0, "given-up": 1}


def test_an_outcome_of_a_copy_that_is_gone_counts_nothing(contents: Contents) -> None:
    """What a worker says of a copy that is settled meanwhile, or that another has tried since, is no divergence."""
    connection = contents.connection
    gone, tried = contents.pending("ann@a.test"), contents.pending("ann@a.test")
    envelopes = queries.envelopes(connection, [gone, tried])
    with connection.pipeline() as pipe:
        changes.settle(pipe, "new", [gone])
        changes.defer(pipe, "new", {tried: CopyState("job").tried(1.0, "450 later")})
        pipe.execute()
    for envelope in envelopes:
        assert envelope is not None
        _, noted = divergence.count(CopyState(), envelope, "new", {0: refused()}, OURS)
        divergence.note(connection, "new", envelope, 0, noted)
    assert divergence_groups.groups(connection, "new") == []


def test_sealed_mail_has_sealed_recipients(contents: Contents, new: Backup, tmp_path: Path) -> None:
    """No address and no reply as it came is in the groups; who it was is told where the key is."""
    key_file = tmp_path / "keys"
    encryption.add_key(key_file)
    encryption.use(key_file)
    try:
        for _ in range(2):
            new.attempt(contents.pending("ann@a.test"), {0: refused("550 5.1.1 <ann@a.test> unknown, ref 4711")})
        group = new.group()
        assert (group.text, group.reply) == ("<address> unknown, ref #", "")
        assert divergence_groups.whom(contents.connection, "new", group.key, 20) == [("ann@a.test", 2)]
        for key in contents.connection.keys("smtpdup:*:new:*"):
            assert b"ann" not in contents.connection.dump(key), key
    finally:
        encryption.use(None)
    ((pseudonym, times),) = divergence_groups.whom(contents.connection, "new", group.key, 20)
    assert (len(pseudonym), times) == (16, 2)


# What becomes of it -------------------------------------------------------------------------------------------------


def test_delivered_soon_is_noise_and_late_is_resolved(contents: Contents, new: Backup) -> None:
    """Greylisting ends by itself within minutes; what took longer was something else."""
    soon, late = contents.pending("ann@a.test"), contents.pending("bob@a.test")
    for message_id in (soon, late):
        new.attempt(message_id, {0: deferred()})
    state = CopyState.from_wire(contents.connection.hget(keys.OWN + "new", late))
    long_ago = replace(state, history=(copy_state.Attempt(state.history[0].at - 901, "450 later"),))
    contents.connection.hset(keys.OWN + "new", late, long_ago.to_wire())
    for message_id in (soon, late):
        new.attempt(message_id, {})
    assert _numbers(new.group()) == (2, 0, 1, 1, 0, 0)


def test_some_delivered_some_not(contents: Contents, new: Backup) -> None:
    """Of a copy that goes on for one recipient, the others have their end."""
    message_id = contents.pending("ann@a.test", "bob@a.test", "cid@a.test")
    new.attempt(message_id, {0: deferred(), 1: deferred(), 2: refused()})
    new.attempt(message_id, {1: deferred()})
    groups = {group.kind: _numbers(group) for group in new.groups().values()}
    assert groups == {"deferred": (2, 1, 0, 1, 0, 0), "refused": (1, 1, 0, 0, 0, 0)}


@pytest.mark.parametrize("again", [False, True])
def test_a_failed_copy_that_is_retried(contents: Contents, new: Backup, again: bool) -> None:
    """It stays open until it is delivered, and a second refusal is not counted again."""
    message_id = contents.pending("ann@a.test")
    new.attempt(message_id, {0: refused()})
    new.retry(message_id)
    assert new.group().open == 1
    new.attempt(message_id, {0: refused()} if again else {})
    assert _numbers(new.group()) == ((1, 1, 0, 0, 0, 0) if again else (1, 0, 1, 0, 0, 0))


def test_parts_of_a_copy_that_fail_one_after_the_other(contents: Contents, new: Backup) -> None:
    """Two failures of one copy are one state in the failed list; a retry of both ends both."""
    message_id = contents.pending("ann@a.test", "bob@a.test")
    new.attempt(message_id, {0: refused(), 1: deferred()})
    new.attempt(message_id, {1: refused()})
    assert {group.kind: group.open for group in new.groups().values()} == {"deferred": 0, "refused": 2}
    new.retry(message_id)
    new.attempt(message_id, {})
    assert {group.kind: (group.open, group.resolved) for group in new.groups().values()} == {
        "deferred": (0, 0), "refused": (0, 2),
    }  # fmt: skip


@pytest.mark.parametrize("is_failed", [False, True])
def test_dropped_and_moved(contents: Contents, new: Backup, is_failed: bool) -> None:
    """An operator's drop ends it; a move ends it here and opens nothing there."""
    dropped, moved = contents.pending("ann@a.test"), contents.pending("bob@a.test")
    for message_id in (dropped, moved):
        new.attempt(message_id, {0: refused() if is_failed else deferred()})
    if is_failed:
        listed_copies.drop_failed(contents.connection, [dropped], "new")
    else:
        listed_copies.drop_waiting(contents.connection, [dropped], "new")
    backlog.move(contents.connection, "new", "other")
    assert _numbers(new.group()) == (2, 0, 0, 0, 1, 1)
    assert divergence_groups.groups(contents.connection, "other") == []
    states = contents.connection.hgetall((keys.FAILURE if is_failed else keys.OWN) + "other")
    assert CopyState.from_wire(states[moved.encode()]).open == ()


def test_age_ends_it_too(contents: Contents, new: Backup) -> None:
    """What leaves the failed list by failed.ttl is dropped."""
    message_id = contents.pending("ann@a.test")
    new.attempt(message_id, {0: refused()})
    now = changes.now(contents.connection)
    contents.connection.zadd(keys.FAILED + "new", {message_id: now - 31 * DAY})
    assert failed.expire(contents.connection, "new", 30 * DAY, now - 30 * DAY) == [message_id]
    assert _numbers(new.group()) == (1, 0, 0, 0, 1, 0)


def test_a_forgotten_destination_leaves_no_group_behind(contents: Contents, new: Backup) -> None:
    """`queue forget` forgets what it refused."""
    message_id = contents.pending("ann@a.test")
    new.attempt(message_id, {0: refused()})
    divergence.outage_begins(contents.connection, "new", 1.0, "away")
    divergence.cover(contents.connection, "new", {"a.test": [1, 0, 0]})
    listed_copies.drop_failed(contents.connection, [message_id], "new")
    backlog.forget(contents.connection, "new")
    kinds = (keys.DIVERGENCE, keys.DIVERGED, keys.EXAMPLES, keys.WHOM, keys.SEALED, keys.DOMAINS, keys.OUTAGES)
    assert [key for kind in kinds for key in contents.connection.keys(kind + "*")] == []


# Bounds -------------------------------------------------------------------------------------------------------------


def test_replies_that_never_repeat_fill_nothing(contents: Contents, new: Backup) -> None:
    """What comes when there are groups enough is counted in one more, and no older group is pushed out."""
    words = [f"{a}{b}" for a in "klmnopqrstuvw" for b in "klmnopqrst"]
    for word in words[:10]:
        new.attempt(contents.pending("ann@a.test"), {0: refused(f"550 {word}")}, most=10)
    first = set(new.groups())
    ids = [contents.pending("ann@a.test") for _ in words[10:]]
    for word, message_id in zip(words[10:], ids, strict=True):
        new.attempt(message_id, {0: refused(f"550 {word}")}, most=10)
    groups = new.groups()
    (rest,) = set(groups) - first
    assert groups[rest].is_rest
    assert _numbers(groups[rest]) == (len(ids), len(ids), 0, 0, 0, 0)
    assert all(_numbers(groups[text]) == (1, 1, 0, 0, 0, 0) for text in first)
    assert len(divergence_groups.examples(contents.connection, "new", groups[rest].key)) == 20
    listed_copies.drop_failed(contents.connection, ids[:5], "new")
    assert _numbers(new.groups()[rest])[:2] == (len(ids), len(ids) - 5)
    assert recount(contents.connection, "new", OURS, most=10) == []


def test_a_copy_s_state_is_bounded(contents: Contents, new: Backup) -> None:
    """A server with another excuse at each of a hundred tries fills no state."""
    message_id = contents.pending("ann@a.test")
    for n in range(100):
        new.attempt(message_id, {0: deferred("450 " + "abcdefghkl"[n % 10] + "mnopqrstuv"[n // 10])})
    assert len(contents.connection.hget(keys.OWN + "new", message_id) or b"") < 4000
    assert sum(group.open for group in new.groups().values()) == 1


def test_recipients_and_examples_are_bounded(contents: Contents, new: Backup) -> None:
    """Two hundred recipients are named, the others counted; of the messages the first ten and the last ten stay."""
    ids = []
    for n in range(25):
        ids.append(contents.pending(*(f"user{n}-{i}@d{n * 10 + i}.test" for i in range(10))))
        new.attempt(ids[-1], dict.fromkeys(range(10), refused()))
    group = new.group()
    assert (group.seen, group.more, len(group.domains), group.more_domains) == (250, 50, 50, 200)
    found = [name for name, _ in divergence_groups.examples(contents.connection, "new", group.key)]
    assert found == ids[:10] + ids[-10:]
    assert len(divergence_groups.whom(contents.connection, "new", group.key, 1000)) == 200


def test_domains_are_bounded(contents: Contents) -> None:
    """Past so many, a domain counts as "other"; what is damaged begins anew."""
    contents.connection.hset(keys.DOMAINS + "new", "bad.test", "what")
    for n in range(6):
        divergence.cover(contents.connection, "new", {f"d{n}.test": [2, 1, 0], "bad.test": [1, 0, 1]}, most=4)
    found = divergence_groups.domains(contents.connection, "new")
    assert {domain: counts[:3] for domain, counts in found.items()} == {
        "bad.test": (6, 0, 6), "d0.test": (2, 1, 0), "d1.test": (2, 1, 0), "d2.test": (2, 1, 0), "other": (6, 3, 0),
    }  # fmt: skip


def test_coverage_in_memory_is_bounded_and_can_be_given_back() -> None:
    """What could not be written is written the next time."""
    coverage = Coverage(most=2)
    for domain in ("a.test", "b.test", "c.test", "a.test"):
        coverage.add(domain, taken=1)
    counts = coverage.take()
    assert counts == {"a.test": [2, 0, 0], "b.test": [1, 0, 0], "other": [1, 0, 0]}
    coverage.add("a.test", refused=1)
    coverage.give_back(counts)
    assert coverage.take()["a.test"] == [2, 0, 1]


# Outages ------------------------------------------------------------------------------------------------------------


def test_outages_have_a_begin_an_end_and_a_reason(contents: Contents) -> None:
    """One that goes on has no end; a second begin, by another worker, is the same outage; the list is bounded."""
    connection = contents.connection
    divergence.outage_ends(connection, "new", 1.0)
    divergence.outage_begins(connection, "new", 10.0, "refused")
    divergence.outage_begins(connection, "new", 12.0, "timed out")
    assert divergence_groups.outages(connection, "new") == [divergence_groups.Outage(10.0, 0.0, "timed out")]
    divergence.outage_ends(connection, "new", 20.0)
    divergence.outage_ends(connection, "new", 25.0)
    assert divergence_groups.outages(connection, "new") == [divergence_groups.Outage(10.0, 20.0, "timed out")]
    assert divergence_groups.outages(connection, "new", since=21.0) == []
    for n in range(300):
        divergence.outage_begins(connection, "new", 30.0 + n, "again")
        divergence.outage_ends(connection, "new", 30.5 + n)
    assert len(divergence_groups.outages(connection, "new")) == 200
    connection.lpush(keys.OUTAGES + "new", "no outage")
    divergence.outage_begins(connection, "new", 400.0, "away")
    assert divergence_groups.outages(connection, "new")[0].begin == 400.0


# Acknowledged -------------------------------------------------------------------------------------------------------


def _acknowledged(contents: Contents, new: Backup, seconds: float = DAY) -> Group:
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    divergence_upkeep.acknowledge(contents.connection, new.group(), "alice", "known", seconds)
    return new.group()


def test_an_acknowledged_group_does_not_count(contents: Contents, new: Backup) -> None:
    """Until its time is over, or somebody takes it back."""
    group = _acknowledged(contents, new)
    now = changes.now(contents.connection)
    assert group.ack is not None
    assert (group.ack.by, group.ack.note) == ("alice", "known")
    assert not group.counts(now)
    assert group.counts(now + DAY + 1)
    assert divergence_upkeep.unacknowledge(contents.connection, group)
    assert new.group().counts(now)
    assert not divergence_upkeep.unacknowledge(contents.connection, group)


def test_a_clock_that_is_set_ends_no_acknowledgement_for_good(contents: Contents, new: Backup) -> None:
    """It is over for the sweep only when that time has passed; then it goes."""
    group = _acknowledged(contents, new, seconds=0)
    assert group.counts(changes.now(contents.connection))
    at = group.ack.at if group.ack else 0.0
    place = f"{keys.DIVERGED}new:{group.key}"
    contents.connection.hset(place, "ack", replace(group.ack, at=at - DAY, until=at).to_json())
    assert _swept(contents, passed=10.0) == []
    assert new.group().ack is not None
    assert [swept.what for swept in _swept(contents)] == ["open again: its time is over"]
    assert new.group().ack is None


def test_more_of_the_same_stays_acknowledged(contents: Contents, new: Backup) -> None:
    """The same domain at the same pace is what was acknowledged."""
    _acknowledged(contents, new)
    for _ in range(9):
        new.attempt(contents.pending("bob@a.test"), {0: refused()})
    assert new.group().reopened(changes.now(contents.connection)) == ""


def test_a_new_domain_opens_it_again(contents: Contents, new: Backup) -> None:
    """Whom it concerns has changed."""
    _acknowledged(contents, new)
    new.attempt(contents.pending("ann@b.test"), {0: refused()})
    assert "b.test" in new.group().reopened(changes.now(contents.connection))
    (swept,) = _swept(contents)
    assert swept.what.startswith("open again")
    assert new.group().ack is None


def test_many_more_open_it_again(contents: Contents, new: Backup) -> None:
    """An hour with over three times the rate of then, and at least ten."""
    _acknowledged(contents, new)
    for _ in range(10):
        new.attempt(contents.pending("ann@a.test"), {0: refused()})
    assert "10 recipients in an hour" in new.group().reopened(changes.now(contents.connection))


def test_the_rate_of_then_is_what_counts(contents: Contents, new: Backup) -> None:
    """Where twenty an hour are usual, fifty are no news, and sixty-one are."""
    group = _acknowledged(contents, new)
    now = changes.now(contents.connection)
    hour = int(now // HOUR)
    ack = Acknowledgement("alice", "known", now, now + DAY, tuple(group.domains), rate=20.0, counted=1)
    for count, is_reopened in ((50, False), (61, True)):
        later = replace(group, ack=ack, hours={hour: 1, hour + 1: count})
        assert bool(later.reopened(now + HOUR)) is is_reopened
    # A clock that was wrong has no say: an hour that has not come is not looked at.
    assert replace(group, ack=ack, hours={hour + 100: 500}).reopened(now) == ""


# Sweeping and recounting --------------------------------------------------------------------------------------------


def test_an_empty_group_is_forgotten_after_a_time(contents: Contents, new: Backup) -> None:
    """What has been quiet for divergence.keep goes, with all its keys; what is open stays for ever."""
    connection = contents.connection
    done, still = contents.pending("ann@a.test"), contents.pending("ann@a.test")
    new.attempt(done, {0: refused("550 done")})
    new.attempt(still, {0: refused("550 still")})
    listed_copies.drop_failed(connection, [done], "new")
    long_ago = changes.now(connection) - 31 * DAY
    for group in new.groups().values():
        connection.hset(f"{keys.DIVERGED}new:{group.key}", "last", long_ago)
    assert [swept.what for swept in _swept(contents)] == ["empty, forgotten"]
    (left,) = new.groups().values()
    assert left.text == "still"
    assert all(key.decode().endswith(left.key) for key in connection.keys("smtpdup:*:new:*"))


def test_old_hours_and_hours_that_have_not_come_are_forgotten(contents: Contents, new: Backup) -> None:
    """A clock that was wrong for a while leaves no trace, and keeps no group for ever."""
    connection = contents.connection
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    group = new.group()
    place, now = f"{keys.DIVERGED}new:{group.key}", changes.now(connection)
    (hour,) = group.hours
    connection.hset(place, mapping={f"h{hour - 24 * 36}": 5, f"h{hour + 48}": 7, "last": now + 2 * DAY})
    _swept(contents)
    assert set(new.group().hours) == {hour}
    assert new.group().last <= changes.now(connection)


def test_recounting_mends_a_number(contents: Contents, new: Backup) -> None:
    """How many are open follows from the states of the copies; a dry run changes nothing."""
    connection = contents.connection
    for _ in range(3):
        new.attempt(contents.pending("ann@a.test", "bob@a.test"), {0: refused(), 1: deferred()})
    assert recount(connection, "new", OURS) == []
    wrong = {group.key: group for group in new.groups().values()}
    for key in wrong:
        connection.hset(f"{keys.DIVERGED}new:{key}", "open", 70)
    assert recount(connection, "new", OURS, repair=False) == [Mended(key, 70, 3) for key in wrong]
    assert recount(connection, "new", OURS) == [Mended(key, 70, 3) for key in wrong]
    assert {group.open for group in new.groups().values()} == {3}


def test_a_group_that_a_failover_lost_comes_back(contents: Contents, new: Backup) -> None:
    """With its codes, its text and its stage, from what the copies remember."""
    connection = contents.connection
    new.attempt(contents.pending("ann@a.test"), {0: refused("550 5.1.1 <ann@a.test> is unknown", stage=DOT)})
    before = new.group()
    connection.delete(*connection.keys("smtpdup:div*"), *connection.keys("smtpdup:examples*"))
    assert recount(connection, "new", OURS) == [Mended(before.key, 0, 1)]
    found = new.group()
    for name in ("key", "kind", "stage", "code", "status", "text", "reason", "open", "seen", "reply"):
        assert getattr(found, name) == getattr(before, name), name
    listed_copies.drop_failed(connection, listed_copies.EVERY, "new")
    assert new.group().open == 0


def test_a_group_whose_copies_a_failover_lost_is_empty(contents: Contents, new: Backup) -> None:
    """The other way round."""
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    contents.connection.delete(keys.FAILURE + "new")
    assert [mended.now for mended in recount(contents.connection, "new", OURS)] == [0]
    assert new.group().open == 0


@pytest.mark.parametrize("key", ["divergence:new", "diverged:new:{}", "examples:new:{}", "whom:new:{}"])
def test_what_somebody_has_done_to_the_keys_stops_no_copy(contents: Contents, new: Backup, key: str) -> None:
    """A key of another type costs the counting, never an outcome; the sweep forgets it, and counting goes on."""
    connection = contents.connection
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    place = keys.PREFIX + key.format(new.group().key)
    connection.delete(place)
    connection.set(place, "what is this")
    message_id = contents.pending("ann@a.test")
    new.attempt(message_id, {0: deferred()})
    new.attempt(message_id, {0: refused()})
    assert message_id in contents.failed_ids()
    assert _swept(contents)
    recount(connection, "new", OURS)
    assert sum(group.open for group in new.groups().values()) == 2


def test_garbage_reads_as_far_as_it_makes_sense(contents: Contents, new: Backup) -> None:
    """Neither numbers that are none nor a note that is none raises."""
    connection = contents.connection
    new.attempt(contents.pending("ann@a.test"), {0: refused()})
    place = f"{keys.DIVERGED}new:{new.group().key}"
    connection.hset(place, mapping={
        "open": "many", "seen": "9" * 40, "first": "nan", "last": "1e300", "kind": "odd", "class": "odd", "h1x": "1",
        "hx": "1", "ack": '{"by": 1}', "text": b"\xff\xfe", "code": "-5", "d:\x1b[2J": "1",
    })  # fmt: skip
    connection.zadd(keys.DIVERGENCE + "new", {"../../x": 1.0, "f" * 12: 2.0})
    found = new.group()
    assert (found.open, found.seen, found.first, found.last, found.kind, found.ack) == (0, 0, 0.0, 0.0, "refused", None)
    _swept(contents)
    recount(connection, "new", OURS)


def test_states_of_an_older_version_stay_readable() -> None:
    """Without the new fields nobody is counted; with odd ones neither, and the copy is as it was."""
    old = b'job\n{"a":2,"t":1,"s":1.5,"o":[0],"h":[[1.0,"450 later"]]}'
    state = CopyState.from_wire(old)
    assert (state.open, state.past) == ((), ())
    assert state.to_wire().encode() == old
    for odd in (b"[]", b"3", b'{"x":1}', b'{"dabc":[0]}', b'{"d0123456789ab":[-1]}', b'{"d0123456789ab":"0"}'):
        found = CopyState.from_wire(old[:-1] + b',"g":' + odd + b"}")
        assert found == state
    whole = replace(state, open=(("d0123456789ab", (0, 2)),), past=(("r0123456789ab", (1,)),))
    assert CopyState.from_wire(whole.to_wire()) == whole
    assert whole.owed_by([2, 1]).open == (("d0123456789ab", (2,)),)
