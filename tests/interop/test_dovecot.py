"""The promise with Dovecot's LMTP server, which answers for each recipient, as backup and as primary."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from support import corpus, dovecot_instance, stored_mail
from support.certificates import Certificate
from support.dovecot_instance import DovecotInstance
from support.mail_site import MakeProduct, Site, StartPostfix
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

MakeDovecot = Callable[..., DovecotInstance]


@pytest.fixture
def dovecot() -> Iterator[MakeDovecot]:
    """Call it for a started Dovecot; its arguments are the instance's."""
    if reason := dovecot_instance.unavailable():
        pytest.skip(reason)
    with ExitStack() as ends:

        def start(*users: Any, **options: Any) -> DovecotInstance:
            instance = DovecotInstance(*users, **options)
            ends.callback(instance.remove)
            return instance.start()

        yield start


@pytest.mark.postfix
@pytest.mark.parametrize("count", [corpus.SOME, pytest.param(corpus.ALL, marks=pytest.mark.long)])
def test_varied_messages_with_dovecot(
    product: MakeProduct, postfix: StartPostfix, dovecot: MakeDovecot, count: int
) -> None:
    """Dovecot as backup gets what Postfix as primary gets, byte for byte; what it has no extension for is told."""
    site = Site(product, postfix, backup=dovecot())
    mails = [mail for mail in corpus.mails(count) if not _folder_of_another_name(mail)]
    for mail in mails:
        mail.submit(site.front)
    stored_mail.wait_for(site.old, mails)
    fit = [mail for mail in mails if "SMTPUTF8" not in mail.parameters]
    stored_mail.wait_for(site.new, fit)
    site.wait_settled()
    assert not stored_mail.differences(mails, stored_mail.all_of(site.old))
    assert not stored_mail.differences(fit, stored_mail.all_of(site.new))
    rows = site.product.json("failed", "list")
    unfit = {recipient for mail in mails if mail not in fit for recipient in mail.recipients}
    assert {recipient for row in rows for recipient in row["recipients"]} == unfit
    assert all("does not offer SMTPUTF8" in row["reply"] for row in rows)


def test_a_reply_for_each_recipient(product: MakeProduct, dovecot: MakeDovecot, primary: ScriptedServer) -> None:
    """Of six, one is unknown and one has no room: the other four have the copy once, and these two when put right."""
    users = [f"{name}@example.com" for name in ("one", "two", "full", "three", "four")]
    backup = dovecot(users, full=["full@example.com"])
    relay = product(primary=primary.address, backups=[backup.address])
    recipients = (*users[:2], "unknown@example.com", *users[2:])
    relay.send("a@example.net", *recipients)
    backup.wait_for(4)
    # The 5xx to RCPT and the 5xx to the dot are one copy's.
    wait_until(lambda: sum(len(row["recipients"]) for row in relay.json("failed", "list")) == 2)
    (row,) = relay.json("failed", "list")
    assert set(row["recipients"]) == {"unknown@example.com", "full@example.com"}
    assert re.search("5.1.1 .*doesn't exist|5.2.2 .*Quota exceeded", row["reply"])
    backup.stop()  # what serves a kept connection knows only the users of before
    backup.know((*users, "unknown@example.com"))
    backup.start()
    assert relay.run("failed", "retry", "--all").returncode == 0
    backup.wait_for(6)
    deliveries = stored_mail.all_of(backup, hops=2)
    assert sorted(delivery.recipient for delivery in deliveries) == sorted(recipients)
    assert {delivery.content for delivery in deliveries} == {b"Subject: test\n\ntext\n"}
    assert not relay.json("failed", "list")


def test_many_copies_on_one_connection(product: MakeProduct, dovecot: MakeDovecot, primary: ScriptedServer) -> None:
    """Copies that waited leave over kept connections, pipelined; each reply is taken for the right recipient."""
    backup = dovecot()
    backup.stop()
    relay = product(
        primary=primary.address, backups=[backup.address], settings={"retry.first": "1", "retry.longest": "2"}
    )
    count = 30
    with relay.dialogue() as client:
        client.hello()
        for n in range(count):
            client.mail("a@example.net", f"b{n}@example.com", f"c{n}@example.com", data=b"Subject: %d\r\n\r\n" % n)
        client.quit()
    backup.start()
    relay.run("queue", "flush")
    backup.wait_for(2 * count)
    said = [text for text in backup.said if b"MAIL FROM" in text]
    assert len(said) < count
    transactions = re.findall(rb" MAIL FROM.*\r\n.* RCPT TO.*\r\n.* RCPT TO.*\r\n.* DATA\r\n", b"".join(said))
    assert len(transactions) == count
    deliveries = stored_mail.all_of(backup, hops=2)
    assert {(d.recipient[1:], d.subject) for d in deliveries} == {(f"{n}@example.com", str(n)) for n in range(count)}


def test_dovecot_under_verified_tls(
    product: MakeProduct, dovecot: MakeDovecot, primary: ScriptedServer, certificate: Certificate
) -> None:
    """STARTTLS with LMTP, the certificate looked at."""
    backup = dovecot(certificate=certificate.certificate, key=certificate.key)
    relay = product(primary=primary.address, backups=[f"{backup.address}?tls=verify&ca_file={certificate.certificate}"])
    relay.send("a@example.net", "b@example.com", "c@example.com")
    for raw in backup.wait_for(2):
        assert b"with LMTPS" in raw


@pytest.mark.postfix
def test_dovecot_as_primary(product: MakeProduct, postfix: StartPostfix, dovecot: MakeDovecot) -> None:
    """LMTP answers the dot for each recipient and SMTP only once: so the primary gets one recipient at a time.

    The MTA in front sends the message once for each, and hears of each what Dovecot said.
    """
    old = dovecot(["one@example.com", "two@example.com", "full@example.com"], full=["full@example.com"])
    site = Site(product, postfix, primary=old, front={"smtp_destination_recipient_limit": "1"})
    mail = corpus.simple(1, "one@example.com", "full@example.com", "two@example.com", "no@example.com", sender="")
    mail.submit(site.front)
    site.wait_settled()
    for store in (site.old, site.new):
        arrived = stored_mail.wait_for(store, [corpus.simple(1, "one@example.com", "two@example.com", sender="")])
        assert sorted(d.recipient for d in arrived) == ["one@example.com", "two@example.com"]
        assert {d.content for d in arrived} == {mail.stored}
    assert re.search(r"to=<full@example.com>.* said: 552 5\.2\.2 ", site.front.log)
    assert re.search(r"to=<no@example.com>.*550 5\.1\.1", site.front.log)


def test_a_second_recipient_for_an_lmtp_primary(product: MakeProduct, dovecot: MakeDovecot) -> None:
    """A client with two recipients is told to send again for the second; nobody is lost, nobody gets it twice."""
    old, new = dovecot(), dovecot()
    relay = product(primary=old.address, backups=[new.address])
    with relay.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.net>", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.say("RCPT TO:<c@example.com>", "452 4.5.3")
        client.body(b"Subject: x\r\n\r\ntext\r\n")
        client.mail("a@example.net", "c@example.com")
        client.quit()
    for store in (old, new):
        store.wait_for(2)
        assert sorted(d.recipient for d in stored_mail.all_of(store, hops=2)) == ["b@example.com", "c@example.com"]


def _folder_of_another_name(mail: corpus.Mail) -> bool:
    """Say whether Dovecot's folder for a recipient is not called like it."""
    return any(set("/%\"' ") & set(r) or not r.islower() for r in mail.recipients)
