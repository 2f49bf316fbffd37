"""Redis down, hanging, full, and the disk too: the primary leg goes on, and every copy arrives once."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis
import redis.asyncio

from relay.ledger import keys
from relay.ledger.changes import Released
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail.envelope import Envelope
from relay.mail.ids import IdSource
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from relay.redisio import embedded
from relay.smtpd import staging
from relay.smtpd.staging import NotDurable, Staging
from relay.spool import writer
from relay.spool.writer import Spool
from support import documents
from support.dialogue import Dialogue
from support.drained import is_drained
from support.ledger_contents import Contents
from support.product import QUICK, SOON, Product
from support.redis_servers import RedisServer
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import PATIENCE, until, wait_until

WAITS = SOON
HASTE = {"relay.daemon.ledger_redis._SPOOL_PATIENCE": 0.3}  # for a Redis that is not there

SETTINGS = {
    **QUICK,
    "relay.timeout_seconds": "5",
    "relay.final_timeout_seconds": "10",
    "relay.uncertain_hold": "2",
    "redis.timeout_seconds": "1",
}


# One process ----------------------------------------------------------------------------------------------------


class Process:
    """The durable side of one relay process, on a Redis of its own."""

    def __init__(
        self,
        folder: Path,
        server: RedisServer,
        *,
        with_spool: bool = True,
        seconds: float = 0.5,
        awaits_release: bool = True,
    ) -> None:
        self.server = server
        self.folder = folder
        self.ids = IdSource()
        self.async_client = redis.asyncio.Redis.from_url(server.url, socket_timeout=2, retry=None)
        self.client = server.client()
        self.watch = Monitor(self.async_client, seconds=0.5)
        self.dispatcher = Dispatcher(self.async_client)
        self.spool = Spool(folder, self.ids.owner) if with_spool else None
        self.ledger = Contents(self.client)
        self.staging = Staging(
            self.async_client,
            self.async_client,
            self.dispatcher,
            self.watch,
            stage_seconds=seconds,
            deadline_seconds=600,
            hold_seconds=3600,
            spool=self.spool,
            awaits_release=awaits_release,
        )

    def message(self, size: int = 10) -> Message:
        body = os.urandom(size)
        envelope = Envelope(self.ids.next(), "a@test", (Recipient("b@test"),), 0.0, len(body), destinations=("new",))
        return Message(envelope, body)

    async def stage(self, size: int = 10) -> Released:
        message = self.message(size)
        await self.staging.stage(message)
        return Released(message.envelope.id, ("new",))

    async def is_well(self) -> None:
        """Look until Redis is seen to be well."""
        async with asyncio.timeout(PATIENCE):
            while self.watch.is_down:
                await self.watch.look()

    def names(self) -> list[str]:
        return sorted(e.state for e in writer.scan(self.folder)) if writer.messages(self.folder).exists() else []

    def staged(self) -> list[str]:
        return [i.decode() for i in self.client.zrange(keys.STAGED, 0, -1)]

    async def close(self) -> None:
        await self.dispatcher.drain()
        if self.spool:
            await self.spool.close()
        await self.async_client.aclose()
        self.client.close()


@pytest.fixture
async def make(tmp_path: Path, redis_factory: Callable[..., RedisServer]) -> AsyncIterator[Callable[..., Process]]:
    made: list[Process] = []

    def start(*, with_spool: bool = True, seconds: float = 0.5, awaits_release: bool = True, **options: str) -> Process:
        server = redis_factory(**options)
        process = Process(
            tmp_path / "spool", server, with_spool=with_spool, seconds=seconds, awaits_release=awaits_release
        )
        made.append(process)
        return process

    yield start
    for process in made:
        await process.close()


async def test_only_the_first_waits_for_a_redis_that_hangs(make: Callable[..., Process]) -> None:
    """One time-out opens the circuit; while it is open nobody waits; a look that could write closes it."""
    process = make()
    await process.watch.look()
    process.server.pause()
    await process.staging.release(await process.stage())
    assert process.watch.is_down
    begun = time.monotonic()
    for _ in range(60):
        await process.staging.release(await process.stage())
    assert time.monotonic() - begun < 15  # of the thirty seconds if each waited
    assert process.names() == ["ready"] * 61
    await process.watch.look()
    assert process.watch.is_down
    process.server.resume()
    await process.is_well()
    await process.staging.release(await process.stage())
    assert len(process.ledger.pending_ids()) == 1


async def test_a_refusal_while_redis_hangs(make: Callable[..., Process], monkeypatch: pytest.MonkeyPatch) -> None:
    """A message whose stage got no answer, and that the primary refused, is gone, however late it was written."""
    monkeypatch.setattr(staging, "_LATE_SECONDS", 0.2)
    process = make()
    process.server.pause()
    released = await process.stage()
    process.staging.discard(released.id)
    await until(lambda: process.names() == ["discard"])
    process.server.resume()
    await until(lambda: process.names() == [], timeout=30)
    assert process.staged() == []
    assert not process.ledger.has_body(released.id)


async def test_an_acceptance_while_redis_hangs(make: Callable[..., Process]) -> None:
    """What is staged in Redis and accepted is noted, so that a crash now costs no time, until Redis knows."""
    process = make()
    released = await process.stage()
    process.server.pause()
    await process.staging.release(released)
    assert process.names() == ["release"]
    process.server.resume()
    await until(lambda: process.names() == [])
    assert process.ledger.pending_ids() == [released.id]
    await until(lambda: released.id in [i for ids in process.ledger.queued().values() for i in ids])


async def test_a_release_that_is_only_sent(make: Callable[..., Process]) -> None:
    """Without awaits_release a release returns once it is sent; what gets no answer is noted and repeated as ever."""
    process = make(awaits_release=False, seconds=2.0)
    first, second = await process.stage(), await process.stage()
    process.server.pause()
    await process.staging.release(first)
    assert not process.staging._small._unanswered[0].done.done()
    await until(lambda: process.names() == ["release"], timeout=30)  # after the time-out, for a crash to come
    process.server.resume()
    await until(lambda: process.ledger.pending_ids() == [first.id] and process.names() == [])
    await until(lambda: first.id in [i for ids in process.ledger.queued().values() for i in ids])
    await process.is_well()
    await process.staging.release(second)
    await process.staging.drain()
    assert sorted(process.ledger.pending_ids()) == sorted((first.id, second.id))


async def test_uncertain_while_redis_is_down(make: Callable[..., Process]) -> None:
    """No reply to the dot, and the message in the spool: it waits there as uncertain."""
    process = make()
    process.server.stop()
    released = await process.stage()
    process.staging.hold(released.id, "")
    await until(lambda: process.names() == ["held"])


async def test_a_stage_that_was_given_up_is_not_done_later(make: Callable[..., Process]) -> None:
    """What has not left when its time is over stays here: only what is on its way is in doubt."""
    process = make()
    process.server.pause()
    await asyncio.gather(*(process.stage() for _ in range(10)))  # two groups leave at most
    late = [process.stage() for _ in range(10)]
    await asyncio.gather(*late)
    process.server.resume()
    await process.is_well()
    await process.staging.drain()
    assert len(process.staged()) <= 10
    assert process.names() == ["staged"] * 20


async def test_nowhere_to_put_it(make: Callable[..., Process]) -> None:
    """Without a spool, or with one that cannot be written, a Redis that is down is NotDurable, at once when known."""
    process = make(with_spool=False)
    process.server.stop()
    for _ in range(2):
        with pytest.raises(NotDurable, match=r"ConnectionError.*there is none"):
            await process.stage()
    assert process.watch.is_down


async def test_the_spool_takes_what_a_full_redis_should_not(make: Callable[..., Process]) -> None:
    """Over 75 % of maxmemory new bodies go to the spool, until it is under 70 %; own octets in flight count."""
    process = make(maxmemory="16mb", seconds=PATIENCE)  # a disk may be busy
    await process.watch.look()
    stages = [asyncio.ensure_future(process.stage(1 << 20)) for _ in range(20)]
    await asyncio.gather(*stages)
    assert 4 <= len(process.staged()) <= 12
    assert len(process.names()) == 20 - len(process.staged())
    used = process.client.info("memory")["used_memory"]
    assert used < 0.85 * (16 << 20)
    await process.watch.look()
    before = len(process.names())
    await process.stage()
    assert len(process.names()) == before + 1
    for message_id in process.staged()[:4]:
        process.staging.discard(message_id)
    await until(lambda: len(process.staged()) <= 20 - before - 4)
    await process.watch.look()
    await process.stage()
    assert len(process.names()) == before + 1


async def test_a_full_redis_is_better_than_nothing(make: Callable[..., Process]) -> None:
    """Where the spool cannot take it, some of the last quarter is used; what Redis needs to deliver stays free."""
    process = make(with_spool=False, maxmemory="16mb")
    await process.watch.look()
    for _ in range(10):
        await process.stage(1 << 20)
    with pytest.raises(NotDurable):
        await process.stage(2 << 20)


async def test_a_redis_that_only_reads(make: Callable[..., Process]) -> None:
    """One that answers but refuses writes is down: a look tries to write."""
    process = make()
    process.client.config_set("maxmemory", "1")
    await process.stage()
    assert process.names() == ["staged"]
    await process.watch.look()
    assert process.watch.is_down
    process.client.config_set("maxmemory", "0")
    await process.is_well()


# The whole product ----------------------------------------------------------------------------------------------


def numbers(server: ScriptedServer) -> Counter[int]:
    return Counter(int(m.header("Subject") or -1) for m in server.messages)


def all_arrive(relay: Product, backup: ScriptedServer, accepted: set[int]) -> None:
    """Wait until every accepted message has come and the spool is empty."""

    def done() -> bool:
        return (spooled(relay) == 0 and accepted <= set(numbers(backup))) or is_drained(relay)

    def missing() -> str:
        return f"{spooled(relay)} spooled, missing {sorted(accepted - set(numbers(backup)))}\n{relay.log[-4000:]}"

    wait_until(done, 120, missing)
    assert accepted <= set(numbers(backup)), missing()
    assert spooled(relay) == 0


def each_once(relay: Product, backup: ScriptedServer, accepted: set[int]) -> None:
    """Wait until every accepted message has come; then none may have come twice."""
    all_arrive(relay, backup, accepted)
    assert {number: count for number, count in numbers(backup).items() if count > 1} == {}


def spooled(relay: Product) -> int:
    return writer.summary(relay.state_dir / "spool").messages


@pytest.mark.timeout(300)
@pytest.mark.parametrize("outage", ["stop", "kill", "pause"])
def test_redis_fails_under_traffic(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
    outage: str,
) -> None:
    """The primary leg goes on and accepts all; when Redis is back each copy arrives once, and the spool is empty."""
    server = redis_factory()
    relay = product(primary=primary.address, backups=[backup.address], redis_url=server.url, settings=SETTINGS)
    sender = Sender(relay.smtp_port, range(300), sessions=5).start()
    wait_until(lambda: len(sender.accepted) > 60)
    getattr(server, outage)()
    assert sender.join() == set(range(300))
    assert Counter(sender.attempts.values()) == {1: 300}
    assert spooled(relay) > 100
    assert relay.metric("smtpdup_spool_messages") > 100
    if outage != "pause":
        shown = relay.run("queue", "summary")
        assert "This host's spool: " in shown.stdout
        assert "no Redis" in shown.stderr
    if outage == "pause":
        server.resume()
    else:
        server.start()
    each_once(relay, backup, sender.accepted)
    assert relay.stop() == 0


@pytest.mark.timeout(300)
def test_the_relay_is_killed_while_redis_is_down(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
) -> None:
    """What got our 2xx is in the spool, and the relay that comes after it, with Redis still down, moves it in."""
    server = redis_factory()
    relay = product(primary=primary.address, backups=[backup.address], redis_url=server.url, settings=SETTINGS)
    relay.waits |= HASTE
    sender = Sender(relay.smtp_port, range(200), sessions=5).start()
    wait_until(lambda: len(sender.accepted) > 50)
    server.stop()
    wait_until(lambda: spooled(relay) > 50)
    relay.kill()
    relay.start(wait=False)
    assert sender.join() == set(range(200))
    server.start()
    all_arrive(relay, backup, sender.accepted)
    for number, count in numbers(backup).items():
        assert count <= numbers(primary)[number] or "may repeat" in relay.log or "uncertain" in relay.log


@pytest.mark.timeout(300)
def test_start_without_redis(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
) -> None:
    """With a spool, `up` and `relay` start while Redis is away; a stop then loses nothing either."""
    server = redis_factory()
    server.stop()
    relay = product(
        command="relay",
        primary=primary.address,
        backups=[backup.address],
        redis_url=server.url,
        settings=SETTINGS,
        waits=HASTE,
        start=False,
    ).start(wait=False)
    relay.wait_for_log("relay started")
    assert relay.send("a@example.com", "b@example.com").startswith("250")
    assert relay.stop() == 0
    assert spooled(relay) == 1
    again = product(primary=primary.address, backups=[backup.address], redis_url=server.url, waits=HASTE, start=False)
    again.settings |= {**SETTINGS, "state_dir": str(relay.state_dir)}
    again.start(wait=False)
    again.wait_for_log("relay started")
    assert again.send("a@example.com", "c@example.com").startswith("250")
    assert spooled(relay) == 2
    server.start()
    assert {m.recipients[0] for m in backup.wait_for(2, 60)} == {"b@example.com", "c@example.com"}
    wait_until(lambda: spooled(relay) == 0)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_backlog_of_ten_times_the_memory(
    product: Callable[..., Product],
    primary: ScriptedServer,
    scripted: Callable[..., ScriptedServer],
    redis_factory: Callable[..., RedisServer],
) -> None:
    """8 MB of Redis, a backup that is away, 80 MB of mail: the primary takes it all, and so does the backup later."""
    server = redis_factory(maxmemory="8mb")
    backup = scripted()
    backup.down()
    relay = product(primary=primary.address, backups=[backup.address], redis_url=server.url, settings=SETTINGS)
    with Dialogue(relay.smtp_port) as client:
        client.hello()
        for number in range(400):
            text = os.urandom(100_000).hex().encode()
            lines = b"\r\n".join(text[i : i + 900] for i in range(0, len(text), 900))
            client.mail("a@example.com", "b@example.com", data=b"Subject: %d\r\n\r\n%s\r\n" % (number, lines))
        client.quit()
    assert spooled(relay) > 300
    assert server.client().info("memory")["used_memory"] < 0.9 * (8 << 20)
    backup.listen()
    relay.run("queue", "flush")
    each_once(relay, backup, set(range(400)))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("required", [False, True])
def test_redis_down_and_the_disk_full(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
    small_disk: Callable[[int], Path],
    required: bool,
) -> None:
    """relay.require_durable_copies decides: the primary's answer stands and the loss is logged, or it is 451."""
    disk = small_disk(3)
    server = redis_factory()
    settings = {
        **SETTINGS,
        "spool.dir": str(disk / "spool"),
        "spool.min_free": "1M",
        "relay.require_durable_copies": str(required).lower(),
    }
    relay = product(primary=primary.address, backups=[backup.address], redis_url=server.url, settings=settings)
    server.stop()
    text = b"Subject: %d\r\n\r\n" + b"\r\n".join([os.urandom(30).hex().encode() for _ in range(3000)])
    replies = []
    with Dialogue(relay.smtp_port) as client:
        client.hello()
        for number in range(30):
            for line in ("MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>"):
                client.say(line, 250)
            replies.append(client.body(text % number, "4" if number == 29 and required else ""))
    kept = writer.summary(disk / "spool").messages
    assert 3 < kept < 29
    took = [reply for reply in replies if reply.startswith("250")]
    if required:
        assert len(took) == kept == len(primary.messages)
        assert replies[-1].startswith("451 4.3.1")
    else:
        assert len(took) == 30 == len(primary.messages)
        lost = [e for e in relay.events if e["event"] == "copy lost"]
        assert len(lost) == 30 - kept
        assert relay.metric("smtpdup_copies_lost_total") == 30 - kept
        reasons = {e["id"]: e["reason"] for e in relay.events if e["event"] == "not durable"}
        assert all("min_free" in reasons[e["id"]] for e in lost)
    server.start()
    backup.wait_for(kept)
    wait_until(lambda: writer.summary(disk / "spool").messages == 0)


@pytest.mark.timeout(300)
def test_the_spool_of_killed_processes(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
) -> None:
    """Relay processes that are killed leave their spool to their successors, readable by nobody else."""
    server = redis_factory()
    relay = product(
        primary=primary.address,
        backups=[backup.address],
        redis_url=server.url,
        settings={**SETTINGS, "smtp.processes": "2"},
    )
    server.stop()
    sender = Sender(relay.smtp_port, range(50), sessions=8).start()
    assert sender.join() == set(range(50))
    for path in (relay.state_dir / "spool").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    owners = [e for e in relay.events if e["event"] == "relay started"]
    for event in owners:
        os.kill(event["pid"], signal.SIGKILL)
    server.start()
    each_once(relay, backup, sender.accepted)
    wait_until(lambda: len(list((relay.state_dir / "spool" / "owners").iterdir())) == 2)


def test_a_damaged_log_of_the_embedded_redis_stops_no_mail(
    product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer, tmp_path: Path
) -> None:
    """Mail goes on by way of the spool, one line says why; mended as the page says, all arrives without a restart."""
    (block,) = documents.of("mend-redis")
    site = product(primary=primary.address, backups=[backup.address], settings=SETTINGS)
    site.send("a@example.com", "b@example.com")
    backup.wait_for(1)
    site.stop()
    data = embedded.folder(site.state_dir) / "appendonlydir"
    (newest,) = data.glob("*.incr.aof")
    before = newest.read_bytes()
    newest.write_bytes(before + b"*this is no command\r\n" * 10 + before)
    site.start()
    assert site.send("c@example.com", "d@example.com").startswith("250")
    assert len(primary.messages) == 2
    assert site.log.count("the embedded Redis cannot be started: mail goes on") == 1
    assert "Bad file format" in site.log
    assert newest.read_bytes().startswith(before)
    commands = block.text.replace("/var/lib/smtp-dup/redis", str(data.parent)).replace("/var/backups", str(tmp_path))
    subprocess.run(["sh", "-ec", commands], check=True, capture_output=True)
    assert (tmp_path / f"{newest.name}.damaged").exists()
    wait_until(lambda: len(backup.messages) == 2, 60, lambda: site.log[-4000:])
    assert site.stop() == 0
