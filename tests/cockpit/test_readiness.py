"""The verdict on a ledger: what is read from Redis, also where it makes no sense."""

from __future__ import annotations

import json

import pytest
import redis

from relay.cockpit import readiness, roles_now
from relay.cockpit.evidence import Missing
from relay.cockpit.evidence_from_redis import UnknownBackup, gather
from relay.cockpit.finding import Result
from relay.cockpit.readiness import verdict
from relay.ledger import changes, flow, greetings, health, hosts, keys
from relay.topology.state import Decision, Topology
from support.ledger_contents import Contents, settings

HOSTILE = [
    b"",
    b"\xff\x00",
    b"[" * 5000,
    b'{"at": 1e999}',
    json.dumps({"extensions": {"A": 3}, "tls": 1, "at": 1}).encode(),
]


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_an_empty_ledger_is_not_ready_and_says_of_each_criterion_why(connection: redis.Redis) -> None:
    """Nothing known, nothing passed over."""
    Contents(connection, "new")
    found = verdict(connection, settings(relay_destination_backups="new=localhost:2526"), "new")
    assert not found.is_ready
    assert [j.criterion.number for j in found.judged] == list(range(1, 18))
    assert all(j.finding.text for j in found.judged)


def test_the_flow_of_mail_counts_for_who_got_it(connection: redis.Redis) -> None:
    """First copy, volume, latency and the last 24 hours are read from the flow, to the minute where it is young."""
    Contents(connection, "new")
    now = changes.now(connection)
    sums = {"accepted": 30, "delivered new": 28, "failed new": 2, "seconds 0.1": 30, "seconds 0.25 new": 30}
    flow.add(connection, "me", b"", sums, {"largest": 5000}, now - 7200)
    found = gather(connection, settings(), "new")
    assert found.first == flow.MINUTE.start(now - 7200)
    assert (found.day.accepted, found.day.of("new").seen, found.day.largest) == (30, 30, 5000)


@pytest.mark.parametrize("junk", HOSTILE)
def test_what_makes_no_sense_in_redis_breaks_nothing(connection: redis.Redis, junk: bytes) -> None:
    """Whoever can write to Redis can write anything there: it is evidence of nothing."""
    Contents(connection, "new")
    for key in (keys.EHLO + "new", keys.EHLO + "localhost:25", keys.TOPOLOGY, keys.FLOW_BASE + "x"):
        connection.set(key, junk)
    for key in (keys.HOSTS, keys.REACH, keys.RELAYS):
        connection.hset(key, "new somewhere", junk)
    now = changes.now(connection)
    connection.hset(flow.HOUR.key(flow.HOUR.start(now)), "accepted", junk)
    found = gather(connection, settings(), "new")
    assert (found.new_greeting, list(found.hosts), list(found.reaches), found.old) == (None, [], [], "localhost:25")
    assert not readiness.judge(found).is_ready


def test_other_types_of_keys_are_no_evidence(connection: redis.Redis) -> None:
    """A string where a hash should be, and a list where a string."""
    Contents(connection, "new")
    for key in (keys.HOSTS, keys.REACH, keys.RELAYS):
        connection.set(key, "x")
    connection.rpush(keys.EHLO + "new", "x")
    connection.set(keys.DOMAINS + "new", "x")
    found = gather(connection, settings(), "new")
    assert (found.new_greeting, list(found.hosts), list(found.reaches)) == (None, [], [])
    assert isinstance(found.refusals, Missing)
    assert isinstance(found.domains, Missing)


def test_the_primary_is_who_was_promoted(connection: redis.Redis) -> None:
    """After a promotion the former primary is the backup that is asked about, and the new one is not."""
    Contents(connection, "new")
    configured = settings(relay_destination_backups="new=localhost:2526")
    decided = Topology(Decision(1, "new", ("localhost:25",)), Decision(0, "localhost:25", ("new",)))
    connection.set(keys.TOPOLOGY, decided.to_json())
    assert roles_now.by_default(connection, configured) == ("new", ["localhost:25"])
    assert gather(connection, configured, "localhost:25").old == "new"
    with pytest.raises(UnknownBackup, match="new is the primary"):
        gather(connection, configured, "new")


def test_nobody_of_that_name(connection: redis.Redis) -> None:
    """It says who there is."""
    Contents(connection, "new")
    with pytest.raises(UnknownBackup, match="no backup 'nwe'; there is: new"):
        verdict(connection, settings(), "nwe")


def test_a_host_that_stops_takes_its_news_away_and_leaves_what_it_found_out(connection: redis.Redis) -> None:
    """Whoever comes there next goes on with that."""
    now = changes.now(connection)
    hosts.tell(connection, "here /a", "up", 3, 2, 7.5, now)
    seen = hosts.Reach("new", "here /a", "here", False, "refused\x1b[2J", True, None, "", 0.0, 0.0)
    hosts.tell_reach(connection, seen, now)
    (found,) = hosts.read(connection)
    assert (found.place, found.role, found.spool_messages, found.spool_oldest_s) == ("here /a", "up", 2, 7.5)
    hosts.leave(connection, "here /a")
    assert hosts.read(connection) == []
    (reach,) = hosts.reaches(connection, "new")
    assert (reach.ok, reach.text) == (False, "refused\\x1b[2J")


def test_a_hostile_ehlo_is_bounded(connection: redis.Redis) -> None:
    """Thousands of extensions, endless parameters and control characters stay small and printable."""
    hostile = {f"X{n}\x1b": "\x07" * 5000 for n in range(5000)}
    stored = greetings.Greeting(greetings._bounded(hostile), True, 1.0).to_json()
    connection.set(keys.EHLO + "new", stored)
    found = greetings.read(connection, ["new"])["new"]
    assert len(stored) < 100_000
    assert len(found.extensions) == 64
    assert all(len(key + value) < 1000 and (key + value).isprintable() for key, value in found.extensions.items())


def test_a_hold_and_a_throttle_keep_it_from_being_ready(connection: redis.Redis) -> None:
    """It does not get the mail as it comes; the verdict says who holds it and why, until that has ended."""
    Contents(connection, "new")

    def restraint() -> tuple[str, str]:
        found = gather(connection, settings(), "new").restraint
        return found.held, found.throttled

    assert restraint() == ("", "")
    health.hold(connection, "new", 600.0, "disk full", "alice")
    health.throttle(connection, "new", 5.0, 2)
    held, throttled = restraint()
    assert (held.startswith("by alice since "), held.endswith(": disk full")) == (True, True)
    assert throttled == "to 5/s and 2 connections"
    (row,) = [j for j in verdict(connection, settings(), "new").judged if j.criterion.name == "as it is"]
    assert row.finding.result is Result.FAIL
    health.release(connection, "new")
    health.throttle(connection, "new", 0.0, 0)
    assert restraint() == ("", "")
