"""Mailbox by mailbox, on the running product: who answers for whom after a move, and that nothing is lost meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.product import Product
from support.scripted_server import ScriptedServer

Make = Callable[..., Product]
Servers = dict[str, ScriptedServer]

QUICK = {"retry.first": "1", "retry.longest": "2", "relay.demoted": "sender=keep"}


@pytest.fixture
def servers(scripted: Callable[..., ScriptedServer]) -> Servers:
    return {name: scripted() for name in ("old", "new", "third")}


def migration(product: Make, servers: Servers, **settings: str) -> Product:
    """Return the product as in the common migration: a primary, a backup, and no route."""
    return product(
        primary=f"old={servers['old'].address}",
        backups=[f"new={servers['new'].address}"],
        settings={**QUICK, **{key.replace("__", "."): value for key, value in settings.items()}},
    )


def answered(relay: Product) -> dict[str, str]:
    """Return who has accepted each message, by its sender."""
    return {e["sender"].strip("<>"): e.get("primary", "") for e in relay.events if e.get("event") == "accepted"}


def test_a_mailbox_moves_and_moves_back(product: Make, servers: Servers) -> None:
    """The new server answers for who has moved, the old one for others; both have everything, there and back."""
    relay = migration(product, servers, smtp__processes="2")
    relay.send("before@example.org", "anna@a.example", data=b"Subject: 0\r\n\r\n0\r\n")
    servers["new"].wait_for(1)
    *_, told, followed = relay.json("move", "Anna@A.example", "--to", "new", "--yes", "--note", "pilot")
    assert (told["kind"], told["generation"], told["count"]) == ("moved", 1, 1)
    assert (len(followed["followed"]), followed["late"]) == (2, [])
    relay.send("moved@example.org", "anna+tag@a.example", data=b"Subject: 1\r\n\r\n1\r\n")
    relay.send("other@example.org", "otto@a.example", data=b"Subject: 2\r\n\r\n2\r\n")
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<both@example.org>", 250)
        client.say("RCPT TO:<anna@a.example>", 250)
        client.say("RCPT TO:<otto@a.example>", "452 4.5.3 Recipient is on another server, send it by itself")
        client.say("DATA", 354)
        client.say("Subject: 3\r\n\r\n3\r\n.", 250)
    relay.json("move", "anna@a.example", "--back", "--yes")
    relay.send("back@example.org", "anna@a.example", data=b"Subject: 4\r\n\r\n4\r\n")
    everything = [
        "back@example.org",
        "before@example.org",
        "both@example.org",
        "moved@example.org",
        "other@example.org",
    ]
    for name in ("old", "new"):
        servers[name].wait_for(5)
        assert sorted(t.sender for t in servers[name].messages) == everything
    found = answered(relay)
    assert (found["moved@example.org"], found["other@example.org"], found["both@example.org"]) == ("new", "old", "new")
    assert found["back@example.org"] in {"", "old"}
    acts = relay.json("audit")
    assert [act["command"] for act in acts] == ["move --back", "move"]
    assert acts[1]["details"]["addresses"] == "anna@a.example"
