"""Real Postfix on both sides of SMTP's extensions: CHUNKING, SMTPUTF8, DSN, and TLS that is verified."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support import corpus, stored_mail
from support.certificates import Certificate
from support.dialogue import Dialogue, Unexpected
from support.mail_site import DOMAINS, LITERAL, MakeProduct, StartPostfix, reconfigure
from support.postfix_instance import PostfixInstance
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import wait_until

pytestmark = pytest.mark.postfix

QUICK = {"retry.first": "1", "retry.longest": "2"}
HOPS = 2  # ours and the store's


def _store(postfix: StartPostfix, **settings: str) -> PostfixInstance:
    return postfix(PostfixInstance.store(DOMAINS, **LITERAL, **settings))


def _with_tls(certificate: Certificate, level: str = "may") -> dict[str, str]:
    return {
        "smtpd_tls_security_level": level,
        "smtpd_tls_cert_file": str(certificate.certificate),
        "smtpd_tls_key_file": str(certificate.key),
        "smtpd_tls_received_header": "yes",
    }


@pytest.mark.parametrize("count", [corpus.SOME, pytest.param(corpus.ALL, marks=pytest.mark.long)])
def test_varied_messages_in_chunks(product: MakeProduct, postfix: StartPostfix, count: int) -> None:
    """What comes to us by BDAT is at a Postfix primary and a Postfix backup, byte for byte, whatever the chunks."""
    old, new = _store(postfix), _store(postfix)
    relay = product(primary=old.address, backups=[new.address])
    mails = [mail for mail in corpus.mails(count) if mail.way == "bdat" or not mail.parameters]
    with relay.dialogue() as client:
        assert "CHUNKING" in client.hello()
        for number, mail in enumerate(mails):
            client.say(f"MAIL FROM:<{mail.sender}>", 250)
            for recipient in mail.recipients:
                client.say(f"RCPT TO:<{recipient}>", 250)
            # In one chunk, in two with the border anywhere, in many; ended with octets, or without.
            size = (len(mail.content) or 1, len(mail.content) // 2 + 1, 1000)[number % 3]
            chunks = [mail.content[start : start + size] for start in range(0, len(mail.content), size)]
            for chunk in chunks[:-1] if number % 2 else chunks:
                client.raw(b"BDAT %d\r\n" % len(chunk) + chunk)
                client.expect(250)
            last = chunks[-1] if number % 2 and chunks else b""
            client.raw(b"BDAT %d LAST\r\n" % len(last) + last)
            client.expect(250)
        client.quit()
    for store in (old, new):
        deliveries = stored_mail.wait_for(store, mails, hops=HOPS)
        assert not stored_mail.differences(mails, deliveries)


def test_a_backup_without_smtputf8(product: MakeProduct, postfix: StartPostfix) -> None:
    """A copy that needs SMTPUTF8 waits in the failed list until the Postfix there has it; other mail is not held up."""
    old, new = _store(postfix), _store(postfix, smtputf8_enable="no")
    relay = product(primary=old.address, backups=[new.address], settings=QUICK)
    header = "From: Jürgen <jürgen@bücher.example>\r\nSubject: Grüße\r\n\r\nÜmlaute\r\n".encode()
    utf8 = ("SMTPUTF8", "BODY=8BITMIME")
    mails = [
        corpus.Mail("utf8", header, ("empfänger@bücher.example", "你好@example.com"), "jürgen@bücher.example", utf8),
        corpus.simple(1, "plain@example.com"),
    ]
    with relay.dialogue() as client:
        assert "SMTPUTF8" in client.hello()
        for mail in mails:
            client.say(" ".join((f"MAIL FROM:<{mail.sender}>", *mail.parameters)), 250)
            for recipient in mail.recipients:
                client.say(f"RCPT TO:<{recipient}>", 250)
            client.body(mail.content)
        client.quit()
    at_old = stored_mail.wait_for(old, mails, hops=HOPS)
    assert not stored_mail.differences(mails, at_old)
    assert all(b" with UTF8SMTP id " in raw for raw in old.maildir_messages() if b"Gr\xc3\xbc\xc3\x9fe" in raw)
    stored_mail.wait_for(new, mails[1:], hops=HOPS)
    (row,) = wait_until(lambda: relay.json("failed", "list"))
    assert set(row["recipients"]) == set(mails[0].recipients)
    assert "does not offer SMTPUTF8" in row["reply"]
    reconfigure(new, smtputf8_enable="yes")
    assert relay.run("failed", "retry", "--all").returncode == 0
    assert not stored_mail.differences(mails, stored_mail.wait_for(new, mails, hops=HOPS))


def test_dsn_parameters_through_postfix(product: MakeProduct, postfix: StartPostfix) -> None:
    """A Postfix behind us hands on the very ENVID, RET, NOTIFY and ORCPT that our client gave; no copy is reported."""
    extensions = (*EXTENSIONS, "DSN")
    with ScriptedServer(extensions=extensions) as behind_old, ScriptedServer(extensions=extensions) as behind_new:
        old, new = (postfix(PostfixInstance.front(server.port)) for server in (behind_old, behind_new))
        relay = product(primary=old.address, backups=[new.address])
        envelope, original = "ENVID=QQ+2BMixed+3DCase", "ORCPT=rfc822;First+2BAddress@Example.ORG"
        with relay.dialogue() as client:
            assert "DSN" in client.hello()
            client.say(f"MAIL FROM:<a@example.net> RET=HDRS {envelope}", 250)
            client.say(f"RCPT TO:<one@example.com> NOTIFY=SUCCESS,DELAY {original}", 250)
            client.say("RCPT TO:<two@example.com> NOTIFY=NEVER", 250)
            client.say("RCPT TO:<three@example.com>", 250)
            client.body(b"Subject: x\r\n\r\ntext\r\n")
            client.quit()
        for server, notify in ((behind_old, "NOTIFY=SUCCESS,DELAY"), (behind_new, "NOTIFY=NEVER")):
            (message,) = server.wait_for(1)
            given = message.recipient_parameters
            assert set(given["one@example.com"]) == {notify, original}
            assert "NOTIFY=NEVER" in given["two@example.com"]
            # Postfix makes an ORCPT where there was none.
            third = {"NOTIFY=NEVER"} if server is behind_new else set()
            assert {p for p in given["three@example.com"] if not p.startswith("ORCPT=")} == third
            is_primary = server is behind_old
            assert (envelope in message.parameters) == ("RET=HDRS" in message.parameters) == is_primary
        # And nobody hears anything: the servers behind do DSN, so no report is ours or Postfix's to make.
        for server in (behind_old, behind_new):
            assert len(server.messages) == 1


@pytest.mark.parametrize("side", ["primary", "backup"])
def test_tls_verified(
    product: MakeProduct, postfix: StartPostfix, certificate: Certificate, tmp_path: Path, side: str
) -> None:
    """A Postfix whose certificate is not the one we trust gets nothing; once it is, it gets everything, under TLS."""
    other = Certificate(tmp_path, "other")
    plain = _store(postfix)
    secured = _store(postfix, **_with_tls(other, "encrypt"))
    address = f"smtp://{secured.address}?tls=verify&ca_file={certificate.certificate}"
    primary, backup = (address, plain.address) if side == "primary" else (plain.address, address)
    relay = product(primary=primary, backups=[backup], settings=QUICK, start=False)
    relay.start(wait=False)
    wait_until(lambda: _greets(relay.smtp_port), message=lambda: relay.log)
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(5)]
    if side == "primary":
        with relay.dialogue() as client:
            client.hello()
            assert "4.4.1" in client.say("MAIL FROM:<a@example.net>", 451)
            client.quit()
    else:
        for mail in mails:
            relay.send(mail.sender, *mail.recipients, data=mail.content)
        stored_mail.wait_for(plain, mails, hops=HOPS)
        wait_until(lambda: "certificate not accepted" in str(relay.summary()["reason"]), message=lambda: relay.log)
        assert relay.summary()["pending"] == len(mails)
    assert not secured.maildir_messages()
    reconfigure(secured, **_with_tls(certificate, "encrypt"))
    if side == "primary":
        for mail in mails:
            relay.send(mail.sender, *mail.recipients, data=mail.content)
    relay.run("queue", "flush")
    for store in (plain, secured):
        assert not stored_mail.differences(mails, stored_mail.wait_for(store, mails, hops=HOPS))
    for raw in secured.maildir_messages():
        assert re.search(rb"\(using TLSv1\.[23] ", raw)
        assert b" with ESMTPS id " in raw


def _greets(port: int) -> bool:
    try:
        with Dialogue(port, timeout=5) as client:
            client.quit()
    except (OSError, Unexpected):
        return False
    return True
