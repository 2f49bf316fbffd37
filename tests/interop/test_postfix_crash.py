"""The promise with real Postfix when replies are lost and processes die: nothing is lost, repeats are explained."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support import corpus, stored_mail
from support.mail_site import (
    MakeProduct,
    Site,
    StartPostfix,
    deliver_all,
    explain_repeats,
    flush_all,
    recipients,
    verify,
)
from support.product import SOON
from support.reactions import Close, Gate
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

pytestmark = [pytest.mark.postfix, pytest.mark.timeout(300)]

# So that a deferred message waits until the test says flush.
PATIENT = {"minimal_backoff_time": "300s", "maximal_backoff_time": "300s", "queue_run_delay": "300s"}


@pytest.mark.parametrize("moment", [10, 40])
def test_everything_killed_under_load(product: MakeProduct, postfix: StartPostfix, moment: int) -> None:
    """SIGKILL for all of smtp-dup while Postfix sends 80 messages: all are at both stores, repeats are explained."""
    site = Site(product, postfix)
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(80)]
    for mail in mails:
        mail.submit(site.front)
        if len(recipients(site.old)) >= moment and site.product.is_running:
            site.product.kill()
    wait_until(lambda: not site.product.is_running or len(recipients(site.old)) >= moment)
    site.product.kill()
    site.product.start()
    flush_all(site.front)
    became = verify(site)
    deliver_all(site, mails)
    at_old, at_new = stored_mail.all_of(site.old), stored_mail.all_of(site.new)
    assert {d.recipient for d in at_old} == {d.recipient for d in at_new} == {m.recipients[0] for m in mails}
    assert {d.content for d in at_new} == {m.stored for m in mails}
    explain_repeats(site, at_old, at_new, became)


def test_killed_and_nobody_sends_again(product: MakeProduct, postfix: StartPostfix) -> None:
    """Copies of what the primary accepted before a SIGKILL go out after the next start, with the front switched off."""
    site = Site(product, postfix)
    site.new.stop()
    mails = [corpus.simple(number, f"b{number}@example.com") for number in range(30)]
    for mail in mails:
        mail.submit(site.front)
    stored_mail.wait_for(site.old, mails)
    wait_until(site.front.queue_empty)
    site.front.stop()
    site.product.kill()
    site.new.start()
    site.product.start()
    verify(site)  # what was accepted a moment before had no job yet
    assert not stored_mail.differences(mails, stored_mail.all_of(site.new))


@pytest.fixture
def uncertain(product: MakeProduct, postfix: StartPostfix, primary: ScriptedServer) -> Callable[..., Site]:
    """Call it for a site whose primary is scripted; what a primary takes without saying so is its business."""

    def make() -> Site:
        return Site(product, postfix, primary=primary, front=PATIENT)

    return make


def test_lost_reply_then_sent_again(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """The primary takes a message and vanishes without a reply: Postfix sends it again, and the backup has one copy."""
    site = uncertain()
    primary.replies["."] = [Close(), None]
    mail = corpus.simple(1, "b@example.com")
    mail.submit(site.front)
    wait_until(lambda: "451 4.4.2" in site.front.log, message=lambda: site.front.log)
    assert site.front.queued()
    assert not recipients(site.new)
    site.front.flush()
    primary.wait_for(1)
    stored_mail.wait_for(site.new, [mail])
    assert len(primary.transactions) == 2
    assert primary.transactions[0].content == primary.transactions[1].content
    assert [action[:7] for action in verify(site).values()] == ["covered"]
    site.wait_settled()
    assert not stored_mail.differences([mail], stored_mail.all_of(site.new))


def test_lost_reply_and_never_sent_again(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """A message that the primary may have taken is copied when the hold is over: a duplicate beats a loss."""
    site = uncertain()
    primary.replies["."] = [Close(), None]
    mail = corpus.simple(1, "b@example.com")
    mail.submit(site.front)
    wait_until(lambda: "451 4.4.2" in site.front.log, message=lambda: site.front.log)
    site.front.stop()
    assert [action[:6] for action in verify(site).values()] == ["copied"]
    stored_mail.wait_for(site.new, [mail])
    assert not stored_mail.differences([mail], stored_mail.all_of(site.new))


def test_lost_reply_then_fewer_recipients(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """At the second attempt the primary takes one of two recipients: the other's copy goes out after the hold, once."""
    site = uncertain()
    primary.replies["."] = [Close(), None]
    mail = corpus.simple(1, "yes@example.com", "gone@example.com", sender="")
    mail.submit(site.front)
    wait_until(lambda: "451 4.4.2" in site.front.log, message=lambda: site.front.log)
    primary.replies["RCPT TO:<gone@"] = "550 5.1.1 gone meanwhile"
    site.front.flush()
    primary.wait_for(1)
    site.new.wait_for(1)
    assert recipients(site.new) == ["yes@example.com"]
    assert [action[:6] for action in verify(site).values()] == ["copied"]
    stored_mail.wait_for(site.new, [mail])
    site.wait_settled()
    assert not stored_mail.differences([mail], stored_mail.all_of(site.new))


def test_lost_reply_twice(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """Two uncertain attempts, then an accepted one: still one copy at the backup."""
    site = uncertain()
    primary.replies["."] = [Close(), Close(), None]
    mail = corpus.simple(1, "b@example.com", "c@example.com")
    mail.submit(site.front)
    for attempt in (1, 2):
        wait_until(lambda: site.front.log.count("451 4.4.2") >= 2 * attempt, message=lambda: site.front.log)  # noqa: B023 - at once
        site.front.flush()
    primary.wait_for(1)
    stored_mail.wait_for(site.new, [mail])
    assert [action[:7] for action in verify(site).values()] == ["covered", "covered"]
    site.wait_settled()
    assert not stored_mail.differences([mail], stored_mail.all_of(site.new))


def test_killed_at_the_dot_then_sent_again(uncertain: Callable[..., Site], primary: ScriptedServer) -> None:
    """SIGKILL while the primary holds its reply: Postfix sends it again at once, and the backup has one copy."""
    site = uncertain()
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
    stored_mail.wait_for(site.new, [mail])
    assert [action[:7] for action in verify(site).values()] == ["covered"]
    assert not stored_mail.differences([mail], stored_mail.all_of(site.new))
