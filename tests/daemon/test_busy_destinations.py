"""Who of many backups gets workers of its own, and for how long."""

from __future__ import annotations

import redis

from relay.config.loader import load
from relay.daemon.busy_destinations import _BUSY, _QUIET, BusyDestinations
from relay.daemon.slots import Child
from relay.mail.destination import Destination


def workers_for(destination: Destination) -> list[Child]:
    return [Child(f"worker-{destination.name}-1", run=lambda _: 0)]


def names(roster: BusyDestinations, looks: int = 1) -> list[str]:
    """Look so many times; return the workers there should be at the end."""
    found = [roster() for _ in range(looks)][-1]
    assert found is not None
    return [child.name for child in found]


def roster(url: str) -> BusyDestinations:
    flags = {
        "relay.destination_primary": "old.example:25",
        "relay.destination_backups": "a=a.example:25,b=b.example:25",
        "redis.url": url,
    }
    return BusyDestinations(load(flags, environ={}, directories=()), workers_for)


def test_work_at_several_looks_gives_it_workers_until_there_is_none(redis_url: str) -> None:
    """A job that waits counts as one that has begun does; a look without work begins the count anew."""
    client = redis.Redis.from_url(redis_url)
    looks = roster(redis_url)
    assert names(looks, 5) == []
    client.rpush("rq:queue:backup-a", "job")
    assert names(looks, _BUSY - 1) == []
    client.delete("rq:queue:backup-a")
    assert names(looks) == []
    client.zadd("rq:wip:backup-a", {"job:execution": 1})
    assert names(looks, _BUSY - 1) == []
    assert names(looks) == ["worker-a-1"]
    client.delete("rq:wip:backup-a")
    assert names(looks, _QUIET - 1) == ["worker-a-1"]
    client.rpush("rq:queue:backup-a", "job")
    assert names(looks) == ["worker-a-1"]
    client.delete("rq:queue:backup-a")
    assert names(looks, _QUIET - 1) == ["worker-a-1"]
    assert names(looks) == []
    client.close()


def test_a_key_of_another_kind_and_a_redis_that_is_away(redis_url: str) -> None:
    """What makes no sense is work, which a worker of its own looks at; without Redis nothing changes."""
    client = redis.Redis.from_url(redis_url)
    client.set("rq:queue:backup-b", "nonsense")
    looks = roster(redis_url)
    assert names(looks, _BUSY) == ["worker-b-1"]
    client.close()
    assert roster("redis://127.0.0.1:9/0")() is None
