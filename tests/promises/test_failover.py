"""Redis with Sentinel: servers, Sentinels and the product as processes, and a failover in the middle of the mail."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import ReadOnlyError, RedisError

from relay.config.loader import Settings, SettingsError, load
from relay.config.shown import describe
from relay.ledger import changes, keys
from relay.monitoring.probes import probe_redis
from relay.redisio import clients
from relay.redisio.pipeline import CommandBatch, Pipelines
from relay.redisio.replication import TooFewReplicas
from support.product import SOON, Product
from support.recorded_sessions import Transaction
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.sentinels import SERVICE, SentinelSet
from support.waiting import wait_until

WAITS = SOON

_EXPLAIN = {"may repeat", "uncertain", "uncertain copied"}


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[SentinelSet]:
    made = SentinelSet(tmp_path / "sentinels")
    try:
        yield made.start()
    finally:
        made.stop()


def settings_for(sentinels: SentinelSet, **more: str) -> Settings:
    given = {"relay.destination_primary": "old.example.com", **sentinels.settings}
    return load({**given, **{k.replace("__", "."): v for k, v in more.items()}}, {}, ())


def started(
    product: Callable[..., Product],
    sentinels: SentinelSet,
    primary: ScriptedServer,
    backup: ScriptedServer,
    **more: str,
) -> Product:
    """Three relay and two worker processes that count on one replica."""
    settings = {
        **sentinels.settings,
        "smtp.processes": "3",
        "workers.processes": "2",
        "redis.replicas": "1",
        "redis.timeout_seconds": "2",
        "retry.first": "1",
        "workers.sweep": "5",
        **more,
    }
    return product(primary=primary.address, backups=[backup.address], settings=settings)


def number_of(transaction: Transaction) -> int:
    return int(transaction.header("Subject") or -1)


def id_of(transaction: Transaction) -> str:
    found = re.search(rb"\bid ([\w.-]+)", transaction.trace)
    assert found, transaction.trace
    return found[1].decode()


def audit(it: Product, accepted: set[int], primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Wait until all is delivered, then: whatever was accepted is at both; what came twice has its line in the log."""

    def missing() -> set[int]:
        return accepted - {number_of(t) for t in backup.messages}

    wait_until(lambda: not missing(), 240, lambda: f"not at the backup: {sorted(missing())[:20]}", 0.2)
    assert not accepted - {number_of(t) for t in primary.messages}
    # What a failover lost of RQ is the reconciler's, which looks twice before it believes that.
    wait_until(lambda: it.summary(backup.address)["pending"] == 0, 240, "copies stay pending", 0.5)
    explained = {e.get("id") for e in it.events if e["event"] in _EXPLAIN}
    again = [message_id for message_id, count in Counter(map(id_of, backup.messages)).items() if count > 1]
    assert not set(again) - explained, f"duplicates without a word: {set(again) - explained}"
    assert not [e for e in it.events if e["event"] in {"copy lost", "body missing", "outcomes lost"}]


def fail_over(it: Product, sentinels: SentinelSet, how: str, first: int) -> set[int]:
    """End the master ("kill", "pause") while mail comes in, and bring it back. Return the numbers accepted."""
    sender = Sender(it.smtp_port, range(first, first + 100_000), sessions=6, patience=120).start()

    def goes_on(count: int) -> None:
        before = len(sender.accepted)
        wait_until(lambda: len(sender.accepted) > before + count, 150, lambda: f"mail has stopped:\n{it.log[-3000:]}")

    try:
        goes_on(300)
        old = sentinels.master
        getattr(old, how)()
        sentinels.wait_failover(old)
        goes_on(100)
        if how == "kill":
            old.start()  # as the master that it was: it has heard nothing
        else:
            old.resume()
        goes_on(100)
    finally:
        sender.stop()
    accepted = sender.join()
    sentinels.wait_in_step()
    sentinels.wait_watched()
    return accepted


# Settings ---------------------------------------------------------------------------------------------------------


def test_sentinels_are_written_as_addresses_or_urls_and_their_passwords_are_never_shown() -> None:
    """A port may be left out, a URL has password and TLS; neither listings nor errors nor findings show a secret."""
    given = "s1,redis://u:geheim@[::1]:1,rediss://:geheim@127.0.0.1:1?ssl_ca_certs=/none"
    settings = load({"relay.destination_primary": "old.example.com", "redis.sentinels": given}, {}, ())
    assert settings.redis.url == "redis://"
    assert settings.redis.sentinel_addresses == ("s1:26379", "[::1]:1", "127.0.0.1:1")
    assert settings.redis.sentinel_urls[2] == "rediss://:geheim@127.0.0.1:1?ssl_ca_certs=/none"
    shown = [*map(str, describe(settings)), *map(str, asyncio.run(probe_redis(settings))), str(settings.redis)]
    assert "geheim" not in "".join(shown)
    for wrong in ("http://geheim@s1", "unix:///geheim", "s1:geheim", "redis://:geheim@"):
        with pytest.raises(SettingsError, match=r"redis\.sentinels: expected Sentinels"):
            load({"relay.destination_primary": "old.example.com", "redis.sentinels": wrong}, {}, ())


# Clients ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(200)
def test_a_kept_connection_never_writes_to_a_master_of_yesterday(sentinels: SentinelSet) -> None:
    """While clients rest the master hangs, is replaced and wakes up, still a master: they write to the new one."""
    server = settings_for(sentinels).redis
    old = sentinels.master
    told = old.client()
    with clients.sync_client(server, 5) as sync, asyncio.Runner() as runner:
        connection, other = clients.async_client(server, 5), clients.async_client(server, 5)
        wires, batch = Pipelines(other), CommandBatch()
        batch.add(("APPEND", "c", "x"))
        sync.set("a", "before")
        runner.run(connection.set("b", "before"))
        assert runner.run(wires.ask(batch)) == [1]
        told.set("mark", "")
        assert told.wait(1, 30_000) == 1, "the replica has what was written"
        told.config_set("appendfsync", "no")  # so that it answers at once when it wakes up
        old.pause()
        new = sentinels.wait_failover(old)
        old.resume()
        assert told.role()[0] == "master"
        sync.set("a", "after")
        runner.run(connection.set("b", "after"))
        assert runner.run(wires.ask(batch)) == [2]
        with new.client() as client:
            assert client.mget("a", "b", "c") == ["after", "after", "xx"]
        for each in (connection, other):
            runner.run(each.aclose())
    told.close()


@pytest.mark.timeout(200)
def test_a_script_that_meets_a_replica_moves_on_to_the_master(sentinels: SentinelSet) -> None:
    """READONLY within a MULTI is no answer: the connection to the demoted server ends, the change is made."""
    server = settings_for(sentinels).redis
    old = sentinels.master

    async def change() -> None:
        client = clients.async_client(server, 5)
        await client.zadd(keys.STAGED, {"one": 1})
        new = sentinels.replica
        with old.client() as here, new.client() as there:  # by hand: no Sentinel closes the clients' connections
            there.replicaof("NO", "ONE")
            here.replicaof("127.0.0.1", str(new.port))
        told: list[RedisError] = []

        async def is_done() -> bool:
            try:
                async with client.pipeline(transaction=True) as pipe:
                    changes.discard(pipe, ["one"])
                    await pipe.execute()
            except RedisError as error:
                told.append(error)
                return False
            return True

        assert not await is_done()
        sentinels.name_master(new)
        while not await is_done():
            await asyncio.sleep(0.1)
        assert not [error for error in told if isinstance(error, ReadOnlyError)]
        await client.aclose()

    asyncio.run(change())


@pytest.mark.timeout(200)
def test_a_wire_that_meets_a_replica_moves_on_to_the_master(sentinels: SentinelSet) -> None:
    """READONLY, plain or within a MULTI, is no answer to what goes past redis-py's parser, either."""
    server = settings_for(sentinels).redis
    old, new = sentinels.master, sentinels.replica

    async def change() -> None:
        client = clients.async_client(server, 5)
        wires = Pipelines(client)
        plain, multi = CommandBatch(), CommandBatch()
        plain.eval("return redis.call('SET', 'a', 'after')", 0)
        multi.transaction([("EVAL", "return redis.call('SET', 'b', 'after')", 0)])
        assert await asyncio.gather(wires.ask(plain), wires.ask(multi)) == [[b"OK"], [[b"OK"]]]
        with old.client() as here, new.client() as there:  # by hand: no Sentinel closes the clients' connections
            there.replicaof("NO", "ONE")
            there.flushall()
            here.replicaof("127.0.0.1", str(new.port))
            for batch in (plain, multi):
                with pytest.raises(NoConnection):
                    await wires.ask(batch)
            sentinels.name_master(new)
            for batch in (plain, multi):
                while True:
                    try:
                        await wires.ask(batch)
                        break
                    except NoConnection:  # until the next query
                        await asyncio.sleep(0.1)
            assert there.mget("a", "b") == ["after", "after"]
        await client.aclose()

    asyncio.run(change())


def test_a_write_that_no_replica_has_does_not_count(sentinels: SentinelSet) -> None:
    """A confirmed transaction waits for its replica: without one it fails in time, also when it repeats a change."""
    server = settings_for(sentinels, redis__replicas="1").redis

    async def write() -> None:
        client = clients.async_client(server, 5, confirmed=True)

        async def discard() -> list[object]:
            async with client.pipeline(transaction=True) as pipe:
                changes.discard(pipe, ["nobody"])
                return list(await pipe.execute())

        assert await discard() == [0]
        sentinels.replica.pause()
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(TooFewReplicas):
                await discard()
        assert time.monotonic() - started < 20
        for replica in sentinels.servers:
            replica.resume()
        await until_confirmed(discard)
        await client.aclose()

    async def until_confirmed(discard: Callable[[], Awaitable[list[object]]]) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                await discard()
            except RedisError:
                assert time.monotonic() < deadline
            else:
                return

    asyncio.run(write())


# check ------------------------------------------------------------------------------------------------------------


async def found(settings: Settings) -> dict[str, str]:
    """Return the trouble that `check` finds."""
    return {f.subject: f.text for f in await probe_redis(settings) if not f.ok}


@pytest.mark.timeout(200)
async def test_check_names_what_a_failover_would_miss(sentinels: SentinelSet) -> None:
    """Each trouble is one line that says what to do: Sentinels, service, replicas and their settings."""
    good = settings_for(sentinels, redis__replicas="1")
    assert await found(good) == {}
    assert "set it to the number of replicas" in (await found(settings_for(sentinels)))["redis failover"]
    wrong = await found(settings_for(sentinels, redis__service="pots", redis__replicas="1"))
    assert f"set redis.service to one that it knows: {SERVICE}" in wrong[f"sentinel {sentinels.sentinels[0].address}"]
    assert "pots" in wrong["redis"]
    with sentinels.replica.client() as replica:
        replica.config_set("appendfsync", "everysec")
    text = (await found(good))[f"replica {sentinels.replica.address} appendfsync"]
    assert text.startswith("is everysec; set `appendfsync always`")
    sentinels.sentinels[2].stop()
    text = (await found(good))[f"sentinel {sentinels.sentinels[2].address}"]
    assert "a failover needs most of them" in text
    sentinels.replica.stop()
    wrong = await found(good)
    assert wrong["redis replicas"].startswith("no replica is connected to the master; start or mend one")
    assert f"replica {sentinels.replica.address}" in wrong


# The whole --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize("refuses", [False, True])
def test_without_a_replica_copies_go_to_the_spool_and_come_back_once(
    product: Callable[..., Product],
    sentinels: SentinelSet,
    primary: ScriptedServer,
    backup: ScriptedServer,
    refuses: bool,
) -> None:
    """Mail goes on while the replica is away, written short or (min-replicas-to-write) refused; then each copy once."""
    it = started(product, sentinels, primary, backup)
    assert it.send("a@example.com", "b@example.com", data=b"Subject: 1\r\n\r\nx\r\n").startswith("250")
    backup.wait_for(1)
    gone = sentinels.replica
    if refuses:
        with sentinels.master.client() as client:
            client.config_set("min-replicas-max-lag", 1)
            client.config_set("min-replicas-to-write", 1)
    gone.kill()
    for number in range(2, 6):
        data = b"Subject: %d\r\n\r\nx\r\n" % number
        assert it.send("a@example.com", "b@example.com", data=data).startswith("250")
    assert len([e for e in it.events if e["event"] == "spooled"]) == 4
    status, text = it.get("/readyz")
    assert status == 200, text
    assert "redis replicas" in text
    gone.start()
    wait_until(lambda: {number_of(t) for t in backup.messages} == set(range(1, 6)), 60, lambda: it.log[-3000:])
    wait_until(lambda: it.summary(backup.address)["pending"] == 0, 60, "copies stay pending", 0.5)
    assert len(backup.messages) == len(primary.messages) == 5
    assert it.stop() == 0


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["kill", "pause"])
def test_what_was_accepted_survives_the_end_of_the_master(
    product: Callable[..., Product],
    sentinels: SentinelSet,
    primary: ScriptedServer,
    backup: ScriptedServer,
    how: str,
) -> None:
    """Twice in a row the master ends under load: accepted mail is at primary and backup, repeats are explained."""
    it = started(product, sentinels, primary, backup)
    accepted = fail_over(it, sentinels, how, 0)
    accepted |= fail_over(it, sentinels, how, 1_000_000)
    audit(it, accepted, primary, backup)
    assert it.stop() == 0
