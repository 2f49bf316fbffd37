"""Holds and throttles in the ledger: how long a hold lasts, what it takes off an age, and that grants keep the sum."""

from __future__ import annotations

import json
import time

import pytest
import redis

from relay.ledger import changes, health, keys
from relay.ledger.health import Health, Hold

KEY = keys.HEALTH + "new"


def test_a_hold_begins_is_prolonged_and_ends(redis_client: redis.Redis) -> None:
    """A second hold keeps the beginning of the first; a release ends it, and it is remembered for how long it was."""
    health.hold(redis_client, "new", 0, "maintenance", "alice")
    first = Health.read(redis_client, "new")
    assert first.hold is not None
    assert (first.hold.until, first.hold.reason, first.hold.by) == (0.0, "maintenance", "alice")
    health.hold(redis_client, "new", 3600, "longer", "bob")
    second = Health.read(redis_client, "new")
    assert second.hold is not None
    assert (second.hold.since, second.hold.by) == (first.hold.since, "bob")
    assert abs(second.hold.until - changes.now(redis_client) - 3600) < 60
    assert health.release(redis_client, "new")
    assert not health.release(redis_client, "new")
    after = Health.read(redis_client, "new")
    assert after.hold is None
    assert [begin for begin, _ in after.past] == [first.hold.since]


def test_a_hold_ends_by_itself(redis_client: redis.Redis) -> None:
    """Nobody need write anything: from its end on it is none, and counts for as long as it lasted."""
    since = changes.now(redis_client) - 100
    redis_client.hset(KEY, "held", json.dumps([since, since + 60, "x", "alice"]))
    found = Health.read(redis_client, "new")
    assert found.is_held(since + 59)
    assert not found.is_held(since + 60)
    assert found.held_seconds(since - 10, since + 100) == pytest.approx(60)
    assert not health.release(redis_client, "new")
    kept = Health.read(redis_client, "new")
    assert kept.hold is None
    assert kept.held_seconds(since - 10, since + 100) == pytest.approx(60, abs=0.01)


def test_what_overlaps_counts_once() -> None:
    """Only the part of a hold within the time asked about counts, and no second twice."""
    found = Health(past=((10.0, 20.0), (15.0, 30.0), (50.0, 60.0)), hold=Hold(90.0, 0.0, "", ""))
    assert found.held_seconds(0, 100) == 40
    assert found.held_seconds(25, 55) == 10
    assert found.held_seconds(31, 49) == 0
    assert Health().held_seconds(0, 100) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"held": "soon"}, {"held": "[1]"}, {"held": '["a", "b", "c", "d"]'}, {"held": "[1e999, 0, 1, 2]"},
        {"held": "[" * 5000}, {"held_past": "{}"}, {"held_past": "[[1]]"}, {"held_past": "[[5, 1], [-1, 2]]"},
        {"rate": "fast"}, {"rate": "nan"}, {"rate": "-1"}, {"rate": "inf"}, {"connections": "1e99"},
        {"held": b"\xff\xfe"}, {"state": b"\xff"},
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_counts_as_not_said(redis_client: redis.Redis, fields: dict[str, str | bytes]) -> None:
    """Nothing is held, nothing is bounded, and a hold can be had and ended as ever."""
    redis_client.hset(KEY, mapping=fields)
    found = Health.read(redis_client, "new")
    assert (found.hold, found.past, found.rate, found.connections) == (None, (), 0.0, 0)
    health.hold(redis_client, "new", 0, "x", "y")
    assert Health.read(redis_client, "new").is_held(changes.now(redis_client))
    assert health.release(redis_client, "new")


def test_a_hostile_reason_is_cut_and_printable(redis_client: redis.Redis) -> None:
    """It is shown to people: no control character of it reaches a terminal."""
    redis_client.hset(KEY, "held", json.dumps([1.0, 0, "\x1b[2J" + "x" * 5000, "\n"]))
    found = Health.read(redis_client, "new").hold
    assert found is not None
    assert len(found.reason) < 1100
    assert found.reason.isprintable()
    assert found.by.isprintable()


def ask(client: redis.Redis, worker: str, rate: float, wanted: int) -> tuple[int, int, int]:
    with client.pipeline(transaction=False) as pipe:
        health.ask_grant(pipe, "new", worker, rate, wanted)
        return health.granted(pipe.execute()[0])


def test_grants_keep_the_sum(redis_client: redis.Redis) -> None:
    """However greedily three workers ask, no more begins than the rate and one second's stock allow."""
    begun = time.monotonic()
    total = 0
    while time.monotonic() - begun < 1.5:
        total += sum(ask(redis_client, worker, 40.0, 1000)[0] for worker in "abc")
    seconds = time.monotonic() - begun
    assert 0 < total <= 40 * (seconds + 1) + 1


def test_connections_are_shared_by_place(redis_client: redis.Redis) -> None:
    """A worker alone has all of them at once; one that comes later has no place until the others have made room."""
    assert ask(redis_client, "b", 0, 0) == (0, 1, 1)
    assert ask(redis_client, "a", 0, 0) == (0, 0, 2)
    redis_client.hset(keys.THROTTLED + "new", mapping={
        worker: f"{changes.now(redis_client) - 10:.6f} {changes.now(redis_client) - 1:.6f}" for worker in "ab"
    })  # fmt: skip
    assert ask(redis_client, "a", 0, 0) == (0, 1, 2)
    assert ask(redis_client, "b", 0, 0) == (0, 2, 2)
    redis_client.hset(keys.THROTTLED + "new", "a", "1.0 2.0")  # it has died long ago
    redis_client.hset(keys.THROTTLED + "new", "c", "nonsense")
    assert ask(redis_client, "b", 0, 0) == (0, 1, 1)
