"""Several primaries under load, without copies: no message is at two of them, and none at a wrong one."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator

import pytest

from support import load
from support.dialogue import Dialogue
from support.load import SmtpSink
from support.product import SOON, Product
from support.reactions import Close, Gate, Reset, Silence
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

Make = Callable[..., Product]
MakeServer = Callable[..., ScriptedServer]

SETTINGS = {
    "relay.timeout_seconds": "2",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
    "relay.final_timeout_seconds": "4",
    "relay.uncertain_hold": "1",
    "retry.first": "1",
    "retry.longest": "2",
}
ORDERED = """
[[server]]
name = "b"
url = "{b}"
[[route]]
name = "all"
servers = ["a", "b"]
return_after = "0"
"""
COUNT = 200


def ordered(product: Make, a: str, b: str) -> Product:
    return product(primary=f"a={a}", files={"settings.toml": ORDERED.format(b=b)}, settings=SETTINGS)


def primaries(relay: Product) -> dict[str, set[str]]:
    """Return for each id who has accepted it, by the log."""
    found: dict[str, set[str]] = {}
    for event in relay.events:
        if event.get("event") in {"accepted", "accepted late"}:
            found.setdefault(event["id"], set()).add(event["primary"])
    return found


def audit(relay: Product, sender: Sender, at_a: Iterable[int], at_b: Iterable[int]) -> None:
    """All are somewhere; what is at both was sent again by the client, since it had heard no 2xx."""
    a, b = set(at_a), set(at_b)
    assert sender.join() == set(range(COUNT))
    assert a | b == set(range(COUNT))
    assert all(sender.attempts[number] > 1 for number in a & b), {n: sender.attempts[n] for n in a & b}
    assert all(len(names) == 1 for names in primaries(relay).values())


def heard(server: ScriptedServer, verb: str) -> int:
    """Return how often a server was told this."""
    return sum(command.startswith(verb) for command in server.commands)


FAULTS = {
    "reset": (Reset(),),
    "421": ("421 4.3.2 down", Close()),
    "silence": (Silence(),),
    "4xx": "451 4.7.1 later",
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("where", ["MAIL", "EHLO"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_comes_and_goes(product: Make, scripted: MakeServer, fault: str, where: str) -> None:
    """At MAIL or before it, on kept connections and new ones. A 4xx to MAIL is that server's word: no failover."""
    a, b = scripted(), scripted()
    relay = ordered(product, a.address, b.address)
    sender = Sender(relay.smtp_port, range(COUNT), patience=100).start()
    stays = (fault, where) == ("4xx", "MAIL")
    for begin in (20, 100):
        wait_until(lambda: len(sender.accepted) >= begin, 60)  # noqa: B023  (waited for at once)
        a.replies[where] = FAULTS[fault]
        if where == "EHLO":
            a.drop()
        seen, before = heard(a, where), len(b.messages)
        if stays:
            wait_until(lambda: heard(a, where) > seen + 5, 60)  # noqa: B023 - called at once
        else:
            wait_until(lambda: len(b.messages) > before, 60)  # noqa: B023 - called at once
        a.replies.clear()
    numbers = [[int(m.header("Subject") or -1) for m in server.messages] for server in (a, b) if sender.join()]
    audit(relay, sender, *numbers)
    if stays:
        assert not b.transactions
        assert not relay.metric("smtpdup_failovers_total")


@pytest.fixture
def sink() -> Iterator[SmtpSink]:
    if reason := load.unavailable():
        pytest.skip(reason)
    with SmtpSink(keep=True) as started:
        yield started


@pytest.mark.postfix
@pytest.mark.timeout(180)
def test_a_server_is_stopped_and_goes_on(product: Make, sink: SmtpSink, scripted: MakeServer) -> None:
    """SIGSTOP in the middle of everything, SIGCONT later: what it then reads of abandoned sessions is no message."""
    b = scripted()
    relay = ordered(product, sink.address, b.address)
    sender = Sender(relay.smtp_port, range(COUNT), patience=150).start()
    for begin in (20, 100):
        wait_until(lambda: len(sender.accepted) >= begin, 60)  # noqa: B023  (waited for at once)
        seen = len(b.messages)
        sink.pause()
        wait_until(lambda: len(b.messages) >= min(seen + 20, COUNT // 2), 90)  # noqa: B023 - called at once
        sink.resume()
    sender.join()
    at_a = [int(re.findall(rb"^Subject: (\d+)", mail, re.MULTILINE)[0]) for mail in sink.messages()]
    audit(relay, sender, at_a, [int(m.header("Subject") or -1) for m in b.messages])


# --- two routes -----------------------------------------------------------------------------------------------------

TWO = """
[[server]]
name = "shop"
url = "{shop}"
[[route]]
name = "shop"
match = {{ recipients = "@shop.example" }}
primary = "shop"
{more}
"""


def send_to_both(port: int, numbers: Iterable[int], failures: list[BaseException]) -> None:
    """Send each to two recipients who need different primaries; whoever is put off gets it by itself, as by an MTA."""
    try:
        with Dialogue(port, timeout=60) as client:
            client.hello()
            for number in numbers:
                left = [f"r{number}@shop.example", f"r{number}@example.com"][:: 1 if number % 2 else -1]
                while left:
                    lines = ["MAIL FROM:<s@example.org>", *(f"RCPT TO:<{address}>" for address in left), "DATA"]
                    client.send(*lines)
                    client.expect(250)
                    replies = [client.reply() for _ in left]
                    client.expect(354)
                    client.say(f"Subject: {number}\r\n\r\nx\r\n.", 250)
                    assert all(reply.startswith(("250", "452 4.5.3 Recipient is on")) for reply in replies)
                    left = [address for address, reply in zip(left, replies, strict=True) if reply[0] != "2"]
    except BaseException as error:
        failures.append(error)
        raise


@pytest.mark.timeout(600)
@pytest.mark.parametrize("split", ["defer", "fork"])
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_transactions_of_two_routes(product: Make, scripted: MakeServer, count: int, split: str) -> None:
    """Each message for two recipients, pipelined, in either order: all are delivered, none to a wrong server."""
    old, shop = scripted(), scripted()
    file = TWO.format(shop=shop.address, more=f'split = "{split}"')
    relay = product(primary=f"old={old.address}", files={"settings.toml": file}, settings={"log.level": "warning"})
    failures: list[BaseException] = []
    clients = [
        threading.Thread(target=send_to_both, args=(relay.smtp_port, range(n, count, 6), failures)) for n in range(6)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(500)
    assert not failures
    for server, domain in ((old, "example.com"), (shop, "shop.example")):
        found = sorted((int(m.header("Subject") or -1), *m.recipients) for m in server.messages)
        assert found == [(number, f"r{number}@{domain}") for number in range(count)]
    assert relay.metric("smtpdup_split_total", how=split) == count


RETURNING = """
[[server]]
name = "b"
url = "{b}"
[[route]]
name = "ordered"
match = {{ recipients = "@ab.example" }}
servers = ["a", "b"]
return_after = "0"
split = "{split}"
[[route]]
name = "one"
match = {{ recipients = "@b.example" }}
primary = "b"
split = "{split}"
"""


@pytest.mark.parametrize("split", ["defer", "fork"])
def test_a_recipient_that_went_ahead_stays_where_its_server_comes_back(
    product: Make, scripted: MakeServer, split: str
) -> None:
    """Who answers for a recipient is decided once in a transaction: what is sent ahead is what is asked in its turn."""
    a, b, gate = scripted(), scripted(), Gate()
    relay = product(
        primary=f"a={a.address}",
        files={"settings.toml": RETURNING.format(b=b.address, split=split)},
        settings=SETTINGS | {"relay.command_timeout_seconds": "30"},
        waits={"relay.smtpd.availability._LOOK_SECONDS": 0.5},
    )
    a.down()
    relay.send("s@example.org", "x@ab.example")
    b.wait_for(1)
    b.replies["MAIL FROM:<ahead@example.org>"] = (gate, None)
    with relay.dialogue() as client:
        client.hello()
        lines = ["MAIL FROM:<ahead@example.org>", "RCPT TO:<x@b.example>", "RCPT TO:<y@ab.example>", "DATA"]
        client.raw("".join(f"{line}\r\n" for line in lines).encode())
        wait_until(lambda: any("ahead@" in command for command in b.commands))
        probes = a.commands.count("QUIT")
        a.listen()
        wait_until(lambda: a.commands.count("QUIT") >= probes + 2)  # at the second, the first has been noted
        gate.open()
        assert [client.reply()[:3] for _ in lines] == ["250", "250", "250", "354"]
        client.say("Subject: two\r\n\r\ntwo\r\n.", 250)
    b.wait_for(2)
    assert sorted(b.messages[-1].recipients) == ["x@b.example", "y@ab.example"]
    assert not a.messages
    assert "Traceback" not in relay.log
