"""LMTP servers as primaries of routes: one recipient a transaction, since the dot is answered for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support import dovecot_instance
from support.dovecot_instance import DovecotInstance
from support.product import Product
from support.routed_pair import routed
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]
MakeServer = Callable[..., ScriptedServer]
DOMAIN = "boxes.example"


def test_one_recipient_a_transaction(product: Make, scripted: MakeServer) -> None:
    """Each gets a reply of its own at the dot; the others of the message are told to come again, in either order."""
    old, boxes = scripted(), scripted(lmtp=True)
    boxes.replies[".<full@boxes.example>"] = "452 4.2.2 mailbox full"
    relay = routed(product, f"old={old.address}", f"boxes=lmtp://{boxes.address}", DOMAIN)
    with relay.dialogue() as client:
        client.hello()
        for order in (("a@boxes.example", "b@boxes.example", "x@example.com"), ("x@example.com", "a@boxes.example")):
            left = list(order)
            while left:
                client.say("MAIL FROM:<s@example.org>", 250)
                replies = [client.say(f"RCPT TO:<{address}>") for address in left]
                assert replies[0].startswith("250")
                assert all(reply.startswith("452 4.5.3") for reply in replies[1:] if not reply.startswith("250"))
                client.say("DATA", 354)
                client.say("Subject: x\r\n\r\nx\r\n.", 250)
                left = [address for address, reply in zip(left, replies, strict=True) if reply[0] != "2"]
        client.say("MAIL FROM:<s@example.org>", 250)
        client.say("RCPT TO:<full@boxes.example>", 250)
        client.say("DATA", 354)
        client.say("Subject: x\r\n\r\nx\r\n.", "452 4.2.2 mailbox full")
        # Pipelined: nothing goes ahead that this server must not get.
        client.send("MAIL FROM:<s@example.org>", "RCPT TO:<c@boxes.example>", "RCPT TO:<d@boxes.example>", "DATA")
        assert [client.reply()[:3] for _ in range(4)] == ["250", "250", "452", "354"]
        client.say("Subject: x\r\n\r\nx\r\n.", 250)
    assert sorted(m.recipients[0] for m in boxes.messages) == [
        "a@boxes.example", "a@boxes.example", "b@boxes.example", "c@boxes.example",
    ]  # fmt: skip
    assert all(len(m.recipients) == 1 for m in boxes.messages)
    assert [m.recipients for m in old.messages] == [["x@example.com"]] * 2


def test_in_order_and_back(product: Make, scripted: MakeServer) -> None:
    """An LMTP server with an SMTP server behind it, in order: the next one answers while it is away."""
    old, boxes = scripted(), scripted(lmtp=True)
    relay = routed(
        product, f"old={old.address}", f"boxes=lmtp://{boxes.address}", DOMAIN, '["boxes", "old"]',
        more='return_after = "0"',
    )  # fmt: skip
    relay.send("one@example.org", "a@boxes.example")
    boxes.down()
    assert relay.send("two@example.org", "a@boxes.example").startswith("250")
    assert [m.sender for m in old.messages] == ["two@example.org"]
    boxes.listen()

    def is_used() -> bool:
        relay.send("three@example.org", "a@boxes.example")
        return len(boxes.messages) > 1

    wait_until(is_used)


def test_it_does_not_fork(product: Make, scripted: MakeServer) -> None:
    """A route that forks defers where the other primary speaks LMTP; with LMTP itself it is a fault of the settings."""
    old, new = scripted(lmtp=True), scripted()
    relay = routed(product, f"old=lmtp://{old.address}", f"boxes={new.address}", DOMAIN, more='split = "fork"')
    for first, second in (("a@boxes.example", "x@example.com"), ("x@example.com", "a@boxes.example")):
        with relay.dialogue() as client:
            client.hello()
            client.say("MAIL FROM:<s@example.org>", 250)
            client.say(f"RCPT TO:<{first}>", 250)
            client.say(f"RCPT TO:<{second}>", "452 4.5.3")
            client.say("DATA", 354)
            client.say("Subject: x\r\n\r\nx\r\n.", 250)
    assert not relay.metric("smtpdup_split_total", how="fork")


@pytest.fixture
def dovecot() -> Iterator[DovecotInstance]:
    if reason := dovecot_instance.unavailable():
        pytest.skip(reason)
    instance = DovecotInstance(["anna@boxes.example", "full@boxes.example"], full=["full@boxes.example"])
    yield instance.start()
    instance.remove()


def test_dovecot_answers_for_a_route(product: Make, dovecot: DovecotInstance, primary: ScriptedServer) -> None:
    """A real LMTP server as the primary of a route: its own words at RCPT and at the dot, and its copies elsewhere."""
    file_of_copies = 'copies = "others"\n'
    relay = routed(
        product, f"old={primary.address}", f"boxes={dovecot.address}", DOMAIN, '["boxes", "old"]', more=file_of_copies
    )
    assert relay.send("s@example.org", "anna@boxes.example").startswith("250")
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<s@example.org>", 250)
        client.say("RCPT TO:<nobody@boxes.example>", 550)
        client.say("RCPT TO:<x@example.com>", 250)
        client.say("DATA", 354)
        client.say("Subject: x\r\n\r\nx\r\n.", 250)
        client.say("MAIL FROM:<s@example.org>", 250)
        said = client.say("RCPT TO:<full@boxes.example>")
        if said.startswith("250"):
            client.say("DATA", 354)
            said = client.say("Subject: x\r\n\r\n" + "x" * 60 + "\r\n.")
        assert said.startswith(("452", "552")), said
    assert len(dovecot.wait_for(1)) == 1
    primary.wait_for(2)  # the copy for anna, and x's own
    assert sorted(m.recipients[0] for m in primary.messages) == ["anna@boxes.example", "x@example.com"]
    dovecot.stop()
    assert relay.send("t@example.org", "anna@boxes.example").startswith("250")
    dovecot.start()
    assert len(dovecot.wait_for(2)) == 2
