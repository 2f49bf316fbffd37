"""The flow of mail is counted once, whatever becomes of Redis, of housekeeping and of the processes that count."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import redis
from prometheus_client import Counter, Gauge, Histogram
from redis.exceptions import TimeoutError as NoAnswer

from relay import metrics  # noqa: F401 - from its import on, values are kept in regions
from relay.cockpit.sampler import Sampler, difference
from relay.ledger import changes, flow, keys
from relay.metric_store import Arena, _bind


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


class Process:
    """A process that counts in a region of an arena, as relay and workers do."""

    def __init__(self, arena: Arena, name: str) -> None:
        self.arena, self.name = arena, name
        arena.reserve(name)
        arena.take(name)
        self.metrics = {
            "messages": Counter("smtpdup_messages_total", "", ["result"], registry=None),
            "deliveries": Counter("smtpdup_deliveries_total", "", ["destination", "result"], registry=None),
            "seconds": Histogram("smtpdup_primary_seconds", "", buckets=(0.1, 1), registry=None),
            "answered": Histogram("smtpdup_server_seconds", "", ["server"], buckets=(0.1, 1), registry=None),
            "routed": Counter("smtpdup_route_messages_total", "", ["route", "server"], registry=None),
            "refused": Counter("smtpdup_route_refused_total", "", ["route", "server"], registry=None),
            "failovers": Counter("smtpdup_failovers_total", "", ["server", "to"], registry=None),
            "split": Counter("smtpdup_split_total", "", ["how"], registry=None),
            "largest": Gauge("smtpdup_largest_message_bytes", "", registry=None),
        }
        _bind(None)

    def count(self, accepted: int = 0, delivered: int = 0, largest: int = 0) -> None:
        self.arena.take(self.name)
        if accepted:
            self.metrics["messages"].labels("accepted").inc(accepted)
            for _ in range(accepted):
                self.metrics["seconds"].observe(0.5)
        if delivered:
            self.metrics["deliveries"].labels("new", "delivered").inc(delivered)
        if largest:
            self.metrics["largest"].set(largest)
        _bind(None)


class Unreliable:
    """A Redis whose answers are lost: with ``executes`` after it has done what it was asked to."""

    def __init__(self, connection: redis.Redis, *, executes: bool) -> None:
        self.connection, self.executes = connection, executes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def eval(self, *arguments: Any) -> None:
        if self.executes:
            self.connection.eval(*arguments)
        raise NoAnswer("lost")


def whole(connection: redis.Redis) -> flow.Flow:
    totals = {
        unit.name: flow.total(flow.read(connection, unit, count, changes.now(connection)))
        for unit, count in ((flow.MINUTE, 5), (flow.HOUR, 2))
    }
    assert totals["minute"].accepted == totals["hour"].accepted
    return totals["hour"]


def test_what_was_counted_between_two_looks_is_added(connection: redis.Redis) -> None:
    """Messages, copies, latencies as what fell into each bucket, and the largest message."""
    arena = Arena(8)
    process, sampler = Process(arena, "relay-1"), Sampler(arena, is_fresh=True)
    process.count(accepted=3, delivered=2, largest=500)
    sampler.sample(connection)
    process.count(accepted=4, largest=400)
    sampler.sample(connection)
    sampler.sample(connection)
    found = whole(connection)
    assert (found.accepted, found.of("new").delivered, found.largest) == (7, 2, 500)
    assert dict(found.seconds.counts) == {1.0: 7}


def test_the_flow_of_routes(connection: redis.Redis) -> None:
    """By route and server, with what was put off and turned to another; a field that is none of ours counts nothing."""
    arena = Arena(8)
    process, sampler = Process(arena, "relay-1"), Sampler(arena, is_fresh=True)
    for server, to, times in (("a", "b", 2), ("b", "c", 3)):
        arena.take("relay-1")
        process.metrics["routed"].labels("shop", server).inc(10 * times)
        process.metrics["refused"].labels("shop", server).inc(times)
        process.metrics["answered"].labels(server).observe(0.5 * (times - 1))
        process.metrics["failovers"].labels(server, to).inc()
        process.metrics["failovers"].labels(server, "x").inc()
        process.metrics["split"].labels("defer").inc(times)
        _bind(None)
        sampler.sample(connection)
    for name in (
        "answered x a",
        "answered 1.0",
        "answered 1.0 a b",
        "accepted shop",
        "accepted -x a",
        "refused shop a b",
        "failovers",
        "accepted shop a\nb",
    ):
        connection.hset(flow.HOUR.key(flow.HOUR.start(changes.now(connection))), name, 7)
    found = flow.total(flow.read(connection, flow.HOUR, 2, changes.now(connection)))
    assert found.routes == {("shop", "a"): flow.RouteFlow(20, 2), ("shop", "b"): flow.RouteFlow(30, 3)}
    assert {name: dict(took.counts) for name, took in found.answered.items()} == {"a": {1.0: 1}, "b": {1.0: 1}}
    assert (found.seconds_of("a").total, found.seconds_of("ab").total, found.destinations) == (1, 2, {})
    assert (found.split, found.failovers) == ({"defer": 5}, {"a": 2, "b": 2})


def test_several_installations_add_up(connection: redis.Redis) -> None:
    """Each host adds its own; the largest message of all is the largest."""
    for number in (1, 2, 3):
        arena = Arena(8)
        process, sampler = Process(arena, "relay-1"), Sampler(arena, is_fresh=True)
        process.count(accepted=number, largest=100 * number)
        sampler.sample(connection)
    found = whole(connection)
    assert (found.accepted, found.largest) == (6, 300)


@pytest.mark.parametrize("executes", [False, True])
def test_a_lost_answer_adds_nothing_twice(connection: redis.Redis, executes: bool) -> None:
    """Whether Redis did it or not, the next look finds out."""
    arena = Arena(8)
    process, sampler = Process(arena, "relay-1"), Sampler(arena, is_fresh=True)
    process.count(accepted=5)
    with pytest.raises(NoAnswer):
        sampler.sample(Unreliable(connection, executes=executes))
    process.count(accepted=2)
    sampler.sample(connection)
    assert whole(connection).accepted == 7


def test_a_new_housekeeping_goes_on_where_the_last_one_was(connection: redis.Redis) -> None:
    """Also one that was killed between the script and its answer."""
    arena = Arena(8)
    process, first = Process(arena, "relay-1"), Sampler(arena, is_fresh=True)
    process.count(accepted=5)
    with pytest.raises(NoAnswer):
        first.sample(Unreliable(connection, executes=True))
    process.count(accepted=1)
    Sampler(arena, is_fresh=False).sample(connection)
    assert whole(connection).accepted == 6


def test_a_ledger_that_came_back_empty_gets_only_what_is_new(connection: redis.Redis) -> None:
    """What was added before is lost with it; it is not added again as if it had come now."""
    arena = Arena(8)
    process, sampler = Process(arena, "relay-1"), Sampler(arena, is_fresh=True)
    process.count(accepted=100)
    sampler.sample(connection)
    connection.flushall()
    process.count(accepted=1)
    with pytest.raises(NoAnswer):
        sampler.sample(Unreliable(connection, executes=False))
    sampler.sample(connection)
    assert whole(connection).accepted == 1
    connection.flushall()
    Sampler(arena, is_fresh=False).sample(connection)
    assert whole(connection).accepted == 0


def test_a_process_that_counts_anew_has_counted_all_that_it_shows() -> None:
    """A region that made no sense begins at zero; the others do not hide it."""
    before = {"1": {"accepted": 100, "delivered new": 7}, "2": {"accepted": 50}}
    now = {"1": {"accepted": 3}, "2": {"accepted": 60}, "3": {"accepted": 1}}
    assert difference(before, now) == ({"accepted": 14}, {})


def test_the_largest_message_of_a_process_without_mail_is_no_news() -> None:
    """Its hour is over: the gauge still shows what was in it."""
    before = {"1": {"accepted": 3, "largest": 900}, "2": {"accepted": 3, "largest": 500}}
    now = {"1": {"accepted": 3, "largest": 900}, "2": {"accepted": 4, "largest": 100}}
    assert difference(before, now) == ({"accepted": 1}, {"largest": 100})


def test_a_process_that_cannot_be_read_for_a_while_is_not_counted_again(connection: redis.Redis) -> None:
    """Its region made no sense at one look, and does at the next."""
    arena = Arena(8)
    process, sampler = Process(arena, "relay-1"), Sampler(arena, is_fresh=True)
    process.count(accepted=5)
    sampler.sample(connection)
    head = bytes(arena._of(0)[:4])
    arena._of(0)[:4] = b"\xff\xff\xff\xff"
    sampler.sample(connection)
    arena._of(0)[:4] = head
    process.count(accepted=1)
    sampler.sample(connection)
    assert whole(connection).accepted == 6


@pytest.mark.parametrize(
    "note", [b"", b"x", zlib.compress(b"[1]"), zlib.compress(b'{"0": 3}'), zlib.compress(b"[" * 99999)]
)
def test_a_note_that_is_none_says_nothing(connection: redis.Redis, note: bytes) -> None:
    """Whoever can write to Redis can write anything there."""
    arena = Arena(8)
    process, sampler = Process(arena, "relay-1"), Sampler(arena, is_fresh=False)
    process.count(accepted=5)
    connection.set(keys.FLOW_BASE + arena.identity, note)
    sampler.sample(connection)
    process.count(accepted=2)
    sampler.sample(connection)
    assert whole(connection).accepted == 2


def test_a_process_reserved_after_the_fork_of_who_tells_is_counted() -> None:
    """Workers of a destination that came later count where housekeeping does not know their name."""
    arena = Arena(8)
    Process(arena, "relay-1").count(accepted=1)
    numbers = dict(arena._numbers)
    Process(arena, "worker-late-1").count(delivered=2)
    arena._numbers = numbers  # as housekeeping has it, which was forked before
    assert len(list(arena.readings())) == 2
    samples = [sample for metric in arena.collect() for sample in metric.samples]
    assert sum(sample.value for sample in samples if sample.name == "smtpdup_deliveries_total") == 2
