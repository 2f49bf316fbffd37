"""The probes: every setting that could lose a copy is named, and no probe raises or hangs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from relay.config.loader import Settings, load
from relay.ledger.audit import Act
from relay.ledger.monitor import Monitor
from relay.mail.destination import Destination
from relay.mail.timeouts import Timeouts
from relay.monitoring.probe_result import ProbeResult
from relay.monitoring.probes import probe_all, probe_destination, probe_redis
from relay.redisio import embedded, versions
from relay.redisio.clients import async_client
from relay.routing import moved_copy
from relay.topology import moving
from relay.topology.moved import MovedEntry
from support.certificates import Certificate
from support.reactions import Silence
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer


def settings_for(url: str, **flags: str) -> Settings:
    return load({"redis.url": url} | flags, {}, (), require_primary=False)


async def probed(destination: Destination, timeout: float = 5) -> ProbeResult:
    return await probe_destination(destination, local_hostname="relay.example", timeouts=Timeouts.of(timeout))


def _damaged_note(folder: Path) -> None:
    (folder / "map.json").write_bytes(b'{"state"')


def _another_type(folder: Path) -> None:
    (folder / "map.json").write_bytes(b"[1, 2]")


def _cut_off(folder: Path) -> None:
    (file,) = folder.glob("*.db")
    file.write_bytes(file.read_bytes()[:5000])


def _rubbish(folder: Path) -> None:
    (file,) = folder.glob("*.db")
    file.write_bytes(b"rubbish" * 1000)


def _gone(folder: Path) -> None:
    (file,) = folder.glob("*.db")
    file.unlink()


def _no_file(folder: Path) -> None:
    (folder / "map.json").unlink()
    (folder / "map.json").mkdir()


@pytest.mark.parametrize("damage", [_damaged_note, _another_type, _cut_off, _rubbish, _gone, _no_file])
async def test_a_damaged_copy_of_who_has_moved_is_told(
    redis_client: redis.Redis,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    """One line that says what to do; nothing where the copy is whole, or there is none."""
    settings = settings_for(redis_url, state_dir=str(tmp_path))

    async def said() -> list[str]:
        return [f.text for f in await probe_all(settings) if f.subject == "copy of who has moved" and not f.ok]

    assert await said() == []
    moved = {f"u{n}@a.example": MovedEntry("new", 1.0, "ann", "note " * 10) for n in range(300)}
    moving.commit(redis_client, moved, {}, 0, Act("move"))
    monkeypatch.setattr(moved_copy, "_MOST_CHANGES", 10)  # so that there is a file of them
    held, trouble = moved_copy.follow(redis_client, tmp_path, moved_copy.NOBODY)
    assert (len(held), trouble) == (300, "")
    assert await said() == []
    damage(tmp_path / "moved")
    (text,) = await said()
    assert "\n" not in text
    assert "the next move, or a start that reaches Redis, writes it anew" in text


async def test_a_durable_redis_is_in_order(redis_url: str) -> None:
    """The settings of the embedded Redis pass."""
    findings = await probe_redis(settings_for(redis_url))
    assert [finding.subject for finding in findings] == [
        "redis",
        "redis appendonly",
        "redis appendfsync",
        "redis no-appendfsync-on-rewrite",
        "redis maxmemory-policy",
    ]
    assert all(finding.ok for finding in findings), findings
    assert " ms, " in findings[0].text


async def test_each_setting_that_loses_copies_is_named(redis_factory: Callable[..., RedisServer]) -> None:
    """Every wrong setting is a finding that says what to set."""
    server = redis_factory(
        appendonly="no", appendfsync="everysec", no_appendfsync_on_rewrite="yes", maxmemory_policy="allkeys-lru"
    )
    first, *others = await probe_redis(settings_for("redis://nobody.invalid"), server.url)
    assert first.ok
    assert not any(finding.ok for finding in others)
    assert [finding.text.partition(",")[0] for finding in others] == [
        "is no; set `appendonly yes`",
        "is everysec; set `appendfsync always`",
        "is yes; set `no-appendfsync-on-rewrite no`",
        "is allkeys-lru; set `maxmemory-policy noeviction`",
    ]


async def test_a_redis_that_hides_its_settings(redis_factory: Callable[..., RedisServer]) -> None:
    """A refused CONFIG GET is said to be unverified, and is not called in order."""
    server = redis_factory()
    with server.client() as client:
        client.acl_setuser("guest", enabled=True, passwords="+hunter2", commands=["+@all", "-config"], keys=["*"])
    url = server.url.replace("unix://", "unix://guest:hunter2@")
    first, *others = await probe_redis(settings_for(url))
    assert first.ok
    assert not any(finding.ok for finding in others)
    assert all(finding.text.startswith("cannot be verified, CONFIG GET is refused") for finding in others)
    (wrong,) = await probe_redis(settings_for(url.replace("hunter2", "hunter3")))
    assert not wrong.ok
    assert "cannot be used: invalid username-password pair" in wrong.text
    assert "hunter" not in repr([first, *others, wrong])


async def test_a_redis_that_wants_a_password(redis_factory: Callable[..., RedisServer]) -> None:
    """It is said in words of the settings, by the probe and by the relay that cannot write there."""
    server = redis_factory()
    with server.client() as client:
        client.config_set("requirepass", "hunter2")
        (wrong,) = await probe_redis(settings_for(server.url))
        connection = async_client(settings_for(server.url).redis, 5)
        watch = Monitor(connection, seconds=5)
        await watch.look()
        await connection.aclose()
        client.config_set("requirepass", "")  # whoever stops it has none
    assert wrong.text.endswith("cannot be used: it wants a password, and redis.url has none")
    assert watch.objection(0).endswith("it wants a password, and redis.url has none")


async def test_a_redis_that_is_not_there() -> None:
    """No server, no answer and no URL are three different findings."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = f"redis://:hunter2@127.0.0.1:{port}"
        (finding,) = await probe_redis(settings_for(url, **{"redis.timeout_seconds": "0.1"}))
        assert (finding.ok, finding.text) == (False, f"redis://:***@127.0.0.1:{port} does not answer within 0.1 s")
    (finding,) = await probe_redis(settings_for(url))
    assert not finding.ok
    assert finding.text.startswith(f"redis://:***@127.0.0.1:{port} cannot be used: ")
    program = embedded.find_server()
    version = versions.of(program)
    assert await probe_redis(settings_for("")) == [
        ProbeResult("redis", True, f"redis.url is not set: `smtp-dup up` starts an embedded one, {program} ({version})")
    ]
    (finding,) = await probe_redis(settings_for("", **{"redis.program": "/nowhere/redis"}))
    assert (finding.ok, finding.text) == (False, "redis.program: /nowhere/redis is no program that can be run here")


async def test_a_read_only_replica_is_no_use(redis_factory: Callable[..., RedisServer]) -> None:
    """A replica answers PING, and could not keep a single copy."""
    server = redis_factory()
    with server.client() as client:
        client.replicaof("127.0.0.1", "1")
    first, *_ = await probe_redis(settings_for(server.url))
    assert not first.ok
    assert first.text.endswith("but it is a read-only replica; name the master")


async def test_a_plain_server(primary: ScriptedServer) -> None:
    """A server without TLS is in order, and the finding says what it offers and that mail goes there in plain text."""
    finding = await probed(primary.destination())
    assert finding.ok
    assert finding.text.startswith(f"{primary.address} answers in ")
    assert "plain text" in finding.text
    assert "PIPELINING" in finding.text
    await primary.until(lambda: "QUIT" in primary.commands)


@pytest.mark.parametrize("implicit_tls", [False, True])
async def test_tls(scripted: Callable[..., ScriptedServer], certificate: Certificate, implicit_tls: bool) -> None:
    """The finding names the TLS version, and whether the certificate is good, also where nobody checks it."""
    server = scripted(tls=certificate.server_context(), implicit_tls=implicit_tls)
    trusted = await probed(server.destination(tls="verify", host="localhost", ca_file=str(certificate.certificate)))
    assert trusted.ok
    assert "; TLSv1.3, certificate verified; " in trusted.text
    unchecked = await probed(server.destination(tls="encrypt"))
    assert unchecked.ok
    assert "TLSv1.3, certificate not checked (it would not pass tls=verify: certificate not accepted" in unchecked.text
    refused = await probed(server.destination(tls="verify"))
    assert not refused.ok
    assert "certificate not accepted" in refused.text


async def test_a_server_that_cannot_be_used(scripted: Callable[..., ScriptedServer]) -> None:
    """A refusal, a silence and a closed port each say at what stage it went wrong."""
    refusing = await probed(scripted({"CONNECT": "554 5.7.1 go away"}).destination())
    assert not refusing.ok
    assert refusing.text.endswith("greeting: refused (554 5.7.1 go away)")
    silent = await probed(scripted({"EHLO": Silence()}).destination(), timeout=0.1)
    assert not silent.ok
    assert silent.text.endswith("cannot be used: EHLO: no answer in time")
    server = scripted()
    server.down()
    closed = await probed(server.destination("new"))
    assert closed == ProbeResult("new", False, f"{server.address} cannot be used: connect: Connection refused")


async def test_everything_at_once(redis_url: str, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """`smtp-dup check` probes Redis, the primary and every backup, and one that is down hides none of the others."""
    flags = {"relay.destination_primary": primary.address, "relay.destination_backups": f"{backup.address},[::1]:1"}
    async with asyncio.timeout(20):
        findings = await probe_all(settings_for(redis_url, **flags))
    others = [finding for finding in findings if not finding.subject.startswith("redis")]
    assert [finding.subject for finding in others] == ["primary", f"backup {backup.address}", "backup [::1]:1"]
    assert [finding.ok for finding in others] == [True, True, False]
