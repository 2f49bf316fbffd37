"""mx:example.com on the running product: as the primary of all, in a route, and as a backup."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.dns_server import DnsServer
from support.product import QUICK, Product
from support.reactions import Close, Silence
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]
MakeServer = Callable[..., ScriptedServer]
MakeDns = Callable[..., DnsServer]
LISTED = (
    "example.net 5 MX 10 one.example.net.",
    "example.net 5 MX 20 two.example.net.",
    "one.example.net 5 A 127.0.0.1",
    "two.example.net 5 A 127.0.0.2",
)


@pytest.fixture
def pair(scripted: MakeServer) -> tuple[ScriptedServer, ScriptedServer]:
    """Two servers on one port, at different addresses."""
    one = scripted()
    return one, scripted(host="127.0.0.2", port=one.port)


def named(dns_server: DnsServer, port: int) -> str:
    return f"mx:example.net:{port}?dns={dns_server.address}"


FAULTS = {
    "nobody listens": lambda server: server.down(),
    "421 greeting": lambda server: server.replies.update({"CONNECT": "421 4.3.2 not now"}),
    "silence": lambda server: server.replies.update({"CONNECT": Silence()}),
    "421 at MAIL": lambda server: server.replies.update({"MAIL": ("421 4.3.2 not now", Close())}),
    "silence at MAIL": lambda server: server.replies.update({"MAIL": Silence()}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_host_of_the_list_takes_it(
    product: Make, dns_server: MakeDns, pair: tuple[ScriptedServer, ScriptedServer], backup: ScriptedServer, fault: str
) -> None:
    """As the primary: the best host answers, and where it cannot be used, the next does, in the same transaction."""
    one, two = pair
    relay = product(primary=named(dns_server(*LISTED), one.port), backups=[backup.address], settings=QUICK)
    assert relay.send("first@example.org", "x@example.com").startswith("250")
    assert len(one.wait_for(1)) == 1
    FAULTS[fault](one)
    one.drop()
    for n in range(3):
        assert relay.send(f"m{n}@example.org", "x@example.com").startswith("250")
    assert [t.sender for t in two.wait_for(3)] == [f"m{n}@example.org" for n in range(3)]
    assert len(one.messages) == 1
    assert len(backup.wait_for(4)) == 4


def test_no_host_is_451_with_its_reason(
    product: Make, dns_server: MakeDns, pair: tuple[ScriptedServer, ScriptedServer], scripted: MakeServer
) -> None:
    """A null MX, no domain, no answer, this host: temporary for the client, who hears why, as the log does."""
    one, _ = pair
    names = dns_server("example.net 1 MX 0 .")
    old = scripted()
    relay = product(
        primary=f"old={old.address}",
        files={
            "settings.toml": f"""
            [[server]]
            name = "m"
            url = "{named(names, one.port)}"
            [[server]]
            name = "itself"
            url = "mx:example.net?dns={names.address}"
            [[route]]
            name = "m"
            match = {{ recipients = "@m.example" }}
            primary = "m"
            [[route]]
            name = "itself"
            match = {{ recipients = "@itself.example" }}
            primary = "itself"
            [[route]]
            name = "first"
            match = {{ recipients = "@first.example" }}
            primary = ["m", "old"]
            """
        },
        settings=QUICK,
        waits={"relay.client.exchangers._LEAST_TTL": 1.0},
    )

    def answer(domain: str) -> str:
        with relay.dialogue() as client:
            client.hello()
            client.say("MAIL FROM:<s@example.org>", 250)
            return client.say(f"RCPT TO:<x@{domain}>")

    assert answer("m.example").startswith("451 4.4.4 The primary's domain takes no mail")
    relay.wait_for_log("null MX")
    assert answer("first.example").startswith("250")  # a server that cannot be used, like any other
    names.records, names.negative_ttl = [], 1
    wait_until(lambda: answer("m.example").startswith("451 4.4.4 The primary's domain does not exist"))
    names.records = list(LISTED)
    wait_until(lambda: answer("m.example").startswith("250"))
    wait_until(lambda: answer("itself.example").startswith("451 4.4.6 The mail server of the primary's domain is this"))
    names.rcode = "SERVFAIL"  # what was known holds
    one.drop()
    assert answer("m.example").startswith("250")
    assert relay.run("check").returncode == 1


def test_a_backup_by_its_domain(
    product: Make, dns_server: MakeDns, pair: tuple[ScriptedServer, ScriptedServer], primary: ScriptedServer
) -> None:
    """Copies go to the hosts of the list, too; where the best one has stopped answering, to the next."""
    one, two = pair
    relay = product(
        primary=primary.address,
        files={"settings.toml": f'[[backup]]\nname = "new"\nurl = "{named(dns_server(*LISTED), one.port)}"\n'},
        settings=QUICK,
    )
    relay.send("a@example.org", "x@example.com")
    one.wait_for(1)
    one.replies["MAIL"] = "421 4.3.2 not now"
    relay.send("b@example.org", "x@example.com")
    assert [t.sender for t in two.wait_for(1)] == ["b@example.org"]
    wait_until(lambda: all(row["pending"] == 0 for row in relay.json("queue", "list")))
