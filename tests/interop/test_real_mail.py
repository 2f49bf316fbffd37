"""What people and programs have really sent passes as it is: the octets that come in go out, on both legs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from support import real_mail
from support.dialogue import Dialogue
from support.product import Product
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import wait_until

ENOUGH = 300
OUR_LINE = re.compile(rb"Received: from [^\r\n]*\r\n\tby localhost \(smtp-dup\) with ESMTP id \w+;\r\n\t[^\r\n]*\r\n")


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """All the real mail that can be had; skips where that is too little."""
    found, lacking = real_mail.real_mails(tmp_path_factory.mktemp("real-mail"))
    if len(found) < ENOUGH:
        pytest.skip(f"only {len(found)} real messages can be had here: {lacking}")
    return list(found.values())


@pytest.mark.parametrize("way", ["DATA", "BDAT"])
def test_real_mail(
    product: Callable[..., Product], scripted: Callable[..., ScriptedServer], mails: list[bytes], way: str
) -> None:
    """At least 300 messages, by DATA and in chunks: each is at both servers, one Received line added."""
    primary, backup = (scripted(extensions=(*EXTENSIONS, "CHUNKING")) for _ in range(2))
    # The bounces of loops have as many trace lines as a loop has.
    relay = product(primary=primary.address, backups=[backup.address], settings={"smtp.max_hops": "1000"})
    with relay.dialogue() as client:
        client.hello()
        for number, mail in enumerate(mails):
            client.say(f"MAIL FROM:<{number}@example.net> BODY=8BITMIME", 250)
            client.say(f"RCPT TO:<{number}@example.com>", 250)
            _send(client, mail, way)
        client.quit()
    primary.wait_for(len(mails))
    backup.wait_for(len(mails), timeout=60)
    wait_until(lambda: relay.summary()["pending"] == 0)
    for server in (primary, backup):
        assert len(server.messages) == len(mails)
        for message in server.messages:
            sent = mails[int(message.sender.partition("@")[0])]
            ours = OUR_LINE.match(message.body)
            assert ours, message.body[:500]
            # What was not ended by CRLF is, since that is where the dot's line begins.
            assert message.body[ours.end() :] == (sent if sent.endswith(b"\r\n") else sent + b"\r\n")


def _send(client: Dialogue, mail: bytes, way: str) -> None:
    if way == "DATA":
        client.body(mail)
        return
    half = len(mail) // 2
    client.raw(b"BDAT %d\r\n" % half + mail[:half])
    client.expect(250)
    client.raw(b"BDAT %d LAST\r\n" % (len(mail) - half) + mail[half:])
    client.expect(250)
