"""The promise with real Exim, whose replies and habits differ from Postfix's, as primary and as backup.

Without the marker ``postfix``: where Exim cannot be had these may be skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from relay.ledger import keys
from support import corpus, pipelined_copies, stored_mail
from support.exim_instance import EximInstance
from support.ledger_contents import Contents
from support.mail_site import DOMAINS, MakeProduct, Site, StartPostfix
from support.waiting import wait_until


@pytest.fixture
def exim(exim_program: Path) -> Iterator[EximInstance]:
    """A started Exim that takes everything for our domains."""
    instance = EximInstance(exim_program, DOMAINS)
    try:
        yield instance.start()
    finally:
        instance.remove()


@pytest.mark.parametrize("count", [corpus.SOME, pytest.param(corpus.ALL, marks=pytest.mark.long)])
def test_varied_messages_with_exim(product: MakeProduct, postfix: StartPostfix, exim_program: Path, count: int) -> None:
    """Exim on either side: the same messages arrive at both, byte for byte."""
    with ExitStack() as ends:
        old, new = (EximInstance(exim_program, DOMAINS) for _ in range(2))
        for instance in (old, new):
            ends.callback(instance.remove)
            instance.start()
        site = Site(product, postfix, primary=old, backup=new)
        mails = [mail for mail in corpus.mails(count) if not _exim_changes(mail)]
        for mail in mails:
            mail.submit(site.front)
        for store in (old, new):
            stored_mail.wait_for(store, mails)
        site.wait_settled()
        for store in (old, new):
            assert not stored_mail.differences(mails, stored_mail.all_of(store))


def test_exim_refuses_one_recipient_of_a_copy(product: MakeProduct, postfix: StartPostfix, exim: EximInstance) -> None:
    """A backup refuses one of three: exactly that one is in the failed list, and gets it when Exim is put right."""
    exim.configure(refused=["no"])
    site = Site(product, postfix, backup=exim)
    mail = corpus.simple(1, "one@example.com", "no@example.com", "two@example.com")
    mail.submit(site.front)
    exim.wait_for(2)
    wait_until(lambda: site.product.json("failed", "list"))
    (row,) = site.product.json("failed", "list")
    assert (row["recipients"], row["reply"]) == (["no@example.com"], "550 no such user")
    exim.configure()
    assert site.product.run("failed", "retry", "--all").returncode == 0
    stored_mail.wait_for(exim, [mail])
    site.wait_settled()
    assert not stored_mail.differences([mail], stored_mail.all_of(exim))


def test_transactions_behind_the_dot(redis_url: str, redis_client: redis.Redis, exim_program: Path) -> None:
    """Exim, which looks for whoever speaks out of turn, takes the next MAIL behind the dot: all copies, once."""
    exim = EximInstance(exim_program)
    try:
        exim.start()
        pipelined_copies.deliver(Contents(redis_client, "new"), redis_url, exim.port)
        assert not redis_client.zcard(keys.PENDING + "new")
        assert not redis_client.zcard(keys.FAILED + "new")
        assert pipelined_copies.numbers(exim.wait_for(pipelined_copies.COUNT)) == list(range(pipelined_copies.COUNT))
        assert "synchronization error" not in exim.log
    finally:
        exim.remove()


def _exim_changes(mail: corpus.Mail) -> bool:
    """Say whether Exim itself changes this: it ends any header with an empty line."""
    return mail.name.partition(" ")[2] in {"empty", "header only"}
