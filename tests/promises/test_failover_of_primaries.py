"""Redundant primaries under load: whoever answers, every server ends with every message, and none has it by two ways.

Faults come and go at the servers, and the relay is killed at each point of a message's life while a substitute answers.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from relay import faultpoints
from relay.ledger import overview
from support import redundant_primaries
from support.product import QUICK, SOON, Product
from support.reactions import Close, Reset
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

Make = Callable[..., Product]
MakeServer = Callable[..., ScriptedServer]

SETTINGS = {
    **QUICK,
    "relay.final_timeout_seconds": "10",
    "relay.uncertain_hold": "1",
    "workers.sweep": "1",
}


def redundant(product: Make, servers: dict[str, ScriptedServer], **options: str) -> Product:
    return redundant_primaries.redundant(product, servers, SETTINGS | options, return_after="1s")


@pytest.fixture
def servers(scripted: MakeServer) -> dict[str, ScriptedServer]:
    return {name: scripted() for name in ("a", "b", "c")}


def numbers_at(server: ScriptedServer) -> Counter[int]:
    return Counter(int(m.header("Subject") or -1) for m in server.messages)


def is_drained(relay: Product) -> bool:
    with redis.Redis.from_url(relay.redis_url) as connection:
        rows = overview.summary(connection)
        uncertain = connection.zcard("smtpdup:uncertain") + connection.zcard("smtpdup:staged")
    return not uncertain and sum(row.pending for row in rows) == 0


def audit(relay: Product, servers: dict[str, ScriptedServer], sender: Sender, count: int) -> None:
    """Every message is at every server; a second copy has a second try of the client, or a line with its id."""
    assert sender.join() == set(range(count))
    wait_until(lambda: is_drained(relay), 60, lambda: f"not drained: {relay.log[-6000:]}")
    log = relay.log
    explained = {word for line in log.splitlines() if "may repeat" in line or "uncertain" in line
                 for word in re.findall(r'"id": "(\w+)"', line)}  # fmt: skip
    for name, server in servers.items():
        found = numbers_at(server)
        assert set(found) == set(range(count)), f"{name} lacks {sorted(set(range(count)) - set(found))}"
        ids: dict[int, list[str]] = {}
        for message in server.messages:
            made = message.wire.split(b" id ", 1)[1].split(b";", 1)[0].decode()
            ids.setdefault(int(message.header("Subject") or -1), []).append(made)
        for number, which in ids.items():
            again = [one for one, times in Counter(which).items() if times > 1]
            assert not set(again) - explained, f"{name} has {number} twice as {again} without a reason"
            assert len(set(which)) <= sender.attempts[number], f"{name} has {number} more often than it was sent"
    primaries: dict[str, set[str]] = {}
    for event in relay.events:
        if event.get("event") in {"accepted", "accepted late"}:
            primaries.setdefault(event["id"], set()).add(event["primary"])
    assert all(len(found) == 1 for found in primaries.values())


FAULTS = (
    ("a", None),
    ("b", None),
    ("a", "421 4.3.2 down"),
    ("a", (Reset(),)),
    ("b", ("421 4.3.2 down", Close())),
    ("a", None),
)


@pytest.mark.timeout(180)
def test_faults_that_come_and_go(product: Make, servers: dict[str, ScriptedServer]) -> None:
    """The first two servers are down, hang up and say 421 in turn, while mail goes on."""
    relay = redundant(product, servers)
    sender = Sender(relay.smtp_port, range(300), sessions=4, patience=120).start()
    for name, fault in FAULTS:
        server, seen = servers[name], len(sender.accepted)
        if fault is None:
            server.down()
        else:
            server.replies["MAIL"] = fault
        wait_until(lambda: len(sender.accepted) >= min(seen + 20, 300), 60)  # noqa: B023  (waited for at once)
        server.replies.clear()
        server.listen()
    audit(relay, servers, sender, 300)
    assert relay.metric("smtpdup_failovers_total") >= 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("point", ["before staging", "staged", "dot sent", "primary answered", "released"])
def test_killed_while_a_substitute_answers(
    product: Make, servers: dict[str, ScriptedServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """SIGKILL of the relay process at this point, with the first server away: nothing is lost anywhere."""
    reached = tmp_path / "reached"
    monkeypatch.setenv(faultpoints.VARIABLE, f"{point}:10:{reached}")
    servers["a"].down()
    relay = redundant(product, servers)
    sender = Sender(relay.smtp_port, range(40)).start()
    wait_until(reached.exists, 30, f"nobody reached {point!r}")
    victim = relay.child("relay-1")
    os.kill(victim.pid, signal.SIGKILL)
    sender.join()
    servers["a"].listen()
    audit(relay, servers, sender, 40)
