"""Memory and disk full at once: mail goes on as the settings say, and so does everything once there is room again."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.spool import writer
from support.dialogue import Dialogue
from support.product import QUICK, Product
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

MEMORY = 8 << 20
COUNT = 500  # messages of 100 KB, whose records take half of that
SETTINGS = {
    **QUICK,
    "relay.timeout_seconds": "5",
    "redis.timeout_seconds": "2",
    "spool.min_free": "1M",
}


class Client:
    """Sends numbered messages of 100 KB, whose records take half of that, one connection."""

    def __init__(self, port: int) -> None:
        self._dialogue = Dialogue(port)
        self._dialogue.hello()
        self.accepted: set[int] = set()
        self._next = 0

    def send(self) -> str:
        """Send the next message; returns the reply to its dot."""
        number, self._next = self._next, self._next + 1
        lines = b"\r\n".join(os.urandom(375).hex().encode() for _ in range(130))
        self._dialogue.say("MAIL FROM:<a@example.com>", 250)
        self._dialogue.say(f"RCPT TO:<r{number}@example.com>", 250)
        reply = self._dialogue.body(b"Subject: %d\r\n\r\n%s\r\n" % (number, lines), "")
        if reply.startswith("2"):
            self.accepted.add(number)
        return reply

    def quit(self) -> None:
        self._dialogue.quit()


def numbers(server: ScriptedServer) -> Counter[int]:
    found = (re.search(rb"^Subject: (\d+)", m.wire[:2000], re.MULTILINE) for m in server.messages)
    return Counter(int(number[1]) if number else -1 for number in found)


@pytest.mark.long
@pytest.mark.timeout(180)
@pytest.mark.parametrize("required", [True, False])
def test_memory_and_disk_full(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
    small_disk: Callable[[int], Path],
    required: bool,
) -> None:
    """relay.require_durable_copies decides what a client hears; once the backup is back, what was kept arrives once."""
    disk = small_disk(12)
    server = redis_factory(maxmemory=str(MEMORY))
    settings = {
        **SETTINGS,
        "spool.dir": str(disk / "spool"),
        "relay.require_durable_copies": str(required).lower(),
    }
    backup.down()
    relay = product(primary=primary.address, backups=[backup.address], redis_url=server.url, settings=settings)
    client = Client(relay.smtp_port)
    replies = [client.send() for _ in range(COUNT)]
    lost = {e["id"] for e in relay.events if e["event"] == "copy lost"}
    if required:
        assert 50 < len(client.accepted) < COUNT
        assert replies[-1].startswith("451 4.3.1")
        assert not lost
    else:
        assert len(client.accepted) == COUNT
        assert 0 < len(lost) < COUNT - 50
        assert relay.metric("smtpdup_copies_lost_total") == len(lost)
    # The primary has not seen the dot of anything that was not accepted.
    assert numbers(primary) == Counter(client.accepted)

    backup.listen()
    relay.run("queue", "flush")
    kept = len(client.accepted) - len(lost)
    wait_until(
        lambda: len(numbers(backup)) >= kept, 60, lambda: f"{len(numbers(backup))} of {kept}: {relay.log[-3000:]}"
    )
    wait_until(lambda: writer.summary(disk / "spool").messages == 0)
    wait_until(lambda: relay.summary(backup.address)["pending"] == 0)
    # There is room again: everything is as before.
    before = set(client.accepted)
    wait_until(lambda: client.send().startswith("2"), interval=0.5)
    for _ in range(20):
        assert client.send().startswith("250")
    client.quit()
    wait_until(lambda: client.accepted - before <= set(numbers(backup)))
    assert max(numbers(backup).values()) == 1
    assert relay.stop() == 0


@pytest.mark.long
@pytest.mark.timeout(400)
def test_one_dead_backup_and_little_memory(
    product: Callable[..., Product],
    scripted: Callable[..., ScriptedServer],
    redis_factory: Callable[..., RedisServer],
) -> None:
    """With a dead backup's backlog of ten times the memory, another's arrive within seconds; later all do, once."""
    memory = 8 << 20
    server = redis_factory(maxmemory=str(memory))
    primary, dead, healthy = scripted(), scripted(), scripted()
    dead.down()
    relay = product(
        primary=primary.address, backups=[dead.address, healthy.address], redis_url=server.url, settings=SETTINGS
    )
    client = Client(relay.smtp_port)
    folder = relay.state_dir / "spool"
    while writer.summary(folder).bytes < 10 * memory:
        for _ in range(100):
            assert client.send().startswith("250")
        # It keeps up: what has not arrived yet is what came just now.
        wait_until(lambda: len(healthy.messages) > len(client.accepted) - 200, message=lambda: _left(healthy, relay))
    wait_until(lambda: len(healthy.messages) == len(client.accepted), message=lambda: _left(healthy, relay))
    assert writer.summary(folder).backlogs[dead.address] > 10
    begun = time.monotonic()
    client.send()
    wait_until(lambda: len(healthy.messages) == len(client.accepted))
    assert time.monotonic() - begun < 10
    assert not dead.messages
    dead.listen()
    relay.run("queue", "flush")
    wait_until(lambda: len(dead.messages) >= len(client.accepted), 90, lambda: _left(dead, relay))
    wait_until(lambda: not writer.summary(folder).messages)
    client.quit()
    assert numbers(dead) == numbers(healthy) == Counter(client.accepted)
    assert not [e for e in relay.events if e["event"] in {"copy lost", "spool trouble"}]
    assert relay.stop() == 0


def _left(server: ScriptedServer, relay: Product) -> str:
    return f"{len(server.messages)} have arrived: {relay.log[-3000:]}"
