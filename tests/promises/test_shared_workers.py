"""Many backups, of which the quiet ones share a worker process: nobody delays another, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from support.product import Product
from support.reactions import Gate, Silence
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

NAMES = ("a", "b", "hangs", "away", "full")


@pytest.fixture
def servers() -> Iterator[dict[str, ScriptedServer]]:
    """Four that accept, one of them only at first, and one that nobody reaches."""
    with ExitStack() as ends:
        found = {name: ends.enter_context(ScriptedServer()) for name in NAMES}
        found["hangs"].replies["."] = Silence()
        found["away"].refuse()
        yield found


@pytest.fixture
def shared(product: Callable[..., Product], primary: ScriptedServer, servers: dict[str, ScriptedServer]) -> Product:
    """A product with five backups, a worker process of its own for at most two."""
    backups = [f"{name}={server.address}" for name, server in servers.items()]
    return product(primary=primary.address, backups=backups, settings={"workers.shared_above": "2", "retry.first": "1"})


def workers(instance: Product) -> set[str]:
    """Return the names of the worker processes that have been started."""
    return set(re.findall(r"(worker-\S+) started as process", instance.log.replace('"', " ")))


def test_quiet_backups_share_a_process(shared: Product, servers: dict[str, ScriptedServer]) -> None:
    """The quiet ones get each message from one process; who hangs or is away gets its own and delays nobody."""
    shared.wait_for_log("destinations while they are quiet")
    assert workers(shared) == {"worker-shared"}
    for n in range(12):
        shared.send("from@example.com", f"to-{n}@example.com")
        for name in ("a", "b", "full"):
            servers[name].wait_for(n + 1)
    for name in ("hangs", "away"):
        shared.wait_for_log(f"worker-{name}-1 started")
    assert servers["hangs"].transactions
    wait_until(lambda: shared.summary("away")["state"] == "paused")
    servers["away"].listen()
    servers["away"].wait_for(12)
    servers["hangs"].replies.clear()  # first: who comes in between would hear nothing, either
    servers["hangs"].drop()
    shared.run("queue", "flush", "--all", "--yes")
    wait_until(lambda: len({m.recipients[0] for m in servers["hangs"].messages}) == 12)
    for name in ("a", "b", "full", "away"):
        assert len(servers[name].messages) == 12, "once each"


def test_it_dies_with_copies_in_hand(shared: Product, servers: dict[str, ScriptedServer]) -> None:
    """A kill -9 of the shared process, and one of all processes: what was in hand goes on, the rest is untouched."""
    gates = {name: Gate() for name in ("a", "b")}
    for name, gate in gates.items():
        servers[name].replies["."] = (gate, Silence())
    shared.send("from@example.com", "first@example.com")
    servers["full"].wait_for(1)
    wait_until(lambda: shared.summary("full")["pending"] == 0)  # else it may be sent again
    for name, gate in gates.items():
        wait_until(lambda gate=gate: gate.reached)
        servers[name].replies.clear()
    shared.child("worker-shared").kill()
    for name in gates:
        servers[name].wait_for(1)
    assert len(servers["full"].messages) == 1
    shared.send("from@example.com", "second@example.com")
    shared.kill()
    shared.start()
    for name in ("a", "b", "full"):
        servers[name].wait_for(2)
    servers["hangs"].replies.clear()
    servers["hangs"].drop()
    servers["hangs"].wait_for(2)
    assert shared.stop() == 0


def test_a_process_of_its_own_dies(shared: Product, servers: dict[str, ScriptedServer]) -> None:
    """A kill -9 leaves its copies to its successor, or to the shared process, and none is lost."""
    servers["full"].replies["."] = Silence()
    for n in range(3):
        shared.send("from@example.com", f"to-{n}@example.com")
    shared.wait_for_log("worker-full-1 started")
    shared.child("worker-full-1").kill()
    servers["full"].replies.clear()  # first: who comes in between would hear nothing, either
    servers["full"].drop()
    shared.run("queue", "flush", "--all", "--yes")
    wait_until(lambda: len({m.recipients[0] for m in servers["full"].messages}) == 3)
