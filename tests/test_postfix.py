"""The promise with real Postfix on all sides: one in front with a transport map, one as primary, one as backup."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

import corpus
import exim_instance
import stored
from exim_instance import EximInstance
from postfix_instance import PostfixInstance
from product import Product
from reactions import Close, Gate
from relay import ledger
from scripted_server import ScriptedServer
from stored import Stored
from waiting import wait_until

pytestmark = pytest.mark.postfix

Make = Callable[..., Product]
Start = Callable[[PostfixInstance], PostfixInstance]

QUICK = {"retry.first": "1", "retry.longest": "2", "relay.timeout_seconds": "5"}
DOMAINS = ("example.com", "bücher.example")
# By default Postfix removes Bcc, Content-Length and Return-Path, and puts a space where there is a lone CR.
LITERAL = {"message_drop_headers": "", "cleanup_replace_stray_cr_lf": "no"}
# A server for the world: nobody may relay, and only these have a mailbox.
STRICT = {"mynetworks": "", "smtpd_relay_restrictions": "reject_unauth_destination"}
# So that a deferred message waits until the test says flush.
PATIENT = {"minimal_backoff_time": "300s", "maximal_backoff_time": "300s", "queue_run_delay": "300s"}


class Site:
    """Postfix in front, smtp-dup, and a Postfix store on either side."""

    def __init__(self, product: Make, postfix: Start, **settings: str) -> None:
        self.old = postfix(PostfixInstance.store(DOMAINS, **LITERAL))
        self.new = postfix(PostfixInstance.store(DOMAINS, **LITERAL))
        self.product = product(
            primary=self.old.address,
            backups=[self.new.address],
            settings={**QUICK, **{key.replace("__", "."): value for key, value in settings.items()}},
        )
        self.front = postfix(PostfixInstance.front(self.product.smtp_port, **LITERAL))

    def wait_settled(self, timeout: float = 60) -> None:
        """Wait until nothing is on its way anywhere: neither in Postfix's queue nor in ours."""
        wait_until(self.front.queue_empty, timeout, lambda: f"in the front's queue:\n{self.front.log[-3000:]}", 0.2)
        wait_until(
            lambda: (row := self.product.summary())["pending"] == row["retrying"] == 0,
            timeout,
            lambda: f"{self.product.json('queue', 'list')}\n{self.product.log[-3000:]}",
            0.2,
        )


@pytest.fixture
def site(product: Make, postfix: Start) -> Site:
    """A whole site in which everybody accepts everything."""
    return Site(product, postfix)


def test_two_hundred_varied_messages(site: Site) -> None:
    """MIME, 8-bit, UTF-8 addresses, dots, long lines, 5 MB...: everything is at both stores, once, byte for byte."""
    mails = corpus.mails(200)
    for mail in mails:
        mail.submit(site.front)
    stored.wait_for(site.old, mails)
    stored.wait_for(site.new, mails)
    site.wait_settled()
    at_old, at_new = stored.all_of(site.old), stored.all_of(site.new)
    assert not stored.differences(mails, at_old)
    assert not stored.differences(mails, at_new)
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
    assert [d.recipient for d in stored.all_of(site.new)] == ["b@example.com"]


def test_primary_refuses_one_recipient(site: Site) -> None:
    """A bounce for just that one; the others have the message, and the copy is for just them."""
    reconfigure(site.old, smtpd_recipient_restrictions=_access("no@example.com", "550 5.1.1 no such user here"))
    recipients = ("one@example.com", "no@example.com", "two@example.com")
    mail = corpus.simple(1, *recipients, sender="sender@example.com")
    mail.submit(site.front)
    for store in (site.old, site.new):
        store.wait_for(3)
    site.wait_settled()
    for store in (site.old, site.new):
        # The bounce is mail like any other, made by the front, and comes by the same way.
        assert sorted(_recipients(store)) == ["one@example.com", "sender@example.com", "two@example.com"]
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
        assert sorted(_recipients(store)) == ["sender@example.com", "two@example.com"]
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
    assert _recipients(site.new) == ["now@example.com"]
    reconfigure(site.old, smtpd_recipient_restrictions="")
    site.front.flush()
    for store in (site.old, site.new):
        stored.wait_for(store, [mail])
    site.wait_settled()
    for store in (site.old, site.new):
        assert not stored.differences([mail], stored.all_of(store))


def test_primary_is_down(site: Site) -> None:
    """The front keeps its mail; nothing bounces, nothing is copied before the primary has it, nothing is lost."""
    site.old.stop()
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(30)]
    for mail in mails:
        mail.submit(site.front)
    wait_until(lambda: site.front.log.count("status=deferred") >= len(mails), message=lambda: site.front.log[-3000:])
    assert len(site.front.queued()) >= len(mails)
    assert not _recipients(site.new)
    site.old.start()
    deliver_all(site, mails)
    for store in (site.old, site.new):
        assert not stored.differences(mails, stored.all_of(store))
    assert "status=bounced" not in site.front.log


def test_backup_is_down(site: Site) -> None:
    """The front and the primary notice nothing; the copies wait and go out once."""
    site.new.stop()
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(30)]
    for mail in mails:
        mail.submit(site.front)
    stored.wait_for(site.old, mails)
    wait_until(site.front.queue_empty)
    assert site.product.summary()["pending"] == len(mails)
    site.new.start()
    assert site.product.run("queue", "flush").returncode == 0
    stored.wait_for(site.new, mails)
    site.wait_settled()
    assert not stored.differences(mails, stored.all_of(site.new))


@pytest.mark.parametrize("moment", [1, 40, 120])
def test_everything_killed_under_load(product: Make, postfix: Start, moment: int) -> None:
    """SIGKILL for all of smtp-dup while Postfix sends 200 messages: all are at both stores, repeats are explained."""
    site = Site(product, postfix, relay__uncertain_hold="10s")
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(200)]
    for mail in mails:
        mail.submit(site.front)
        if len(_recipients(site.old)) >= moment and site.product.is_running:
            site.product.kill()
    wait_until(lambda: not site.product.is_running or len(_recipients(site.old)) >= moment)
    site.product.kill()
    site.product.start()
    flush_all(site.front)
    became = verify(site)
    deliver_all(site, mails)
    at_old, at_new = stored.all_of(site.old), stored.all_of(site.new)
    assert {d.recipient for d in at_old} == {d.recipient for d in at_new} == {m.recipients[0] for m in mails}
    assert {d.content for d in at_new} == {m.stored for m in mails}
    _explain_repeats(site, at_old, at_new, became)


def test_killed_and_nobody_sends_again(product: Make, postfix: Start) -> None:
    """Copies of what the primary accepted before a SIGKILL go out after the next start, with the front switched off."""
    site = Site(product, postfix)
    site.new.stop()
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(50)]
    for mail in mails:
        mail.submit(site.front)
    stored.wait_for(site.old, mails)
    wait_until(site.front.queue_empty)
    site.front.stop()
    site.product.kill()
    site.new.start()
    site.product.start()
    verify(site)  # what was accepted a moment before had no job yet
    assert not stored.differences(mails, stored.all_of(site.new))


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
    stored.wait_for(site.old, mails)
    wait_until(lambda: len(site.product.json("failed", "list")) == 2, message=lambda: site.product.log[-3000:])
    site.wait_settled()
    rows = site.product.json("failed", "list")
    refused = ["new-a@example.com"], ["new-b@example.com", "new-c@example.com"]
    assert sorted(row["recipients"] for row in rows) == [*refused]
    assert all("550 5.1.1 " in row["reply"] and "User unknown in virtual mailbox table" in row["reply"] for row in rows)
    assert sorted(_recipients(site.new)) == ["one@example.com", "three@example.com", "two@example.com"]
    reconfigure(site.new, virtual_mailbox_maps="static:all/")
    assert site.product.run("failed", "retry", "--all").returncode == 0
    stored.wait_for(site.new, mails)
    site.wait_settled()
    assert not site.product.json("failed", "list")
    assert not stored.differences(mails, stored.all_of(site.new))


def test_backup_denies_relaying(site: Site) -> None:
    """The first day of a migration: a backup that refuses everything is paused; put right, it gets everything, once."""
    reconfigure(site.new, **STRICT, virtual_mailbox_domains="other.example")
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(60)]
    for mail in mails:
        mail.submit(site.front)
    stored.wait_for(site.old, mails)
    wait_until(lambda: site.product.summary()["state"] == "paused", message=lambda: site.product.log[-3000:])
    row = site.product.summary()
    assert "554 5.7.1" in row["reason"]
    assert "Relay access denied" in row["reason"]
    assert row["failed"] + row["pending"] == len(mails)
    assert row["failed"] == 20
    reconfigure(site.new, virtual_mailbox_domains=" ".join(DOMAINS))
    assert site.product.run("queue", "flush").returncode == 0
    assert site.product.run("failed", "retry", "--all").returncode == 0
    stored.wait_for(site.new, mails)
    site.wait_settled()
    assert not site.product.json("failed", "list")
    assert not stored.differences(mails, stored.all_of(site.new))


def test_backup_takes_less(site: Site) -> None:
    """A message that is too large for the backup is in the failed list with a reason, until the limit is raised."""
    reconfigure(site.new, message_size_limit="20000")
    mails = [
        corpus.simple(1, "small@example.com"),
        corpus.Mail("large", b"Subject: large\r\n\r\n" + b"x" * 50_000 + b"\r\n", ("large@example.com",)),
    ]
    for mail in mails:
        mail.submit(site.front)
    stored.wait_for(site.old, mails)
    wait_until(lambda: site.product.json("failed", "list"))
    (row,) = site.product.json("failed", "list")
    assert row["recipients"] == ["large@example.com"]
    assert "20000" in row["reply"]
    reconfigure(site.new, message_size_limit="100000")
    assert site.product.run("failed", "retry", "--all").returncode == 0
    stored.wait_for(site.new, mails)
    site.wait_settled()
    assert not stored.differences(mails, stored.all_of(site.new))


@pytest.fixture
def uncertain(product: Make, postfix: Start, primary: ScriptedServer) -> Callable[..., Site]:
    """Call it for a site whose primary is scripted; what a primary takes without saying so is its business."""

    def make(hold: str) -> Site:
        site = Site.__new__(Site)
        site.new = postfix(PostfixInstance.store(DOMAINS, **LITERAL))
        site.product = product(
            primary=primary.address, backups=[site.new.address], settings={**QUICK, "relay.uncertain_hold": hold}
        )
        site.front = postfix(PostfixInstance.front(site.product.smtp_port, **LITERAL, **PATIENT))
        return site

    return make


def test_lost_reply_then_sent_again(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """The primary takes a message and vanishes without a reply: Postfix sends it again, and the backup has one copy."""
    site = uncertain("5s")
    primary.replies["."] = [Close(), None]
    mail = corpus.simple(1, "b@example.com")
    mail.submit(site.front)
    wait_until(lambda: "451 4.4.2" in site.front.log, message=lambda: site.front.log)
    assert site.front.queued()
    assert not _recipients(site.new)
    site.front.flush()
    primary.wait_for(1)
    stored.wait_for(site.new, [mail])
    assert len(primary.transactions) == 2
    assert primary.transactions[0].content == primary.transactions[1].content
    assert [action[:7] for action in verify(site).values()] == ["covered"]
    site.wait_settled()
    assert not stored.differences([mail], stored.all_of(site.new))


def test_lost_reply_and_never_sent_again(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """A message that the primary may have taken is copied when the hold is over: a duplicate beats a loss."""
    site = uncertain("5s")
    primary.replies["."] = [Close(), None]
    mail = corpus.simple(1, "b@example.com")
    mail.submit(site.front)
    wait_until(lambda: "451 4.4.2" in site.front.log, message=lambda: site.front.log)
    site.front.stop()
    assert [action[:6] for action in verify(site).values()] == ["copied"]
    stored.wait_for(site.new, [mail])
    assert not stored.differences([mail], stored.all_of(site.new))


def test_lost_reply_then_fewer_recipients(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """At the second attempt the primary takes one of two recipients: the other's copy goes out after the hold, once."""
    site = uncertain("5s")
    primary.replies["."] = [Close(), None]
    mail = corpus.simple(1, "yes@example.com", "gone@example.com", sender="")
    mail.submit(site.front)
    wait_until(lambda: "451 4.4.2" in site.front.log, message=lambda: site.front.log)
    primary.replies["RCPT TO:<gone@"] = "550 5.1.1 gone meanwhile"
    site.front.flush()
    primary.wait_for(1)
    site.new.wait_for(1)
    assert _recipients(site.new) == ["yes@example.com"]
    assert [action[:6] for action in verify(site).values()] == ["copied"]
    stored.wait_for(site.new, [mail])
    site.wait_settled()
    assert not stored.differences([mail], stored.all_of(site.new))


def test_lost_reply_twice(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """Two uncertain attempts, then an accepted one: still one copy at the backup."""
    site = uncertain("8s")
    primary.replies["."] = [Close(), Close(), None]
    mail = corpus.simple(1, "b@example.com", "c@example.com")
    mail.submit(site.front)
    for attempt in (1, 2):
        wait_until(lambda: site.front.log.count("451 4.4.2") >= 2 * attempt, message=lambda: site.front.log)  # noqa: B023
        site.front.flush()
    primary.wait_for(1)
    stored.wait_for(site.new, [mail])
    assert [action[:7] for action in verify(site).values()] == ["covered", "covered"]
    site.wait_settled()
    assert not stored.differences([mail], stored.all_of(site.new))


def test_killed_at_the_dot_then_sent_again(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """SIGKILL while the primary holds its reply: Postfix sends it again at once, and the backup has one copy."""
    site = uncertain("10s")
    gate = Gate()
    primary.replies["."] = [(gate, None), None]
    mail = corpus.simple(1, "b@example.com")
    mail.submit(site.front)
    gate.wait()
    site.product.kill()
    gate.open()
    wait_until(lambda: "status=deferred" in site.front.log, message=lambda: site.front.log)
    site.product.start()
    flush_all(site.front)
    stored.wait_for(site.new, [mail])
    assert [action[:7] for action in verify(site).values()] == ["covered"]
    assert not stored.differences([mail], stored.all_of(site.new))


@pytest.fixture(scope="session")
def exim_program() -> Iterator[Path]:
    """Exim, where it can be had."""
    # Not below pytest's folder: its daemons must be able to enter.
    with tempfile.TemporaryDirectory(prefix="smtp-dup-exim-") as folder:
        program, reason = exim_instance.unpack(Path(folder))
        if program is None:
            pytest.skip(reason)
        yield program


@pytest.fixture
def exim(exim_program: Path) -> Iterator[EximInstance]:
    """A started Exim that takes everything for our domains."""
    instance = EximInstance(exim_program, DOMAINS)
    try:
        yield instance.start()
    finally:
        instance.remove()


@pytest.mark.parametrize("side", ["primary", "backup"])
def test_varied_messages_with_exim(product: Make, postfix: Start, exim: EximInstance, side: str) -> None:
    """Exim on one side and Postfix on the other: the same messages arrive at both, byte for byte."""
    other = postfix(PostfixInstance.store(DOMAINS, **LITERAL))
    first, second = (exim, other) if side == "primary" else (other, exim)
    between = product(primary=first.address, backups=[second.address], settings=QUICK)
    front = postfix(PostfixInstance.front(between.smtp_port, **LITERAL))
    mails = [mail for mail in corpus.mails(200) if not _exim_changes(mail)]
    for mail in mails:
        mail.submit(front)
    for store in (exim, other):
        stored.wait_for(store, mails)
    wait_until(lambda: between.summary()["pending"] == 0)
    for store in (exim, other):
        assert not stored.differences(mails, stored.all_of(store))


def test_exim_refuses_one_recipient_of_a_copy(product: Make, postfix: Start, exim: EximInstance) -> None:
    """A backup refuses one of three: exactly that one is in the failed list, and gets it when Exim is put right."""
    exim.configure(refused=["no"])
    old = postfix(PostfixInstance.store(DOMAINS, **LITERAL))
    between = product(primary=old.address, backups=[exim.address], settings=QUICK)
    front = postfix(PostfixInstance.front(between.smtp_port, **LITERAL))
    mail = corpus.simple(1, "one@example.com", "no@example.com", "two@example.com")
    mail.submit(front)
    exim.wait_for(2)
    wait_until(lambda: between.json("failed", "list"))
    (row,) = between.json("failed", "list")
    assert (row["recipients"], row["reply"]) == (["no@example.com"], "550 no such user")
    exim.configure()
    assert between.run("failed", "retry", "--all").returncode == 0
    stored.wait_for(exim, [mail])
    wait_until(lambda: between.summary()["pending"] == 0)
    assert not stored.differences([mail], stored.all_of(exim))


# What the tests share


def _exim_changes(mail: corpus.Mail) -> bool:
    """Say whether Exim itself changes this: it ends a line at a lone CR, and any header with an empty line."""
    return mail.name.partition(" ")[2] in {"empty", "header only", "carriage returns"}


def reconfigure(instance: PostfixInstance, **settings: str) -> None:
    """Change a running Postfix."""
    instance.stop()
    etc = instance.directory / "etc"
    words = [f"{name}={value}" for name, value in settings.items()]
    subprocess.run(["postconf", "-c", str(etc), "-e", *words], check=True, capture_output=True)
    # Postfix waits up to two seconds for a file that was written just now: it may still be changing.
    long_ago = time.time() - 60
    os.utime(etc / "main.cf", (long_ago, long_ago))
    instance.start()


def deliver_all(site: Site, mails: list[corpus.Mail]) -> None:
    """Flush the front until its queue is empty, and wait until everything has arrived."""
    flush_all(site.front)
    for store in (site.old, site.new):
        stored.wait_for(store, mails)
    site.wait_settled()


def flush_all(front: PostfixInstance) -> None:
    """Flush until the queue is empty: what is being tried or was submitted just now does not count for a flush."""

    def is_empty() -> bool:
        front.flush()
        return front.queue_empty()

    wait_until(is_empty, 60, lambda: front.log[-3000:], interval=1)


def verify(site: Site, timeout: float = 60) -> dict[str, str]:
    """Run `queue verify` until nothing is uncertain or waits any more.

    Returns what became of the uncertain: ids with "copied..." or "covered...".
    """
    became: dict[str, str] = {}

    def is_over() -> bool:
        rows = [row for row in site.product.json("queue", "verify") if row["finding"] == "uncertain"]
        became.update({row["id"]: row["action"] for row in rows})
        with redis.Redis.from_url(site.product.redis_url) as connection:
            return not connection.zcard(ledger.UNCERTAIN) and not site.product.summary()["pending"]

    wait_until(is_over, timeout, lambda: f"still uncertain:\n{site.product.log[-3000:]}")
    # The housekeeping process may have been faster than the command.
    for event in site.product.events:
        if event["event"] in {"uncertain covered", "uncertain copied"}:
            became.setdefault(event["id"], event["event"].removeprefix("uncertain "))
    return became


def _recipients(store: PostfixInstance) -> list[str]:
    return [
        re.search(rb"(?m)^X-Original-To: (.*)$", raw)[1].decode()  # type: ignore[index]
        for raw in store.maildir_messages()
    ]


def _access(address: str, reply: str) -> str:
    return f"check_recipient_access inline:{{ {{{address} = {reply}}} }}, permit"


def _explain_repeats(site: Site, at_old: list[Stored], at_new: list[Stored], became: dict[str, str]) -> None:
    """What arrived twice did so for a reason that can be found by its id.

    At the primary: the front had no reply and sent it again. At the backup: the primary has it twice, too; or nobody
    knew whether the primary had taken it; or the worker died with it.
    """
    ids_at_old = {delivery.id for delivery in at_old}
    events = {(event.get("id"), event["event"]) for event in site.product.events}
    for recipient, count in Counter(delivery.recipient for delivery in at_old).items():
        sent_again = re.search(rf"to=<{re.escape(recipient)}>.*status=deferred \(lost connection", site.front.log)
        assert count == 1 or sent_again, f"{recipient}: {count} times at the primary"
    repeated = Counter(delivery.recipient for delivery in at_new)
    for (recipient, message_id), count in Counter((d.recipient, d.id) for d in at_new).items():
        if count > 1:
            assert (message_id, "may repeat") in events, f"{message_id} for {recipient} {count} times at the backup"
        if repeated[recipient] > 1 and message_id not in ids_at_old:
            assert became.get(message_id, "").startswith("copied"), f"{message_id} for {recipient} at the backup only"
