"""Redis away and a disk that fails in each of its ways: no 2xx without a copy, or the loss is told; else all comes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.spool import writer
from support import failing_disk, preloaded
from support.dialogue import Unexpected
from support.failing_disk import TROUBLES, FailingDisk
from support.product import QUICK, Product
from support.redis_servers import RedisServer
from support.retrying_sender import message
from support.scripted_server import ScriptedServer
from support.waiting import wait_until


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return failing_disk.compile_into(tmp_path_factory.mktemp("disk"))
    except preloaded.NotThere as error:
        pytest.skip(str(error))


@pytest.fixture
def disk(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    made = FailingDisk(library, tmp_path / "plan", tmp_path / "spool")
    for name, value in made.environment.items():
        monkeypatch.setenv(name, value)
    return made


def numbers(server: ScriptedServer) -> Counter[int]:
    found = (re.search(rb"Subject: (\d+)", taken.body) for taken in server.messages)
    return Counter(int(match[1]) for match in found if match)


def unready(relay: Product) -> bool:
    """Whether /readyz says 503, for the spool."""
    status, text = relay.get("/readyz")
    return status == 503 and "spool: " in text and "cannot be written" in text


@pytest.mark.timeout(300)
@pytest.mark.parametrize("required", [True, False])
def test_each_way(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
    disk: FailingDisk,
    tmp_path: Path,
    required: bool,
) -> None:
    """relay.require_durable_copies decides; /readyz says it; what was kept arrives once, when Redis is back."""
    server = redis_factory()
    relay = product(
        primary=primary.address,
        backups=[backup.address],
        redis_url=server.url,
        settings={
            **QUICK,
            "redis.timeout_seconds": "2",
            "spool.dir": str(tmp_path / "spool"),
            "relay.require_durable_copies": str(required).lower(),
        },
    )
    server.stop()
    accepted: set[int] = set()
    refused: list[int] = []
    number = 0

    def send() -> str:
        nonlocal number
        number += 1
        try:
            reply = relay.send("a@example.com", "b@example.com", data=message(number))
        except Unexpected as error:
            reply = str(error)
            refused.append(number)
        else:
            accepted.add(number)
        return reply

    for name, (error, what) in TROUBLES.items():
        assert send().startswith("250"), name
        disk.fail(error, what)
        reply = send()
        assert "451 4.3.1" in reply if required else reply.startswith("250"), name
        wait_until(lambda: unready(relay), message=name)
        disk.mend()
    assert send().startswith("250")
    wait_until(lambda: not unready(relay))
    lost = [event["id"] for event in relay.events if event["event"] == "copy lost"]
    assert len(lost) == (0 if required else len(TROUBLES))
    assert len(refused) == (len(TROUBLES) if required else 0)
    assert numbers(primary) == Counter(accepted)
    server.start()
    kept = len(accepted) - len(lost)
    backup.wait_for(kept)
    wait_until(lambda: writer.summary(tmp_path / "spool").messages == 0)
    assert len(numbers(backup)) == kept
    assert max(numbers(backup).values()) == 1
    assert relay.stop() == 0
