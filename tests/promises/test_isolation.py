"""A backup in trouble is alone in it: the primary leg and the other backups keep their speed, and a recovering one is
not stampeded.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from support.product import QUICK, SOON, Product
from support.reactions import Close, Moment, Reset, Silence, Trickle
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

COUNT = 150
REFUSALS = 20  # of the same kind in a row, then it is the server and not the mail
WINDOW = 20  # transactions that may be under way at that moment


class Greylist:
    """Defers each recipient once."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, moment: Moment) -> str | None:
        with self._lock:
            if moment.line in self._seen:
                return None
            self._seen.add(moment.line)
            return "450 4.7.1 greylisted"


def troubles() -> dict[str, dict[str, Any]]:
    """Return what can be wrong with a server, as scripts."""
    return {
        "black hole": {"CONNECT": Silence()},
        "slow": {"CONNECT": Trickle("220 ready when you are", 0.5), ".": Trickle("250 2.0.0 queued", 0.3)},
        "reset in DATA": {"DATA": ("354 go ahead", Reset())},
        "421": {"CONNECT": ("421 4.3.2 too busy", Close()), "MAIL": ("421 4.3.2 too busy", Close())},
        "greylist": {"RCPT": Greylist()},
        "refusal": {"RCPT": "550 5.7.1 relaying denied"},
    }


def numbers(server: ScriptedServer) -> Counter[int]:
    return Counter(int(m.header("Subject") or -1) for m in server.messages)


def send(relay: Product, wanted: range) -> float:
    """Send messages, each at the first try; return how long that took."""
    begun = time.monotonic()
    sender = Sender(relay.smtp_port, wanted).start()
    assert sender.join() == set(wanted)
    assert set(sender.attempts.values()) == {1}
    return time.monotonic() - begun


@pytest.mark.timeout(300)
def test_troubles_stay_where_they_are(
    product: Callable[..., Product], primary: ScriptedServer, scripted: Callable[..., ScriptedServer]
) -> None:
    """Six backups in six kinds of trouble: a good one gets everything promptly, and the primary leg keeps its speed."""
    good = scripted()
    scripts = troubles()
    bad = {name: scripted() for name in scripts}
    relay = product(primary=primary.address, backups=[good.address, *(s.address for s in bad.values())], settings=QUICK)
    first, second = range(COUNT), range(COUNT, 2 * COUNT)
    usual = send(relay, first)
    for server in (good, *bad.values()):
        wait_until(lambda server=server: set(first) <= set(numbers(server)))

    for name, server in bad.items():
        server.replies = scripts[name]
        server.drop()  # no kept connection: it begins with the greeting
    troubled = send(relay, second)
    assert troubled < 3 * usual + 10, f"{usual:.1f} s for {COUNT} messages, {troubled:.1f} s with backups in trouble"
    wait_until(lambda: set(second) <= set(numbers(good)), 20, lambda: f"{len(numbers(good))} came")

    # Who refuses everything is paused, and the alarm raised, with few copies failed.
    refusing, greylisting = bad["refusal"].address, bad["greylist"].address
    wait_until(lambda: relay.summary(refusing)["state"] == "paused")
    row = relay.summary(refusing)
    assert "refuses every message" in row["reason"]
    assert REFUSALS <= row["failed"] <= REFUSALS + WINDOW
    assert row["pending"] == COUNT - row["failed"]
    for name in ("black hole", "421"):
        wait_until(lambda name=name: relay.summary(bad[name].address)["state"] == "paused")
        assert relay.summary(bad[name].address)["pending"] == COUNT
    wait_until(lambda: set(second) <= set(numbers(bad["greylist"])), message="what was greylisted comes later")
    assert relay.summary(greylisting)["state"] == "ok"

    for server in bad.values():
        server.replies = {}
        server.drop()
    relay.run("queue", "flush")
    relay.run("failed", "retry", "--all")
    for name, server in bad.items():
        wait_until(
            lambda server=server: set(second) <= set(numbers(server)),
            40,
            lambda name=name, server=server: f"{name}: {len(numbers(server))} came\n{relay.log[-3000:]}",
        )
    repeated = {e["id"] for e in relay.events if e["event"] == "may repeat"}
    for name, server in bad.items():
        again = [number for number, count in numbers(server).items() if count > 1]
        ids = [m.wire.split(b" id ", 1)[1].split(b";", 1)[0].decode() for m in server.messages]
        explained = [i for i, count in Counter(ids).items() if count > 1 and i in repeated]
        assert len(again) == len(explained), f"{name}: {again}"
    assert numbers(primary) == Counter(range(2 * COUNT)) == numbers(good)


@pytest.mark.timeout(300)
def test_a_recovering_server_is_not_stampeded(
    product: Callable[..., Product], primary: ScriptedServer, scripted: Callable[..., ScriptedServer]
) -> None:
    """Hundreds of copies wait for it, and it meets one connection at first; with each success there is one more."""
    backup = scripted()
    backup.down()
    relay = product(primary=primary.address, backups=[backup.address], settings=QUICK)
    send(relay, range(300))
    wait_until(lambda: relay.summary()["state"] == "paused")
    assert relay.summary()["pending"] == 300
    at_once: list[int] = []

    def busy(_: Moment) -> tuple[Any, ...]:
        # How many transactions are at their end of data; a little work makes them meet.
        at_once.append(backup.open_connections)
        return (Trickle("250 2.0.0 queued", 0.002),)

    backup.replies = {".": busy}
    backup.listen()
    backup.wait_for(300, 60)
    assert at_once[0] == 1
    for successes, open_connections in enumerate(at_once):
        assert open_connections <= successes + 1, at_once[: successes + 1]
    assert max(at_once) > 5, "it grows"
    assert set(numbers(backup).values()) == {1}
