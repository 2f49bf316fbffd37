"""Clocks that are set, two hours back or five minutes forward: no copy waits for that, and none is delivered twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from relay.ledger import changes, keys
from support.ledger_contents import DAY, Contents, settings
from support.product import Product
from support.reactions import Gate
from support.redis_servers import RedisServer
from support.running_courier import at_work
from support.scripted_server import ScriptedServer
from support.settable_clock import SettableClock
from support.waiting import until, wait_until
from workers.rqworker.scheduler import Scheduler
from workers.upkeep.reconciler import _LEASE, _Interrupted, _Lock
from workers.upkeep.sweep import Sweeper

BACK, FORWARD = -7200.0, 300.0
SETTINGS = {
    "retry.first": "3",
    "retry.longest": "10m",
    "workers.processes": "2",
    "workers.sweep": "1",
    "relay.timeout_seconds": "5",
}


@pytest.fixture
def server(redis_factory: Callable[..., RedisServer], clock: SettableClock) -> RedisServer:
    """A Redis whose clock the test sets."""
    return redis_factory(clock)


@pytest.fixture
def contents(server: RedisServer) -> Iterator[Contents]:
    with server.client() as client:
        yield Contents(client)


def _arrivals(backup: ScriptedServer) -> Counter[str]:
    return Counter(recipient for message in backup.messages for recipient in message.recipients)


# Redis's clock, part by part ------------------------------------------------------------------------------------


def test_a_schedule_goes_back_with_the_clock(server: RedisServer, contents: Contents) -> None:
    """A job that was due in seconds is, the order stays, and what was far ahead keeps its distance."""
    soon, later = contents.pending(), contents.pending()
    contents.defer(soon, seconds=2)
    job = contents.defer(later, seconds=500)
    with server.client() as client:
        scheduler = Scheduler(client, "host", longest=600)
        scheduler.round(["backup-new"])
        server.set_clock(BACK)

        def is_queued() -> bool:
            scheduler.round(["backup-new"])
            return [soon] in contents.queued().values()

        wait_until(is_queued, 10, interval=0.2)
        (left,) = contents.queue().scheduled_job_registry.get_job_ids(cleanup=False)
        assert left == job
        at = contents.connection.zscore(contents.queue().scheduled_job_registry.key, job)
        assert 480 < at - changes.now(contents.connection) <= 501
        scheduler.close()


def test_a_clock_that_went_back_while_nobody_looked(server: RedisServer, contents: Contents) -> None:
    """Found at the start by the last look, and without one no job is farther than any may be."""
    first, second = contents.pending(), contents.pending()
    contents.defer(first, seconds=2)
    Sweeper(contents.connection, settings()).sweep()
    server.set_clock(BACK)
    with server.client() as client:
        scheduler = Scheduler(client, "host", longest=600)
        wait_until(lambda: not scheduler.round(["backup-new"]) and contents.queue().count, 10, interval=0.2)
        contents.connection.hdel(keys.LEDGER, "looked")
        job = contents.defer(second, seconds=7000)
        again = Scheduler(client, "host", longest=600)
        again.round(["backup-new"])
        at = contents.connection.zscore(contents.queue().scheduled_job_registry.key, job)
        assert at - changes.now(contents.connection) <= 600
        scheduler.close()


def test_locks_of_the_dead_end_as_they_were_meant_to(server: RedisServer, contents: Contents) -> None:
    """The schedule and the reconciler of a host that is gone pass to another in minutes, not in hours."""
    with server.client() as client:
        gone = Scheduler(client, "gone")
        gone.round(["backup-new"])
        client.set(keys.RECONCILER, "gone", ex=_LEASE)
        contents.connection.sadd("rq:workers:backup-new", "rq:worker:gone.new.1.2")
        client.hset("rq:worker:gone.new.1.2", "birth", "1")
        client.expire("rq:worker:gone.new.1.2", 120)
        server.set_clock(BACK)
        assert client.ttl(keys.RECONCILER) > 7000
        other = Scheduler(client, "other")
        other.round(["backup-new"])
        assert 0 < client.ttl("rq:scheduler-lock:backup-new") <= 61
        with pytest.raises(_Interrupted):
            _Lock(client, "other", threading.Event()).take()
        assert 0 < client.ttl(keys.RECONCILER) <= _LEASE
        Sweeper(client, settings()).sweep()
        assert 0 < client.ttl("rq:worker:gone.new.1.2") <= 120


def test_leases_and_deadlines_come_nearer(server: RedisServer, contents: Contents) -> None:
    """A lease of a worker that was killed lasts a minute; uncertain and staged messages keep their distance."""
    leased, staged = contents.pending(), contents.staged(deadline=700)
    contents.claim("job", leased, worker="gone")
    held = contents.staged()
    with contents.connection.pipeline() as pipe:
        changes.hold(pipe, [changes.Held(held, "", 3600)])
        pipe.execute()
    sweeper = Sweeper(contents.connection, settings())
    sweeper.sweep()
    server.set_clock(BACK)
    report = sweeper.sweep()
    assert report.counts["too far ahead"] == 3
    clock = changes.now(contents.connection)
    for key, message_id, most in (
        (keys.BUSY + "new", leased, 66),
        (keys.STAGED, staged, 701),
        (keys.UNCERTAIN, held, 3601),
    ):
        at = contents.connection.zscore(key, message_id)
        assert at is not None, key
        assert most - 20 < at - clock <= most, key
    assert "too far ahead" not in sweeper.sweep().counts


def test_nothing_expires_by_a_clock_that_was_set_forward(server: RedisServer, contents: Contents) -> None:
    """Failed copies and those of a paused destination are as old as the time that passed; so they are after a start."""
    failed, waiting = contents.failed(ago=3600), contents.pending(age=3600)
    contents.pause()
    options = {"failed_ttl": "30d", "retry_give_up": "5d"}
    sweeper = Sweeper(contents.connection, settings(**options))
    sweeper.sweep()
    server.set_clock(40 * DAY)
    assert not {"failed copy expired", "given up"} & set(sweeper.sweep().counts)
    contents.connection.hset(keys.LEDGER, "looked", time.time())  # nobody has seen it since
    assert not {"failed copy expired", "given up"} & set(
        Sweeper(contents.connection, settings(**options)).sweep().counts
    )
    assert contents.failed_ids() == [failed]
    assert contents.pending_ids() == [waiting]
    contents.connection.zadd(keys.FAILED + "new", {failed: time.time() - 31 * DAY})
    assert sweeper.sweep().counts["failed copy expired"] == 1


@pytest.mark.parametrize("step", [BACK, FORWARD])
async def test_a_copy_in_hand_keeps_its_lease(
    server: RedisServer, contents: Contents, backup: ScriptedServer, step: float
) -> None:
    """However Redis's clock is set, the lease of a copy at its dot goes on, and no other worker gets it."""
    gate = Gate()
    backup.replies["."] = (gate, None)
    message_id = contents.pending()
    async with at_work(server.url, backup) as work:
        job = contents.enqueue(message_id)
        work.add([message_id], job)
        await until(lambda: gate.reached)
        await asyncio.to_thread(server.set_clock, step)

        def left() -> float:
            return (contents.connection.zscore(keys.BUSY + "new", message_id) or 0) - changes.now(contents.connection)

        await until(lambda: 50 < left() <= 61, 10, lambda: f"{left()}")
        assert contents.claim(job, message_id, worker="another") == []
        gate.open()
        await until(lambda: not contents.pending_ids())
    assert len(backup.messages) == 1


# All of it, on hosts whose clocks are set -----------------------------------------------------------------------


@pytest.fixture
def shifted(clock: SettableClock, monkeypatch: pytest.MonkeyPatch) -> SettableClock:
    """The clock of every process of the product that the test starts, its embedded Redis included."""
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    return clock


@pytest.mark.timeout(120)
def test_a_host_whose_clock_goes_back_two_hours(
    tmp_path: Path, shifted: SettableClock, primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """Relay, worker and Redis: a deferred copy goes out in seconds, mail is taken as before, and all arrives once."""
    backup.replies["RCPT"] = ["451 4.7.1 later", None]
    with Product(tmp_path / "p", primary=primary.address, backups=[backup.address], settings=SETTINGS) as product:
        product.send("s@example.com", "first@example.com")
        product.wait_for_log('"deferred"')
        shifted.set(BACK)
        product.send("s@example.com", "second@example.com")
        wait_until(lambda: _arrivals(backup) == {"first@example.com": 1, "second@example.com": 1}, 30)
        wait_until(lambda: product.summary()["pending"] == 0)
        assert '"the clock of Redis has been set"' in product.log
        assert product.stop() == 0


@pytest.mark.timeout(150)
def test_a_living_worker_is_not_declared_dead_when_the_clock_goes_forward(
    tmp_path: Path, shifted: SettableClock, primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """Its key in Redis ends with the clock, while its copy waits for the dot: nobody else delivers that one."""
    gate = Gate()
    backup.replies["."] = (gate, None)
    # Tried by its job: that of a first try from memory may come after the clock is set, when the lease has ended.
    settings = {**SETTINGS, "workers.first_try_from_memory": "false"}
    with Product(tmp_path / "p", primary=primary.address, backups=[backup.address], settings=settings) as product:
        product.send("s@example.com", "a@example.com")
        wait_until(lambda: gate.reached)
        with redis.Redis.from_url(product.redis_url) as client:
            workers = client.smembers("rq:workers")
            assert len(workers) == 2
            shifted.set(FORWARD)
            wait_until(lambda: client.exists(*workers) < 2, 10, interval=0.005)
            wait_until(lambda: client.exists(*workers) == 2, 30, "the workers have not been heard of again")
        assert "abandoned job" not in product.log
        gate.open()
        wait_until(lambda: product.summary()["pending"] == 0)
        assert product.stop() == 0
    assert _arrivals(backup) == {"a@example.com": 1}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("off", [BACK, FORWARD, 400 * DAY])
def test_hosts_whose_clocks_differ_from_that_of_redis(
    tmp_path: Path,
    shifted: SettableClock,
    redis_url: str,
    primary: ScriptedServer,
    backup: ScriptedServer,
    off: float,
) -> None:
    """Relay and workers go by the clock of Redis, on another host: a deferred copy is tried again when it is due."""
    shifted.set(off)
    backup.replies["RCPT"] = ["451 4.7.1 later", None]
    product = Product(
        tmp_path / "p", primary=primary.address, backups=[backup.address], redis_url=redis_url, settings=SETTINGS
    )
    with product:
        product.send("s@example.com", "first@example.com")
        product.wait_for_log('"deferred"')
        shifted.set(-off / 2)
        wait_until(lambda: _arrivals(backup) == {"first@example.com": 1}, 30)
        assert product.stop() == 0
