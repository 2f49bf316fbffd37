"""The limit of open files: what does not fit is turned away in words, and never costs a copy."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as NoConnection

from relay import limits
from relay.spool.writer import Spool
from support.dialogue import Dialogue
from support.product import SOON, Product
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

Make = Callable[..., Product]


def limited(product: Product, files: int) -> Product:
    """Start a product under this hard limit, as from a shell with ``ulimit -n``."""
    argv = product._argv

    def under(*words: str) -> list[str]:
        return ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *argv(*words)]

    product._argv = under
    return product.start()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("limit", [100, 128, 256, 1024, 4096, 20_000, 1 << 20])
@pytest.mark.parametrize("wanted", [4, 100, 1000, 50_000])
def test_what_fits_leaves_the_reserve(limit: int, wanted: int, processes: int) -> None:
    """A process full of clients, each with one connection to the primary, and a full queue of others: all fit."""
    fit = limits.relay_fit(limit, wanted, processes, 1)
    share = -(-fit.clients // processes)
    backlog = fit.backlog if fit.clients < wanted or fit.clients_here < wanted else 0
    assert fit.clients_here + share + backlog + limits.RESERVE <= limit
    assert min(wanted, 8) <= fit.clients <= wanted
    # A process under the same limit finds the same.
    assert limits.relay_fit(limit, fit.clients, processes, 1).clients == fit.clients


@pytest.mark.parametrize("limit", [16, 64])
def test_a_limit_that_is_too_low(limit: int) -> None:
    """It is told what is needed and how."""
    with pytest.raises(
        limits.TooLow, match=rf"^the limit of open files is {limit}, and at least \d+ are needed: raise"
    ):
        limits.relay_fit(limit, 1000, 2, 1)
    with pytest.raises(limits.TooLow):
        limits.worker_connections(16, 20)
    assert limits.worker_connections(64, 20) == 20
    assert 0 < limits.worker_connections(40, 20) < 20


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (OSError(errno.EMFILE, ""), True),
        (OSError(errno.ENFILE, ""), True),
        (OSError(errno.ENOMEM, ""), True),
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (socket.gaierror(socket.EAI_SYSTEM, ""), True),
        (socket.gaierror(socket.EAI_NONAME, ""), False),
        (OSError(errno.ENOSPC, ""), False),
        (OSError(errno.EROFS, ""), False),
        (ConnectionRefusedError(errno.ECONNREFUSED, ""), False),
        (TimeoutError(), False),
    ],
)
def test_whose_trouble_it_is(error: BaseException, own: bool) -> None:
    """Ours is told from the disk's and the server's, also where redis-py has wrapped it."""
    assert limits.is_own(error) is own
    wrapped = NoConnection("redis-py's words")
    wrapped.__context__ = error  # it raises within an except
    assert limits.is_own(wrapped) is own


def test_a_thread_that_cannot_be_started_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spool without threads refuses at once, as a disk would, instead of leaving a message waiting."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def write() -> None:
        spool = Spool(tmp_path / "spool", "owner")
        await spool.open()
        spool._pool._max_workers = 2
        monkeypatch.setattr(threading.Thread, "start", refuse)
        async with asyncio.timeout(5):
            results = await asyncio.gather(*(spool.write(f"{n:016}", b"x") for n in range(20)), return_exceptions=True)
            assert all(r is None or isinstance(r, OSError) for r in results)
        monkeypatch.undo()

    asyncio.run(write())


def test_too_low_a_limit_is_one_line(product: Make, primary: ScriptedServer) -> None:
    """Under `ulimit -n 64` the start ends with one line that says what is needed."""
    made = product(primary=primary.address, start=False)
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *made._argv("up")],
        cwd=made.directory,
        env=made.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("smtp-dup: ")]
    assert len(lines) == 1
    assert lines[0].startswith("smtp-dup: the limit of open files is 64, and at least ")


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 4096, reason="needs some hundred clients")
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("files", "away"), [(128, True), (512, False)], ids=["spool", "redis"])
def test_more_clients_than_descriptors(
    product: Make,
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
    files: int,
    away: bool,
) -> None:
    """Whoever hears 250 has a copy: the rest are turned away with 421 or 451, or wait to be taken."""
    server = redis_factory()
    made = product(primary=primary.address, backups=[backup.address], redis_url=server.url, start=False)
    house = limited(made, files)
    assert "smtp.max_connections is cut" in house.log
    if away:
        server.kill()
    heard: list[str] = []
    enough = threading.Event()  # until then whoever was served stays connected
    count = files + files // 2

    def send(number: int) -> None:
        try:
            with house.dialogue(greeting=None, timeout=10) as client:
                heard.append(_talk(client, number))
                enough.wait(60)
        except (OSError, AssertionError):
            heard.append("closed")

    threads = [threading.Thread(target=send, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(heard) == count, 90, lambda: f"{len(heard)} of {count}")
    enough.set()
    for thread in threads:
        thread.join()
    if away:
        server.start()
    # There is room again, and what was accepted arrives.
    wait_until(lambda: _is_served(house))
    wait_until(lambda: len(backup.messages) >= len(primary.messages), 60, lambda: house.log[-3000:])
    assert not [e for e in house.events if e["event"] == "copy lost"]
    assert {m.recipients[0] for m in primary.messages} == {m.recipients[0] for m in backup.messages}
    assert sum(reply.startswith("250") for reply in heard) == len(primary.messages) - 1
    assert any(reply.startswith("421") for reply in heard)
    assert house.stop() == 0


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux: another process's limits")
@pytest.mark.parametrize("required", ["false", "true"])
def test_no_descriptor_is_never_a_copy_lost(
    product: Make,
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
    required: str,
) -> None:
    """Without a descriptor for Redis or the spool: 451 before the primary sees the dot, whatever the settings say."""
    server = redis_factory()
    settings = {"relay.require_durable_copies": required, "redis.timeout_seconds": "1"}
    house = product(primary=primary.address, backups=[backup.address], redis_url=server.url, settings=settings)
    relay = house.child("relay-1").pid
    before = resource.prlimit(relay, resource.RLIMIT_NOFILE)
    with house.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        resource.prlimit(relay, resource.RLIMIT_NOFILE, (3, before[1]))
        server.kill()
        assert client.body(b"Subject: first\r\n\r\n", "").startswith("451 4.3.1")
        resource.prlimit(relay, resource.RLIMIT_NOFILE, before)
        assert not primary.messages
        client.mail("a@example.com", "b@example.com", data=b"Subject: second\r\n\r\n")  # the spool can be used again
        server.start()
    assert [m.header("Subject") for m in primary.messages] == ["second"]
    assert [m.header("Subject") for m in backup.wait_for(1)] == ["second"]
    assert not [e for e in house.events if e["event"] == "copy lost"]
    assert house.stop() == 0


def _talk(client: Dialogue, number: int) -> str:
    """Try to send a message; return the last reply."""
    reply = client.reply()
    for line in ("EHLO me.example", "MAIL FROM:<a@example.com>", f"RCPT TO:<r{number}@example.com>"):
        if reply[0] in "45":
            return reply
        reply = client.say(line)
    return client.body(b"Subject: %d\r\n\r\n" % number, "") if reply[0] not in "45" else reply


def _is_served(house: Product) -> bool:
    try:
        return house.send("a@example.com", "b@example.com").startswith("250")
    except (OSError, AssertionError):
        return False
