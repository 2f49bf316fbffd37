"""The flow of mail as it is read: sums, quantiles, and nothing of what is no number of ours."""

from __future__ import annotations

import math

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from relay.ledger import flow
from relay.ledger.flow import Buckets

AT = 1_795_796_640.0


@pytest.fixture
def connection(redis_url: str) -> redis.Redis:
    return redis.Redis.from_url(redis_url)


def test_stretches_of_time_that_nobody_saw_are_empty(connection: redis.Redis) -> None:
    """A line for each, oldest first, the last one that which is going on."""
    flow.add(connection, "me", b"", {"accepted": 2}, {"most": 3}, AT - 120)
    flow.add(connection, "me", b"", {"accepted": 1, "delivered new": 1}, {"most": 2}, AT)
    found = flow.read(connection, flow.MINUTE, 4, AT + 59)
    assert [f.accepted for f in found] == [0, 2, 0, 1]
    assert [f.start for f in found] == [AT - 180, AT - 120, AT - 60, AT]
    whole = flow.total(found)
    assert (whole.accepted, whole.most, whole.of("new").delivered, whole.length) == (3, 3, 1, 240)


def test_it_is_kept_for_so_long_and_no_longer(connection: redis.Redis) -> None:
    """Minutes for 25 hours, hours for 35 days, tens of seconds for a quarter of an hour."""
    flow.add(connection, "me", b"", {"accepted": 2}, {}, AT)
    kept = {unit.name: connection.ttl(unit.key(unit.start(AT))) for unit in flow.UNITS}
    assert kept == {"moment": 900, "minute": 90_000, "hour": 3_024_000}


def test_what_is_no_number_or_field_of_ours_counts_nothing(connection: redis.Redis) -> None:
    """Whoever can write to Redis can write anything there, and a later version writes more than we know."""
    fields: dict[str | bytes, str | bytes] = {
        "accepted": "5", "refused_5xx": "-3", "own": "many", "octets": "9" * 40, b"\xff\xfe": "1", "delivered": "1",
        "delivered a b": "1", "delivered \x1b[2J": "1", "delivered new": "4", "seconds nan": "1", "seconds x new": "1",
        "seconds 0.1": "2", "seconds +Inf new": "3", "age -1 new": "1", "start": "7", "length": "7", "of": "1",
    }  # fmt: skip
    connection.hset(flow.HOUR.key(flow.HOUR.start(AT)), mapping=fields)
    (found,) = flow.read(connection, flow.HOUR, 1, AT)
    assert (found.accepted, found.refused, found.octets, found.start) == (5, 0, 0, flow.HOUR.start(AT))
    assert list(found.destinations) == ["new"]
    assert found.of("new").delivered == 4
    assert dict(found.of("new").seconds.counts) == {math.inf: 3}
    assert dict(found.seconds.counts) == {0.1: 2}


def test_quantiles() -> None:
    """Evenly spread within a bucket; nothing has none, and what has no bound took at least the last one."""
    assert Buckets({}).quantile(0.5) is None
    assert Buckets({0.1: 0}).quantile(0.5) is None
    assert Buckets({0.1: 10}).quantile(0.5) == pytest.approx(0.05)
    assert Buckets({0.1: 50, 0.2: 50}).quantile(0.95) == pytest.approx(0.19)
    assert Buckets({0.1: 1, 600.0: 0, math.inf: 99}).quantile(0.95) == 600.0


@given(st.dictionaries(st.sampled_from([0.001, 0.1, 1.0, 60.0, math.inf]), st.integers(0, 1000)))
def test_a_larger_share_never_takes_less_time(counts: dict[float, int]) -> None:
    """Whatever is in the buckets, quantiles rise, and are finite."""
    found = [Buckets(counts).quantile(share) for share in (0.0, 0.25, 0.5, 0.95, 0.99, 1.0)]
    if any(counts.values()):
        assert all(q is not None and math.isfinite(q) for q in found)
        assert sorted(found) == found
    else:
        assert set(found) == {None}
