"""The promise with real Postfix on all sides: one in front with a transport map, one as primary, one as backup."""

from __future__ import annotations

import re

import pytest

from support import corpus, stored_mail
from support.mail_site import DOMAINS, MakeProduct, Site, StartPostfix, deliver_all, recipients, reconfigure
from support.waiting import wait_until

pytestmark = pytest.mark.postfix

# A server for the world: nobody may relay.
STRICT = {"mynetworks": "", "smtpd_relay_restrictions": "reject_unauth_destination"}


@pytest.fixture
def site(product: MakeProduct, postfix: StartPostfix) -> Site:
    """A whole site in which everybody accepts everything."""
    return Site(product, postfix)


@pytest.mark.parametrize("count", [corpus.SOME, pytest.param(corpus.ALL, marks=pytest.mark.long)])
def test_varied_messages(site: Site, count: int) -> None:
    """MIME, 8-bit, UTF-8 addresses, dots, long lines, 5 MB...: everything is at both stores, once, byte for byte."""
    mails = corpus.mails(count)
    for mail in mails:
        mail.submit(site.front)
    stored_mail.wait_for(site.old, mails)
    stored_mail.wait_for(site.new, mails)
    site.wait_settled()
    at_old, at_new = stored_mail.all_of(site.old), stored_mail.all_of(site.new)
    assert not stored_mail.differences(mails, at_old)
    assert not stored_mail.differences(mails, at_new)
    assert {d.recipient: d.id for d in at_old} == {d.recipient: d.id for d in at_new}
    row = site.product.summary()
    assert (row["failed"], row["delivered"]) == (0, len({d.id for d in at_new}))


def test_nobody_hears_of_the_backup(site: Site) -> None:
    """A sender who asks for a success report gets the primary's, and none about the copy."""
    mail = corpus.Mail(
        "report",
        b"Subject: report\r\n\r\ntext\r\n",
        ("b@example.com",),
        "sender@example.com",
        recipient_parameters=("NOTIFY=SUCCESS,FAILURE",),
    )
    mail.submit(site.front)
    site.old.wait_for(2)
    site.new.wait_for(1)
    site.wait_settled()
    report = next(raw for raw in site.old.maildir_messages() if b"multipart/report" in raw)
    assert b"Final-Recipient: rfc822; b@example.com" in report
    assert b"Action: delivered" in report
    assert len(site.old.maildir_messages()) == 2
    assert [d.recipient for d in stored_mail.all_of(site.new)] == ["b@example.com"]


def test_primary_refuses_one_recipient(site: Site) -> None:
    """A bounce for just that one; the others have the message, and the copy is for just them."""
    reconfigure(site.old, smtpd_recipient_restrictions=_access("no@example.com", "550 5.1.1 no such user here"))
    mail = corpus.simple(1, "one@example.com", "no@example.com", "two@example.com")
    mail.submit(site.front)
    for store in (site.old, site.new):
        store.wait_for(3)
    site.wait_settled()
    for store in (site.old, site.new):
        # The bounce is mail like any other, made by the front, and comes by the same way.
        assert sorted(recipients(store)) == ["one@example.com", "sender@example.com", "two@example.com"]
        (bounce,) = (raw for raw in store.maildir_messages() if b"multipart/report" in raw)
        assert re.findall(rb"Final-Recipient: rfc822; (.*)", bounce) == [b"no@example.com"]
        assert b"550 5.1.1 " in bounce
        assert b"no such user here" in bounce
        assert b"smtp-dup" not in bounce.partition(b"multipart/report")[2].partition(b"message/delivery-status")[0]
    assert not site.product.json("failed", "list")


def test_primary_refuses_the_message(site: Site) -> None:
    """What the primary refuses at its end is bounced by the front and not copied."""
    checks = site.old.directory / "etc" / "checks"
    checks.write_text("/^Subject: simple 1$/ REJECT no such thing here\n")
    reconfigure(site.old, header_checks=f"regexp:{checks}", nested_header_checks="")
    corpus.simple(1, "one@example.com").submit(site.front)
    corpus.simple(2, "two@example.com").submit(site.front)
    for store in (site.old, site.new):
        store.wait_for(2)
    site.wait_settled()
    for store in (site.old, site.new):
        assert sorted(recipients(store)) == ["sender@example.com", "two@example.com"]
        (bounce,) = (raw for raw in store.maildir_messages() if b"multipart/report" in raw)
        assert b"no such thing here" in bounce


def test_primary_defers(site: Site) -> None:
    """What the primary defers stays in the front's queue; later it is delivered and copied, once."""
    reconfigure(site.old, smtpd_recipient_restrictions=_access("later@example.com", "450 4.2.1 come back later"))
    mail = corpus.simple(1, "now@example.com", "later@example.com")
    mail.submit(site.front)
    for store in (site.old, site.new):
        store.wait_for(1)
    wait_until(lambda: "come back later" in site.front.log, message=lambda: site.front.log)
    assert site.front.queued()
    assert recipients(site.new) == ["now@example.com"]
    reconfigure(site.old, smtpd_recipient_restrictions="")
    site.front.flush()
    for store in (site.old, site.new):
        stored_mail.wait_for(store, [mail])
    site.wait_settled()
    for store in (site.old, site.new):
        assert not stored_mail.differences([mail], stored_mail.all_of(store))


def test_primary_is_down(site: Site) -> None:
    """The front keeps its mail; nothing bounces, nothing is copied before the primary has it, nothing is lost."""
    site.old.stop()
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(30)]
    for mail in mails:
        mail.submit(site.front)
    wait_until(lambda: site.front.log.count("status=deferred") >= len(mails), message=lambda: site.front.log[-3000:])
    assert len(site.front.queued()) >= len(mails)
    assert not recipients(site.new)
    site.old.start()
    deliver_all(site, mails)
    for store in (site.old, site.new):
        assert not stored_mail.differences(mails, stored_mail.all_of(store))
    assert "status=bounced" not in site.front.log


def test_backup_is_down(site: Site) -> None:
    """The front and the primary notice nothing; the copies wait and go out once."""
    site.new.stop()
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(30)]
    for mail in mails:
        mail.submit(site.front)
    stored_mail.wait_for(site.old, mails)
    wait_until(site.front.queue_empty)
    assert site.product.summary()["pending"] == len(mails)
    site.new.start()
    assert site.product.run("queue", "flush").returncode == 0
    stored_mail.wait_for(site.new, mails)
    site.wait_settled()
    assert not stored_mail.differences(mails, stored_mail.all_of(site.new))


def test_backup_knows_not_all_users(site: Site) -> None:
    """The failed list is exactly the users whom the backup lacks; once it has them `failed retry --all` delivers."""
    known = " ".join(f"{{{name}@example.com = all/}}" for name in ("one", "two", "three"))
    reconfigure(site.new, **STRICT, virtual_mailbox_maps=f"inline:{{ {known} }}")
    mails = [
        corpus.simple(1, "one@example.com", "new-a@example.com", "two@example.com"),
        corpus.simple(2, "three@example.com"),
        corpus.simple(3, "new-b@example.com", "new-c@example.com"),
    ]
    for mail in mails:
        mail.submit(site.front)
    stored_mail.wait_for(site.old, mails)
    wait_until(lambda: len(site.product.json("failed", "list")) == 2, message=lambda: site.product.log[-3000:])
    site.wait_settled()
    rows = site.product.json("failed", "list")
    refused = ["new-a@example.com"], ["new-b@example.com", "new-c@example.com"]
    assert sorted(row["recipients"] for row in rows) == [*refused]
    assert all("550 5.1.1 " in row["reply"] and "User unknown in virtual mailbox table" in row["reply"] for row in rows)
    assert sorted(recipients(site.new)) == ["one@example.com", "three@example.com", "two@example.com"]
    reconfigure(site.new, virtual_mailbox_maps="static:all/")
    assert site.product.run("failed", "retry", "--all").returncode == 0
    stored_mail.wait_for(site.new, mails)
    site.wait_settled()
    assert not site.product.json("failed", "list")
    assert not stored_mail.differences(mails, stored_mail.all_of(site.new))


def test_backup_denies_relaying(site: Site) -> None:
    """The first day of a migration: a backup that refuses everything is paused; put right, it gets everything, once."""
    reconfigure(site.new, **STRICT, virtual_mailbox_domains="other.example")
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(60)]
    for mail in mails:
        mail.submit(site.front)
    stored_mail.wait_for(site.old, mails)
    wait_until(lambda: site.product.summary()["state"] == "paused", message=lambda: site.product.log[-3000:])
    row = site.product.summary()
    assert "554 5.7.1" in row["reason"]
    assert "Relay access denied" in row["reason"]
    assert row["failed"] + row["pending"] == len(mails)
    assert 20 <= row["failed"] <= 25  # and one for each probe
    reconfigure(site.new, virtual_mailbox_domains=" ".join(DOMAINS))
    assert site.product.run("queue", "flush").returncode == 0
    assert site.product.run("failed", "retry", "--all").returncode == 0
    stored_mail.wait_for(site.new, mails)
    site.wait_settled()
    assert not site.product.json("failed", "list")
    assert not stored_mail.differences(mails, stored_mail.all_of(site.new))


def test_backup_takes_less(site: Site) -> None:
    """A message that is too large for the backup is in the failed list with a reason, until the limit is raised."""
    reconfigure(site.new, message_size_limit="20000")
    mails = [
        corpus.simple(1, "small@example.com"),
        corpus.Mail("large", b"Subject: large\r\n\r\n" + b"x" * 50_000 + b"\r\n", ("large@example.com",)),
    ]
    for mail in mails:
        mail.submit(site.front)
    stored_mail.wait_for(site.old, mails)
    wait_until(lambda: site.product.json("failed", "list"))
    (row,) = site.product.json("failed", "list")
    assert row["recipients"] == ["large@example.com"]
    assert "20000" in row["reply"]
    reconfigure(site.new, message_size_limit="100000")
    assert site.product.run("failed", "retry", "--all").returncode == 0
    stored_mail.wait_for(site.new, mails)
    site.wait_settled()
    assert not stored_mail.differences(mails, stored_mail.all_of(site.new))


def _access(address: str, reply: str) -> str:
    return f"check_recipient_access inline:{{ {{{address} = {reply}}} }}, permit"
