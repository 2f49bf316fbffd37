"""The promise of the product: the client hears the primary, and every backup gets what the primary accepted."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from support.product import QUICK, Product
from support.reactions import Close, Gate, Reset, Silence
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]


@pytest.fixture
def pair(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> Product:
    """The whole product between one primary and one backup, with quick retries."""
    return product(primary=primary.address, backups=[backup.address], settings=QUICK)


BODIES = {
    "plain": b"Subject: plain\r\n\r\nhello\r\n",
    "no header": b"\r\njust text\r\n",
    "empty": b"",
    "lone dots": b"Subject: dots\r\n\r\n.\r\n..\r\n.x\r\n...\r\n",
    "eight bit and NUL": b"Subject: bytes\r\n\r\n" + bytes(b for b in range(256) if b not in (10, 13)) + b"\r\n",
    "long line": b"Subject: long\r\n\r\n" + b"x" * 100_000 + b"\r\n",
    "megabytes": b"Subject: big\r\n\r\n" + (b"0123456789" * 7 + b"\r\n") * 40_000,
}


@pytest.mark.parametrize("name", BODIES)
def test_bytes_are_sacred(pair: Product, primary: ScriptedServer, backup: ScriptedServer, name: str) -> None:
    """What the client sent is what the primary and the backup get, below one Received line of ours."""
    body = BODIES[name]
    pair.send("a@example.com", "b@example.com", data=body)
    (first,) = primary.wait_for(1)
    (second,) = backup.wait_for(1)
    for got in (first, second):
        received, rest = re.match(rb"(Received: .*?\r\n(?:\t.*?\r\n)*)(.*)", got.body, re.DOTALL).groups()
        assert rest == body
        assert b"by localhost (smtp-dup) with ESMTP id " in received
    assert first.wire == second.wire


def test_replies_of_the_primary_pass_through(pair: Product, primary: ScriptedServer) -> None:
    """MAIL, RCPT and the dot are answered in the primary's own words, codes and lines included."""
    primary.replies["MAIL FROM:<mail@"] = "550-5.7.1 first line\n550 5.7.1 second line"
    primary.replies["RCPT TO:<no@"] = "550 5.1.1 no such user here"
    primary.replies["RCPT TO:<later@"] = "450 4.2.1 greylisted"
    primary.replies["RCPT TO:<elsewhere@"] = "251 2.1.5 will forward"
    primary.replies["."] = "250 2.6.0 queued as 12345"
    with pair.dialogue() as client:
        client.hello()
        assert client.say("MAIL FROM:<mail@example.com>", 550) == "550-5.7.1 first line\n550 5.7.1 second line"
        client.say("MAIL FROM:<a@example.com>", 250)
        assert client.say("RCPT TO:<no@example.com>", 550) == "550 5.1.1 no such user here"
        client.say("RCPT TO:<later@example.com>", "450 4.2.1")
        client.say("RCPT TO:<elsewhere@example.com>", 251)
        assert client.body(b"x\r\n") == "250 2.6.0 queued as 12345"


def test_only_accepted_recipients_are_copied(pair: Product, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """One of three recipients refused by the primary: the other two get the copy, once."""
    primary.replies["RCPT TO:<no@"] = "550 5.1.1 no"
    with pair.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<one@example.com>", 250)
        client.say("RCPT TO:<no@example.com>", 550)
        client.say("RCPT TO:<two@example.com>", 250)
        client.body(b"x\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.recipients == ["one@example.com", "two@example.com"]


def test_what_the_primary_refuses_is_not_copied(pair: Product, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A message refused at its end leaves nothing behind, and the next one of the session is not disturbed."""
    primary.replies["."] = ["554 5.7.1 spam", "452 4.3.1 full", None]
    with pair.dialogue() as client:
        client.hello()
        client.mail("a@example.com", "b@example.com", data=b"Subject: spam\r\n\r\n", end="554 5.7.1")
        client.mail("a@example.com", "b@example.com", data=b"Subject: full\r\n\r\n", end="452 4.3.1")
        client.mail("a@example.com", "b@example.com", data=b"Subject: ham\r\n\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.header("Subject") == "ham"
    wait_until(lambda: pair.summary()["pending"] == 0, message="the copy is not settled")


def test_nobody_accepted_is_not_passed_on(pair: Product, primary: ScriptedServer) -> None:
    """DATA without an accepted recipient is 554, and the primary never hears of it."""
    primary.replies["RCPT"] = "550 5.1.1 no"
    with pair.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<no@example.com>", 550)
        client.say("DATA", "554 5.5.1")
        client.say("RSET", 250)
    assert "DATA" not in [c.upper() for c in primary.commands]


@pytest.mark.parametrize(
    ("key", "reaction"),
    [
        ("CONNECT", "554 5.3.2 no service for you"),
        ("CONNECT", Close()),
        ("EHLO", "550 5.7.1 go away"),
        ("MAIL", Reset()),
        ("MAIL", Silence()),
        ("MAIL", "530 5.7.0 authenticate first"),
        ("MAIL", "421 4.3.2 shutting down"),
        ("RCPT", Reset()),
        ("RCPT", "421 4.3.2 shutting down"),
        ("DATA", Reset()),
        ("DATA", "421 4.3.2 shutting down"),
        (".", Reset()),
        (".", "421 4.3.2 shutting down"),
    ],
)
def test_trouble_of_the_primary_is_temporary(
    pair: Product, primary: ScriptedServer, backup: ScriptedServer, key: str, reaction: object
) -> None:
    """A primary that is unreachable, silent, wants AUTH or goes away mid-way: 451, never 5xx, and nothing is copied."""
    primary.drop()
    primary.replies[key] = reaction
    if key == "EHLO":
        primary.replies["HELO"] = reaction
    with pair.dialogue() as client:
        client.hello()
        reply = client.say("MAIL FROM:<a@example.com>")
        if reply.startswith("250"):
            reply = client.say("RCPT TO:<b@example.com>")
        if reply.startswith("250"):
            reply = client.say("DATA")
        if reply.startswith("354"):
            client.raw(b"x\r\n.\r\n")
            reply = client.reply()
        assert reply.startswith("451 4.")
        primary.replies.clear()
        client.say("RSET", 250)
        client.mail("a@example.com", "b@example.com", data=b"Subject: after\r\n\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.header("Subject") == "after"


def test_primary_down_and_back(pair: Product, primary: ScriptedServer) -> None:
    """An unreachable primary is 451 with an enhanced code; when it is back the same session goes on."""
    primary.down()
    with pair.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", "451 4.4.1")
        primary.listen()
        client.mail("a@example.com", "b@example.com", data=b"x\r\n")


def test_extensions_of_a_primary_that_is_away(product: Make, primary: ScriptedServer) -> None:
    """While the primary has not been met, a parameter that it may take is 451 and never 555."""
    primary.down()
    early = product(primary=primary.address, settings=QUICK)
    with early.dialogue() as client:
        assert "8BITMIME" not in client.hello()
        client.say("MAIL FROM:<a@example.com> BODY=8BITMIME", "451 4.4.1")
        client.say("MAIL FROM:<a@example.com> NONSENSE=1", 555)
        primary.listen()
        client.say("MAIL FROM:<a@example.com> BODY=8BITMIME", 250)
    assert early.metric("smtpdup_primary_trouble_total") > 0


def test_null_sender(pair: Product, backup: ScriptedServer) -> None:
    """Bounces pass."""
    pair.send("", "b@example.com", data=b"Subject: bounce\r\n\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.sender == ""


def test_hang_up_after_the_dot(pair: Product, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A client that goes away after its dot changes nothing: the primary's 250 still releases the copy."""
    gate = Gate()
    primary.replies["."] = (gate, None)
    client = pair.dialogue()
    client.hello()
    client.say("MAIL FROM:<a@example.com>", 250)
    client.say("RCPT TO:<b@example.com>", 250)
    client.say("DATA", 354)
    client.raw(b"Subject: gone\r\n\r\n.\r\n")
    wait_until(lambda: gate.reached, message="the dot did not come")
    client.reset()
    gate.open()
    (copy,) = backup.wait_for(1)
    assert copy.header("Subject") == "gone"
    pair.wait_for_log("accepted late")


def test_hang_up_in_data(pair: Product, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Half a message reaches nobody, and no byte of it another transaction."""
    client = pair.dialogue()
    client.hello()
    client.say("MAIL FROM:<a@example.com>", 250)
    client.say("RCPT TO:<b@example.com>", 250)
    client.say("DATA", 354)
    client.raw(b"Subject: half\r\n\r\nsome text\r\n")
    client.reset()
    pair.send("a@example.com", "b@example.com", data=b"Subject: whole\r\n\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.header("Subject") == "whole"
    assert [m.header("Subject") for m in primary.messages] == ["whole"]
    assert b"half" not in copy.wire


def test_early_refusal_in_data(pair: Product, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A primary that refuses before the end of the message is passed on, after the client's own dot."""
    primary.in_data = (1000, ("552 5.3.4 too big for me", Close()))
    with pair.dialogue() as client:
        client.hello()
        client.mail("a@example.com", "b@example.com", data=b"y" * 998 + b"\r\n" + b"x" * 900_000 + b"\r\n", end=552)
        primary.in_data = None
        client.mail("a@example.com", "b@example.com", data=b"Subject: small\r\n\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.header("Subject") == "small"


def test_kept_connection_that_died_is_replaced_unseen(pair: Product, primary: ScriptedServer) -> None:
    """A pooled connection that the primary closed meanwhile costs the client nothing."""
    with pair.dialogue() as client:
        client.hello()
        for _ in range(3):
            client.mail("a@example.com", "b@example.com", data=b"x\r\n")
            primary.drop()
    assert len(primary.messages) == 3


def test_hundreds_of_messages_in_a_session(pair: Product, backup: ScriptedServer) -> None:
    """A session may go on and on, past what one connection to the primary and one job take."""
    with pair.dialogue() as client:
        client.hello()
        for number in range(350):
            client.mail("a@example.com", "b@example.com", data=b"Subject: %d\r\n\r\n" % number)
    copies = backup.wait_for(350, timeout=60)
    assert sorted(int(c.header("Subject") or -1) for c in copies) == list(range(350))


def test_limits(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Our own rules: size and number of recipients, each with its reply; nothing is half-staged."""
    small = product(
        primary=primary.address,
        backups=[backup.address],
        settings={**QUICK, "smtp.max_message_bytes": "10000", "smtp.max_recipients": "2"},
    )
    with small.dialogue() as client:
        assert client.hello()["SIZE"] == "10000"
        client.say("MAIL FROM:<a@example.com> SIZE=10001", "552 5.3.4")
        client.mail("a@example.com", "b@example.com", data=b"x" * 20_000 + b"\r\n", end="552 5.3.4")
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.say("RCPT TO:<c@example.com>", 250)
        client.say("RCPT TO:<d@example.com>", "452 4.5.3")
        client.body(b"Subject: two\r\n\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.recipients == ["b@example.com", "c@example.com"]
    assert [m.header("Subject") for m in primary.messages] == ["two"]


def test_garbage_on_the_port(pair: Product, primary: ScriptedServer) -> None:
    """Nonsense is answered, then shown the door; the next client is served."""
    with pair.dialogue() as client:
        for _ in range(19):
            client.say(b"\x16\x03\x01\xff nonsense", 500)
        client.say(b"\x00" * 5000, "421 4.7.0")
        assert client.is_closed()
    pair.send("a@example.com", "b@example.com", data=b"x\r\n")


def test_forwarding_loop(pair: Product, primary: ScriptedServer) -> None:
    """Too many hops in the header block are refused; Received lines in a body count for nothing."""
    trace = b"Received: from a by b;\r\n\tSun, 22 Nov 2026 00:00:00 +0000\r\n"
    with pair.dialogue() as client:
        client.hello()
        client.mail("a@example.com", "b@example.com", data=trace * 51 + b"\r\n", end="554 5.4.6")
        client.mail("a@example.com", "b@example.com", data=b"Subject: text\r\n\r\n" + trace * 51)
    assert len(primary.messages) == 1
