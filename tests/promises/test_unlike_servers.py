"""Servers of one relay that do not offer the same: what the client is told holds for whoever answers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from support.certificates import Certificate
from support.product import QUICK, Product
from support.routed_pair import routed
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]
MakeServer = Callable[..., ScriptedServer]


def test_a_message_that_forks_needs_what_both_take(product: Make, scripted: MakeServer) -> None:
    """The smallest SIZE counts, announced by one or by both; who offers less since then refuses its recipients only."""
    a = scripted(extensions=["PIPELINING", "8BITMIME", "SMTPUTF8", "DSN"])
    b = scripted(extensions=["PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 5000"])
    relay = routed(product, f"a={a.address}", f"b={b.address}", "moved.example", more='split = "fork"')
    with relay.dialogue() as client:
        offered = client.hello()
        assert offered["SIZE"] == "5000"
        assert "SMTPUTF8" in offered
        assert "DSN" not in offered
        client.say("MAIL FROM:<s@example.org> RET=HDRS", 555)
        b.extensions[:] = ["PIPELINING", "SIZE 5000"]
        b.drop()
        for order in (("x@a.example", "y@moved.example"), ("y@moved.example", "x@a.example")):
            client.say("MAIL FROM:<jürgen@example.org> BODY=8BITMIME SMTPUTF8", 250)
            for recipient in order:
                client.say(f"RCPT TO:<{recipient}>", 250 if "@a." in recipient else "451 4.3.0")
            client.say("DATA", 354)
            client.say("Subject: ü\r\n\r\nü\r\n.", 250)
        client.say("MAIL FROM:<s@example.org> SIZE=100", 250)
        client.say("RCPT TO:<x@a.example>", 250)
        client.say("RCPT TO:<y@moved.example>", 250)
        client.say("DATA", 354)
        client.say("Subject: u\r\n\r\nu\r\n.", 250)
    with relay.dialogue() as client:  # what the next client is told
        assert not {"SMTPUTF8", "8BITMIME"} & set(client.hello())
    assert [m.parameters for m in a.messages] == [("BODY=8BITMIME", "SMTPUTF8")] * 2 + [()]
    assert [m.parameters for m in b.messages] == [("SIZE=100",)]


def test_from_smtp_to_lmtp_and_back_within_a_session(product: Make, scripted: MakeServer) -> None:
    """Whoever answers, in one packet or line by line: LMTP takes one recipient, each server speaks for itself."""
    a, b = scripted(), scripted(lmtp=True)
    b.replies[".<full@moved.example>"] = "452 4.2.2 full"
    relay = routed(
        product, f"a={a.address}", f"b=lmtp://{b.address}", "moved.example", '["a", "b"]',
        more='return_after = "0"\ncopies = "others"',
    )  # fmt: skip
    lines = ["MAIL FROM:<s@example.org>", "RCPT TO:<x@moved.example>", "RCPT TO:<y@moved.example>", "DATA"]

    def replies(*, pipelined: bool) -> list[str]:
        if not pipelined:
            said = [client.say(line)[:3] for line in lines]
        else:
            client.send(*lines)
            said = [client.reply()[:3] for _ in lines]
        client.say("Subject: x\r\n\r\nx\r\n.", 250)
        return said

    def is_back() -> bool:
        """Whether the one that takes both at once answers again, as one transaction has to find out."""
        with relay.dialogue() as other:
            other.hello()
            other.send(*lines[:3], "RSET")
            return [other.reply()[:3] for _ in range(4)] == ["250"] * 4

    with relay.dialogue() as client:
        client.hello()
        for _ in range(2):
            assert replies(pipelined=True) == ["250", "250", "250", "354"]
            a.down()
            assert replies(pipelined=True) == ["250", "250", "452", "354"]
            assert replies(pipelined=False) == ["250", "250", "452", "354"]
            client.say("MAIL FROM:<s@example.org>", 250)
            client.say("RCPT TO:<full@moved.example>", 250)
            client.say("DATA", 354)
            client.say("Subject: x\r\n\r\nx\r\n.", "452 4.2.2 full")
            a.listen()
            wait_until(is_back, interval=0.2)
    b.replies.clear()
    wait_until(lambda: all(not row["pending"] for row in relay.json("queue", "summary")))
    for server in (a, b):  # what it took itself, and the copies of what the other took; nothing twice
        taken = sorted(recipient for m in server.messages for recipient in m.recipients)
        assert taken == ["x@moved.example"] * 6 + ["y@moved.example"] * 2


def test_whoever_answers_gets_what_requires_tls_by_verified_tls_only(
    product: Make, scripted: MakeServer, certificate: Certificate
) -> None:
    """A session that was offered REQUIRETLS meets a primary whose certificate is not verified: it gets no message."""
    offered = [*EXTENSIONS, "REQUIRETLS"]
    a, b = (scripted(extensions=offered, tls=certificate.server_context()) for _ in range(2))
    settings = {
        **QUICK,
        "smtp.tls_certificate": str(certificate.certificate),
        "smtp.tls_key": str(certificate.key),
    }
    relay = product(
        primary=f"a=smtp://{a.address}?tls=verify&ca_file={certificate.certificate}",
        backups=[f"b={b.address}"],
        settings=settings,
    )
    forced = ("--force", "--yes", "--note", "a test")
    with relay.dialogue() as client:
        client.hello()
        client.starttls(certificate.client_context())
        assert "REQUIRETLS" in client.hello()

        def rcpt(*codes: int | str) -> None:
            client.say("MAIL FROM:<s@example.org> REQUIRETLS", 250)
            client.say("RCPT TO:<x@example.com>", *codes)

        rcpt(250)
        client.body(b"Subject: x\r\n\r\nx\r\n")
        assert relay.run("move", "x@example.com", "--to", "b", *forced).returncode == 0
        rcpt("451 4.3.0")
        client.say("RSET", 250)
        assert relay.run("move", "x@example.com", "--back", *forced).returncode == 0
        rcpt(250)
        client.body(b"Subject: x\r\n\r\nx\r\n")
        assert relay.run("promote", "b", "--now", "--force", "--yes", "--reason", "a test").returncode == 0
        client.say("MAIL FROM:<s@example.org> REQUIRETLS", "451 4.3.0")
        client.say("EHLO client.example", 250)
        client.say("MAIL FROM:<s@example.org> REQUIRETLS", "550 5.7.30")
    wait_until(lambda: len(relay.json("failed", "list", "--destination", "b")) == 2)
    assert [m.parameters for m in a.messages] == [("REQUIRETLS",)] * 2
    assert not b.messages


def test_without_tls_nobody_is_offered_to_require_it(product: Make, scripted: MakeServer) -> None:
    """Nor while no primary has said what it offers, when other parameters are put off."""
    a = scripted()
    a.refuse()
    relay = product(primary=a.address, settings=QUICK, start=False)
    relay.start(wait=False)

    def said() -> str:
        with suppress(OSError), relay.dialogue() as client:
            client.hello()
            client.say("MAIL FROM:<s@example.org> RET=HDRS", "451")
            client.say("MAIL FROM:<s@example.org> REQUIRETLS", "550 5.7.30")
            return "done"
        return ""

    wait_until(said)
