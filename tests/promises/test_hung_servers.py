"""A server that accepts connections and says nothing, where others can stand in for it: it costs nobody minutes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest

from support import redundant_primaries
from support.product import Product
from support.reactions import Delay, Silence
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]
MakeServer = Callable[..., ScriptedServer]
PATIENT = 100  # seconds for a greeting, and for a reply: nobody must wait for so long
SETTINGS = {
    "relay.timeout_seconds": "2",
    "relay.greeting_timeout_seconds": str(PATIENT),
    "relay.command_timeout_seconds": str(PATIENT),
    "retry.first": "1",
    "retry.longest": "2",
}


@pytest.fixture
def servers(scripted: MakeServer) -> dict[str, ScriptedServer]:
    return {name: scripted() for name in ("a", "b", "c")}


def redundant(
    product: Make, servers: dict[str, ScriptedServer], waits: Mapping[str, float] | None = None, **settings: str
) -> Product:
    return redundant_primaries.redundant(product, servers, SETTINGS | settings, return_after="0", waits=waits or {})


def answered_by(relay: Product) -> list[str]:
    return [e["primary"] for e in relay.events if e.get("event") == "accepted"]


@pytest.mark.parametrize("where", ["CONNECT", "EHLO", "MAIL"])
def test_clients_that_come_while_it_hangs_go_to_the_next(
    product: Make, servers: dict[str, ScriptedServer], where: str
) -> None:
    """All at once, with kept connections and without: each is answered long before any time-out of the server's."""
    relay = redundant(product, servers)
    relay.send("first@example.org", "x@example.com")
    servers["a"].replies[where] = Silence()
    if where != "MAIL":
        servers["a"].drop()
    took: list[float] = []

    def send(n: int) -> None:
        begun = time.monotonic()
        assert relay.send(f"m{n}@example.org", "x@example.com").startswith("250")
        took.append(time.monotonic() - begun)

    clients = [threading.Thread(target=send, args=(n,)) for n in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(PATIENT)
    assert len(took) == 8
    assert max(took) < PATIENT / 2
    wait_until(lambda: len(answered_by(relay)) == 9)
    assert answered_by(relay) == ["a"] + ["b"] * 8
    assert len([e for e in relay.events if e.get("event") == "primary down"]) == 1
    # The next ones do not even try it.
    connections, begun = len(servers["a"].connections), time.monotonic()
    for n in range(5):
        relay.send(f"later{n}@example.org", "x@example.com")
    probes = 2 + (time.monotonic() - begun)  # not more than one a second
    assert len(servers["a"].connections) - connections <= probes
    servers["a"].replies.clear()
    servers["a"].drop()
    servers["a"].wait_for(14)  # and what it has missed has come as copies


def test_it_is_known_before_a_client_has_to_wait(product: Make, servers: dict[str, ScriptedServer]) -> None:
    """A server, or its substitute, that stops answering while there is no mail is found by a look at it."""
    waits = {f"relay.smtpd.{module}.QUIET_SECONDS": 1.0 for module in ("availability", "route_primaries")}
    relay = redundant(product, servers, waits=waits)
    servers["a"].replies["CONNECT"] = Silence()
    servers["c"].down()
    wait_until(
        lambda: {e["server"] for e in relay.events if e.get("event") == "primary down"} == {"a", "c"}, 60,
        lambda: relay.log[-2000:],
    )  # fmt: skip
    assert not servers["a"].transactions
    wait_until(lambda: "a" in relay.get("/readyz")[1])
    connections = len(servers["a"].connections)
    assert relay.send("m@example.org", "x@example.com").startswith("250")
    assert answered_by(relay) == ["b"]
    assert not [e for e in relay.events if e.get("event") == "primary trouble" and e.get("stage") == "MAIL"]
    assert len(servers["a"].connections) - connections <= 1  # a probe


def test_who_is_slow_on_purpose_is_waited_for(product: Make, servers: dict[str, ScriptedServer]) -> None:
    """A greeting that takes longer than a dead host may: the first probe finds out, and then it counts as usual."""
    for server in servers.values():
        server.replies["CONNECT"] = (Delay(1.5), None)
    relay = redundant(product, servers, **{"relay.timeout_seconds": "1"})

    relay.send("first@example.org", "x@example.com")
    servers["a"].drop()  # a connection has to be made now

    def is_answered_by_a() -> bool:
        relay.send("m@example.org", "x@example.com")
        return answered_by(relay)[-1] == "a"

    assert not is_answered_by_a()
    wait_until(is_answered_by_a, 60)
    for _ in range(3):
        servers["a"].drop()
        assert is_answered_by_a()


def test_all_hang(product: Make, servers: dict[str, ScriptedServer]) -> None:
    """Then a client hears 451 in the time of a few dead hosts, and as soon as one of them is back that one answers."""
    for server in servers.values():
        server.replies["MAIL"] = Silence()
    # The last one gets all of the latter.
    relay = redundant(product, servers, **{"relay.timeout_seconds": "1", "relay.command_timeout_seconds": "2"})
    with relay.dialogue() as client:
        client.hello()
        begun = time.monotonic()
        client.say("MAIL FROM:<m@example.org>", 451)
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<m@example.org>", 451)
        assert time.monotonic() - begun < PATIENT
        servers["c"].replies.clear()
        wait_until(lambda: client.say("MAIL FROM:<m@example.org>").startswith("250"), 60)
