"""The hosts of ``mx:example.com``: which, in what order, for how long, and what is said where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from relay.client import exchangers as module
from relay.client.connect import connect
from relay.client.errors import ConnectFailed, NoExchanger
from relay.client.exchangers import exchangers
from relay.mail.destination import Destination
from relay.mail.timeouts import Timeouts
from support.dns_server import DnsServer
from support.event_loops import both_loops
from support.reactions import Silence
from support.scripted_server import ScriptedServer

Make = Callable[..., DnsServer]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    module._kept.clear()
    yield
    module._kept.clear()


def destination(server: DnsServer, port: int = 2526, domain: str = "example.com") -> Destination:
    return Destination("m", domain, port, "mx", tls="none", dns=server.address)


def expire() -> None:
    """Have all that is kept of DNS's answers count no more."""
    for kept in module._kept.values():
        kept.until = 0.0


ZONE = (
    "example.com 300 MX 20 far.example.net.",
    "example.com 300 MX 10 one.example.net.",
    "example.com 300 MX 10 two.example.net.",
    "one.example.net 300 A 203.0.113.1",
    "one.example.net 300 AAAA 2001:db8::1",
    "two.example.net 300 A 203.0.113.2",
    "far.example.net 300 A 203.0.113.9",
)


@both_loops
async def test_by_preference_and_random_among_equals(dns_server: Make) -> None:
    server = dns_server(*ZONE)
    seen = set()
    for _ in range(100):
        found = await exchangers(destination(server), 10)
        seen.add(tuple(host.name for host in found))
    assert seen == {
        ("one.example.net", "two.example.net", "far.example.net"),
        ("two.example.net", "one.example.net", "far.example.net"),
    }
    assert {host.name: host.addresses for host in found}["one.example.net"] == ("203.0.113.1", "2001:db8::1")
    assert len(server.asked) == 7  # the answers are kept


@both_loops
async def test_what_dns_says_counts_for_its_time(dns_server: Make) -> None:
    """Then it is asked again; and while it cannot tell, its last good answer holds."""
    server = dns_server(*ZONE)
    await exchangers(destination(server), 10)
    server.records = [line for line in ZONE if "10 one" not in line]
    assert len(await exchangers(destination(server), 10)) == 3
    expire()
    assert [host.name for host in await exchangers(destination(server), 10)] == ["two.example.net", "far.example.net"]
    server.rcode = "SERVFAIL"
    for _ in range(2):
        expire()
        found = await exchangers(destination(server), 2)
        assert [host.name for host in found] == ["two.example.net", "far.example.net"]
    asked = len(server.asked)
    await exchangers(destination(server), 2)
    assert len(server.asked) == asked  # nor is a server in trouble asked by every connection
    server.rcode, server.records = None, [*ZONE[:1], ZONE[-1]]
    expire()
    assert [host.name for host in await exchangers(destination(server), 10)] == ["far.example.net"]


@both_loops
@pytest.mark.parametrize(
    ("records", "reason", "told"),
    [
        (("example.com 60 MX 0 .",), "null MX", "4.4.4 The primary's domain takes no mail"),
        ((), "does not exist", "4.4.4 The primary's domain does not exist"),
        (("example.com 60 TXT x",), "no mail server with an address", "4.4.4 The primary's domain has no mail server"),
        (("example.com 60 MX 1 x.example.",), "no mail server with an address", "4.4.4 The primary's domain has no"),
        (("example.com 60 MX 1 a_\\032b.example.",), "no mail server", "4.4.4 The primary's domain has no mail server"),
        (("example.com 60 CNAME example.com.",), "no mail server", "4.4.4 The primary's domain has no mail server"),
    ],
)
async def test_no_host(records: tuple[str, ...], reason: str, told: str, dns_server: Make) -> None:
    """Each case has words of its own, for the log and for the client."""
    with pytest.raises(NoExchanger, match=reason) as caught:
        await exchangers(destination(dns_server(*records)), 10)
    assert caught.value.told.startswith(told)


@both_loops
async def test_nobody_can_tell(dns_server: Make) -> None:
    server = dns_server()
    server.rcode = "SERVFAIL"
    with pytest.raises(NoExchanger, match="SERVFAIL") as caught:
        await exchangers(destination(server), 1)
    assert caught.value.told == "4.4.3 The mail servers of the primary's domain cannot be looked up, try again later"


@both_loops
async def test_without_mx_the_domain_is_the_host(dns_server: Make) -> None:
    """RFC 5321 5.1: an implicit MX; not where there is an MX that leads nowhere."""
    server = dns_server("example.com 60 A 203.0.113.7", "example.com 60 AAAA 2001:db8::7")
    (host,) = await exchangers(destination(server), 10)
    assert host == ("example.com", ("203.0.113.7", "2001:db8::7"))


@both_loops
async def test_this_host_ends_the_list(dns_server: Make) -> None:
    """RFC 5321 5.1: who is on the list drops itself, and all that are no better; alone there it is a loop."""
    server = dns_server(*ZONE[:6], "two.example.net 300 AAAA ::1", "far.example.net 300 A 127.0.0.1")
    with pytest.raises(NoExchanger, match="this host") as caught:
        await exchangers(destination(server, port=25), 10)
    assert caught.value.told.startswith("4.4.6 ")
    server.records.remove("two.example.net 300 AAAA ::1")
    expire()
    assert {host.name for host in await exchangers(destination(server, port=25), 10)} == {
        "one.example.net",
        "two.example.net",
    }


@both_loops
async def test_who_does_not_answer_is_tried_last_for_a_while(
    dns_server: Make, scripted: Callable[..., ScriptedServer]
) -> None:
    """A dead host of the best preference costs one connection its time, and not every one."""
    good = scripted(host="127.0.0.2")
    hung = scripted(host="127.0.0.1", port=good.port)
    hung.replies["CONNECT"] = Silence()
    server = dns_server(
        "example.com 60 MX 1 hung.example.", "example.com 60 MX 2 good.example.",
        "hung.example 60 A 127.0.0.1", "good.example 60 A 127.0.0.2",
    )  # fmt: skip
    for _ in range(3):
        connection = await connect(
            destination(server, good.port), local_hostname="relay.example", timeouts=Timeouts.of(2.0)
        )
        assert connection.peer == ("127.0.0.2", good.port)
        await connection.quit()
    assert len(hung.connections) == 1
    good.replies["CONNECT"] = hung.replies["CONNECT"] = "421 4.3.2 not now"
    with pytest.raises(ConnectFailed, match="421"):
        await connect(destination(server, good.port), local_hostname="relay.example", timeouts=Timeouts.of(2.0))
