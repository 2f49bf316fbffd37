"""What a copy says to its backup, octet by octet, and what becomes of one that the backup cannot represent."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from relay.client.connection import Connection
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.recipient import Recipient
from support.product import Product
from support.reactions import Trickle
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import wait_until
from workers.delivery.transaction import mail_command

Make = Callable[..., Product]

QUICK = {
    "retry.first": "1",
    "retry.longest": "1",
    "relay.timeout_seconds": "5",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
}


@pytest.mark.parametrize(
    ("offered", "parameters", "body", "reason"),
    [
        (
            ["PIPELINING", "SIZE", "SMTPUTF8"],
            "BODY=8BITMIME",
            "Subject: x\r\n\r\n\u00e4\r\n".encode(),
            "8BITMIME.*enable",
        ),
        (["PIPELINING", "8BITMIME"], "SMTPUTF8 BODY=8BITMIME", "Subject: \u00e4\r\n\r\n".encode(), "SMTPUTF8.*enable"),
        (
            ["SIZE 1000", "8BITMIME"],
            "",
            b"Subject: x\r\n\r\n" + b"x" * 900 + b"\r\n",
            "takes 1000.*raise its size limit",
        ),
        ([], "BODY=8BITMIME", b"Subject: x\r\n\r\n", "8BITMIME.*enable"),
    ],
    ids=["8BITMIME", "SMTPUTF8", "SIZE", "a bare server"],
)
def test_what_a_backup_cannot_represent(
    product: Make,
    primary: ScriptedServer,
    scripted: Callable[..., ScriptedServer],
    offered: list[str],
    parameters: str,
    body: bytes,
    reason: str,
) -> None:
    """It is in the failed list at once, with what to change there; no octet of it was sent, and the next copy goes."""
    bare = scripted(extensions=offered)
    made = product(primary=primary.address, backups=[bare.address], settings=QUICK)
    with made.dialogue() as client:
        client.hello()
        client.say(f"MAIL FROM:<a@example.com> {parameters}".strip(), 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.body(body)
        (failure,) = wait_until(lambda: made.json("failed", "list"), message=lambda: made.log)
        client.mail("next@example.com", "b@example.com")
    assert re.search(reason, failure["reply"])
    assert failure["reply"].startswith("554 5.")
    assert failure["attempts"] == 1
    assert [t.sender for t in bare.wait_for(1)] == ["next@example.com"]
    assert not [c for c in bare.commands if c.startswith("MAIL FROM:<a@")]
    # When the backup has been changed as it says, a retry delivers what was failed, unconverted.
    bare.extensions[:] = [*EXTENSIONS]
    bare.drop()
    assert made.run("failed", "retry", failure["id"]).returncode == 0
    copies = {t.sender: t for t in bare.wait_for(2)}
    assert copies["a@example.com"].content == body
    for word in parameters.split():
        assert word in copies["a@example.com"].parameters


def test_dsn_and_what_else_is_offered(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """Nobody is notified of a copy; ORCPT, AUTH, priority and a time to hold it are said where they are offered."""
    offers = [*EXTENSIONS, "DSN", "AUTH PLAIN", "MT-PRIORITY MIXER", "FUTURERELEASE 86400 2030-01-01T00:00:00Z"]
    primary, full, bare = scripted(extensions=offers), scripted(extensions=offers), scripted()
    made = product(primary=primary.address, backups=[full.address, bare.address], settings=QUICK)
    with made.dialogue() as client:
        client.hello()
        given = "RET=HDRS ENVID=Q+2Bq AUTH=ann+40example.com MT-PRIORITY=-3 HOLDFOR=3600 BODY=8BITMIME"
        client.say(f"MAIL FROM:<a@example.com> {given}", 250)
        client.say("RCPT TO:<b@example.com> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;B+2Bb@Example.com", 250)
        client.say("RCPT TO:<c@example.com> ORCPT=rfc822;not+xtext", 250)
        client.say("RCPT TO:<d@example.com>", 250)
        client.body(b"Subject: x\r\n\r\n")
    (copy,) = full.wait_for(1)
    (other,) = bare.wait_for(1)
    assert f"MAIL FROM:<a@example.com> {given}" in primary.commands
    size = f"SIZE={len(copy.wire)}"
    hold = next(p for p in copy.parameters if p.startswith("HOLDFOR="))
    assert 3590 <= int(hold.removeprefix("HOLDFOR=")) <= 3600
    assert copy.parameters == ("BODY=8BITMIME", size, "AUTH=ann+40example.com", "MT-PRIORITY=-3", hold)
    assert other.parameters == ("BODY=8BITMIME", size)
    assert [c for c in full.commands if c.startswith("RCPT")] == [
        "RCPT TO:<b@example.com> NOTIFY=NEVER ORCPT=rfc822;B+2Bb@Example.com",
        "RCPT TO:<c@example.com> NOTIFY=NEVER",
        "RCPT TO:<d@example.com> NOTIFY=NEVER",
    ]
    assert [c for c in bare.commands if c.startswith("RCPT")] == [f"RCPT TO:<{n}@example.com>" for n in "bcd"]


class _Offers(Connection):
    """As much of a connection as MAIL is made for."""

    def __init__(self, *names: str) -> None:
        self.extensions = dict.fromkeys(names, "")


@pytest.mark.parametrize(
    ("parameter", "age", "said"),
    [
        ("HOLDFOR=100", 99.5, []),
        ("HOLDFOR=100", 40, ["HOLDFOR=59", "HOLDFOR=60"]),
        ("HOLDUNTIL=2001-01-01T00:00:00Z", 0, []),
        ("HOLDUNTIL=someday", 0, []),
        ("HOLDUNTIL={tomorrow}", 0, ["HOLDUNTIL={tomorrow}"]),
        ("holduntil={tomorrow}", 0, ["HOLDUNTIL={tomorrow}"]),
    ],
)
def test_a_time_that_is_over(parameter: str, age: float, said: list[str]) -> None:
    """A copy that comes late is not held longer, nor refused for a time in the past."""
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    given = parameter.replace("{tomorrow}", tomorrow)
    envelope = Envelope("x" * 16, "a@example.com", (Recipient("b@example.com"),), time.time() - age, 10, (given,))
    destination = Destination(name="new", host="127.0.0.1", port=25)
    command = mail_command(envelope, destination, _Offers("FUTURERELEASE")).decode()
    wanted = [f"MAIL FROM:<a@example.com> {text.replace('{tomorrow}', tomorrow)}" for text in said]
    assert command in (wanted or ["MAIL FROM:<a@example.com>"])


def test_lmtp_backup(product: Make, primary: ScriptedServer, scripted: Callable[..., ScriptedServer]) -> None:
    """An LMTP backup answers for each recipient: one taken, one tried again, one failed, each once."""
    store = scripted(lmtp=True)
    store.replies[".<later@example.com>"] = ["451 4.2.2 full", None]
    store.replies[".<never@example.com>"] = "552 5.2.2 full for good"
    made = product(primary=primary.address, backups=[f"lmtp://{store.address}"], settings=QUICK)
    body = b"Subject: x\r\n\r\n.\r\n..\r\n\xe4\0\r\n"
    with made.dialogue() as client:
        client.hello()
        client.mail("a@example.com", "now@example.com", "later@example.com", "never@example.com", data=body)
    store.wait_until(lambda: len([t for t in store.transactions if t.replies]) == 2)
    (failure,) = wait_until(lambda: made.json("failed", "list"))
    assert failure["recipients"] == ["never@example.com"]
    assert "552 5.2.2 full for good" in failure["reply"]
    first, second = (t for t in store.transactions if t.replies)
    assert (first.recipients, second.recipients) == (
        ["now@example.com", "later@example.com", "never@example.com"],
        ["later@example.com"],
    )
    assert first.content == second.content == primary.messages[0].content == body
    assert {c.split(" ")[0] for c in store.commands} <= {"LHLO", "MAIL", "RCPT", "DATA", "QUIT", "RSET"}
    wait_until(lambda: made.summary()["pending"] == 0)


@pytest.mark.parametrize(
    "granted", ["XFORWARD NAME ADDR PORT PROTO HELO IDENT SOURCE", "XCLIENT NAME ADDR PORT PROTO HELO"]
)
def test_both_legs_hear_whose_mail_it_is(product: Make, scripted: Callable[..., ScriptedServer], granted: str) -> None:
    """XFORWARD or XCLIENT with xtext, lines of 512 octets at most, before MAIL, the same octets on both legs."""
    offers = [*EXTENSIONS, granted]
    primary, backup = scripted(extensions=offers), scripted(extensions=offers)
    made = product(primary=primary.address, backups=[backup.address], settings=QUICK)
    verb = granted.split(" ", maxsplit=1)[0]
    with made.dialogue() as client:
        client.hello()
        client.say("XFORWARD NAME=spike.example ADDR=IPv6:2001:db8::7 PORT=4711 PROTO=ESMTP", 250)
        client.say("XFORWARD HELO=a+2Bb+3D+C3+A4" + "x" * 200 + " IDENT=4Xq" + "y" * 200 + " SOURCE=REMOTE", 250)
        client.mail("a@example.com", "b@example.com")
    backup.wait_for(1)
    told = []
    for server in (primary, backup):
        lines = [c for c in server.commands if c.startswith(verb)]
        assert lines
        assert all(len(line) <= 510 for line in lines)
        words = " ".join(line.removeprefix(f"{verb} ") for line in lines).split(" ")
        assert "ADDR=IPv6:2001:db8::7" in words
        assert "HELO=a+2Bb+3D+C3+A4" + "x" * 200 in words
        verbs = [c.split(" ")[0] for c in server.commands]
        assert verbs.index("MAIL") > verbs.index(verb)
        told.append(lines)
    assert told[0] == told[1]


def test_replies_an_octet_at_a_time(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A backup whose replies come in packets of one octet, its pipelined ones too, is understood."""
    for key, text in (
        ("CONNECT", "220-a\n220 b"),
        ("MAIL", "250-2.1.0 a\n250 2.1.0 b"),
        ("DATA", "354 go"),
        (".", "250 ok"),
    ):
        backup.replies[key] = Trickle(text, 0.001)
    backup.replies["RCPT"] = Trickle("250 2.1.5 ok", 0.001)
    backup.replies["RCPT TO:<no"] = Trickle("550 5.1.1 no", 0.001)
    made = product(primary=primary.address, backups=[backup.address], settings=QUICK)
    with made.dialogue() as client:
        client.hello()
        for n in range(5):
            client.mail(f"s{n}@example.com", "b@example.com", "no@example.com", "c@example.com")
    copies = backup.wait_for(5)
    assert all(copy.recipients == ["b@example.com", "c@example.com"] for copy in copies)
    wait_until(lambda: len(made.json("failed", "list")) == 5)
    assert {tuple(row["recipients"]) for row in made.json("failed", "list")} == {("no@example.com",)}
