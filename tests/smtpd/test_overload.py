"""Overload: further clients get a temporary refusal, memory stays bounded, and sessions under way finish."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from support.dialogue import Dialogue
from support.product import Product
from support.reactions import Gate
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]


def test_too_many_clients(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Over smtp.max_connections, counted over all relay processes: 421, and those inside are served."""
    house = product(
        primary=primary.address,
        backups=[backup.address],
        settings={"smtp.max_connections": "8", "smtp.processes": "2"},
    )
    with ExitStack() as clients:
        inside = [clients.enter_context(house.dialogue()) for _ in range(8)]
        for _ in range(4):
            with Dialogue(house.smtp_port, greeting=421) as turned_away:
                assert turned_away.is_closed()
        for client in inside:
            client.hello()
            client.mail("a@example.com", "b@example.com", data=b"x\r\n")
    backup.wait_for(8)
    wait_until(lambda: _is_free(house), 10, "no room after they have left")


def _is_free(house: Product) -> bool:
    try:
        with house.dialogue():
            return True
    except AssertionError:
        return False


def test_too_many_octets(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Over smtp.max_bytes_in_flight: 452 with the reason, before the body where its size was declared."""
    house = product(
        primary=primary.address,
        backups=[backup.address],
        settings={"smtp.max_bytes_in_flight": "1000000", "smtp.processes": "2", "smtp.max_message_bytes": "900000"},
    )
    gate = Gate()
    primary.replies["."] = [(gate, None), None]
    with house.dialogue() as first, house.dialogue() as second:
        first.hello()
        first.say("MAIL FROM:<a@example.com>", 250)
        first.say("RCPT TO:<b@example.com>", 250)
        first.say("DATA", 354)
        first.raw(b"Subject: first\r\n\r\n" + (b"x" * 78 + b"\r\n") * 10_000 + b".\r\n")
        wait_until(lambda: gate.reached, message="the first is not at its dot")
        second.hello()
        second.say("MAIL FROM:<a@example.com> SIZE=800000", "452 4.3.1")
        second.mail("a@example.com", "b@example.com", data=(b"y" * 78 + b"\r\n") * 5_000, end="452 4.3.1")
        second.mail("a@example.com", "b@example.com", data=b"Subject: small\r\n\r\n")
        gate.open()
        first.expect(250)
        second.mail("a@example.com", "b@example.com", data=b"Subject: large\r\n\r\n" + (b"z" * 78 + b"\r\n") * 10_000)
    copies = backup.wait_for(3)
    assert {c.header("Subject") for c in copies} == {"first", "small", "large"}
    assert len(primary.messages) == 3
