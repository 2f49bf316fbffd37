"""What a backup answers otherwise than the primary is counted with the outcome, by stage and reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import redis

from relay.ledger import divergence_groups, keys
from relay.ledger.divergence_groups import Group
from relay.mail.destination import Destination
from support import listed_copies
from support.ledger_contents import Contents, settings
from support.reactions import Close, Reaction
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import until
from workers.delivery.courier import Courier


@pytest.fixture
def contents(redis_client: redis.Redis, backup: ScriptedServer) -> Contents:
    made = Contents(redis_client, "new")
    made.register(backup.destination("new"))
    return made


@asynccontextmanager
async def courier(redis_url: str, destination: Destination, **options: str) -> AsyncIterator[Courier]:
    made = Courier(settings(**{"retry_longest": "3600", **options}), destination, "worker", redis_url)
    await made.start()
    try:
        yield made
    finally:
        await made.drain()


class Site:
    """One backup with a courier in front of it."""

    def __init__(self, contents: Contents, backup: ScriptedServer, redis_url: str) -> None:
        self.contents = contents
        self.backup = backup
        self.url = redis_url

    async def deliver(self, *ids: str, soft_bounce: bool = False, job: str = "", **options: str) -> None:
        destination = replace(self.backup.destination("new"), soft_bounce=soft_bounce)
        async with courier(self.url, destination, **options) as made:
            await made.deliver(job or self.contents.enqueue(*ids), list(ids))

    async def again(self, *ids: str, **options: str) -> None:
        """Deliver what was deferred, by the job that owns it."""
        await self.deliver(*ids, job=self.contents.state(ids[0]).job, **options)

    def groups(self) -> list[Group]:
        return divergence_groups.groups(self.contents.connection, "new")

    def domains(self) -> dict[str, tuple[int, ...]]:
        found = divergence_groups.domains(self.contents.connection, "new")
        return {domain: counts[:3] for domain, counts in found.items()}


@pytest.fixture
def site(contents: Contents, backup: ScriptedServer, redis_url: str) -> Site:
    return Site(contents, backup, redis_url)


def _what(groups: Iterable[Group]) -> set[tuple[str, str, int, str, int]]:
    return {(group.kind, group.stage, group.code, group.text, group.open) for group in groups}


async def test_a_copy_that_goes_through_leaves_the_domains_alone(contents: Contents, site: Site) -> None:
    """No group, no example: only how many of which domain were taken."""
    await site.deliver(contents.pending("ann@a.test", "bob@b.test"), contents.pending("cid@A.test"))
    assert site.domains() == {"a.test": (2, 0, 0), "b.test": (1, 0, 0)}
    assert [key for key in contents.connection.keys("smtpdup:*") if b"iverge" in key or b"whom" in key] == []


async def test_three_recipients_three_replies(contents: Contents, backup: ScriptedServer, site: Site) -> None:
    """Each has its group; the one that was taken, none."""
    backup.replies |= {
        "RCPT TO:<bob@b.test>": "550 5.1.1 <bob@b.test>: no such user",
        "RCPT TO:<cid@c.test>": "450 4.2.0 <cid@c.test>: greylisted",
        "RCPT TO:<dan@d.test>": "552 5.2.2 mailbox full",
    }
    await site.deliver(contents.pending("ann@a.test", "bob@b.test", "cid@c.test", "dan@d.test"))
    assert _what(site.groups()) == {
        ("refused", "RCPT", 550, "<address>: no such user", 1),
        ("deferred", "RCPT", 450, "<address>: greylisted", 1),
        ("refused", "RCPT", 552, "mailbox full", 1),
    }
    assert site.domains() == {"a.test": (1, 0, 0), "b.test": (0, 0, 1), "c.test": (0, 1, 0), "d.test": (0, 0, 1)}


@pytest.mark.parametrize(
    ("command", "stage"), [("MAIL", "MAIL"), ("RCPT", "RCPT"), ("DATA", "DATA"), (".", "dot")]
)  # fmt: skip
async def test_each_stage(contents: Contents, backup: ScriptedServer, site: Site, command: str, stage: str) -> None:
    """The same words at another stage are another group."""
    backup.replies[command] = "550 5.7.1 not from here"
    await site.deliver(contents.pending("ann@a.test", "bob@a.test"))
    assert _what(site.groups()) == {("refused", stage, 550, "not from here", 2)}
    (group,) = site.groups()
    assert (group.messages, group.own) == (1, False)


async def test_a_reply_in_another_tongue_and_in_none(contents: Contents, backup: ScriptedServer, site: Site) -> None:
    """UTF-8 stays, and what is no UTF-8 is escaped; both are counted and shown."""
    backup.replies |= {
        "RCPT TO:<ann@a.test>": "550 Почтовый ящик <ann@a.test> не найден".encode() + b"\r\n",
        "RCPT TO:<bob@a.test>": "550 Benutzer unbekannt für <bob@a.test>".encode("latin-1") + b"\r\n",
    }
    await site.deliver(contents.pending("ann@a.test", "bob@a.test"))
    assert {group.text for group in site.groups()} == {
        "почтовый ящик <address> не найден", "benutzer unbekannt f\\xfcr <address>",
    }  # fmt: skip


async def test_lmtp_answers_each_recipient_after_the_dot(contents: Contents, redis_url: str) -> None:
    """One taken, one refused, one put off, of the same message."""
    replies: dict[str, Reaction] = {
        ".<bob@a.test>": "550 5.1.1 no such user",
        ".<cid@a.test>": "452 4.2.2 over quota",
    }
    with ScriptedServer(replies, lmtp=True) as backup:
        contents.register(backup.destination("new"))
        site = Site(contents, backup, redis_url)
        await site.deliver(contents.pending("ann@a.test", "bob@a.test", "cid@a.test"))
    assert _what(site.groups()) == {
        ("refused", "dot", 550, "no such user", 1),
        ("deferred", "dot", 452, "over quota", 1),
    }


async def test_soft_bounce_puts_off_what_was_refused(contents: Contents, backup: ScriptedServer, site: Site) -> None:
    """A 5xx that is tried again counts as deferred, and says that it was softened."""
    backup.replies["RCPT"] = "550 5.1.1 no such user"
    await site.deliver(contents.pending("ann@a.test"), soft_bounce=True)
    (group,) = site.groups()
    assert (group.kind, group.soft, group.code, group.open) == ("deferred", True, 550, 1)


async def test_our_own_refusal_is_marked(contents: Contents, redis_url: str) -> None:
    """What the server's EHLO rules out is refused by us: the group says so, and what to enable there."""
    extensions = [name if not name.startswith("SIZE") else "SIZE 10" for name in EXTENSIONS]
    with ScriptedServer(extensions=extensions) as backup:
        contents.register(backup.destination("new"))
        site = Site(contents, backup, redis_url)
        await site.deliver(contents.pending("ann@a.test"), contents.pending("bob@a.test"))
    (group,) = site.groups()
    assert (group.kind, group.stage, group.own, group.open, group.code) == ("refused", "own", True, 2, 554)
    assert group.reason == "too large"


async def test_greylisting_is_noise(contents: Contents, backup: ScriptedServer, site: Site) -> None:
    """Put off at first and taken soon after: nothing stays open."""
    message_id = contents.pending("ann@a.test")
    backup.replies["RCPT"] = "450 4.7.1 greylisted"
    await site.deliver(message_id)
    assert site.groups()[0].open == 1
    backup.replies.clear()
    await site.again(message_id)
    (group,) = site.groups()
    assert (group.open, group.noise, group.resolved, group.is_noise) == (0, 1, 0, True)
    assert site.domains() == {"a.test": (1, 1, 0)}


async def test_a_retry_of_what_failed_ends_it(contents: Contents, backup: ScriptedServer, site: Site) -> None:
    """`failed retry` that is delivered resolves it; one that is refused again counts nothing."""
    ids = [contents.pending("ann@a.test"), contents.pending("bob@a.test")]
    backup.replies["RCPT"] = "550 5.1.1 no such user"
    await site.deliver(*ids)
    backup.replies = {"RCPT TO:<bob@a.test>": "550 5.1.1 no such user"}
    listed_copies.retry(contents.connection, listed_copies.EVERY, "new")
    job = (contents.connection.hget(keys.FAILURE + "new", ids[0]) or b"").partition(b"\n")[0].decode()
    await site.deliver(*ids, job=job)
    (group,) = site.groups()
    assert (group.seen, group.open, group.resolved) == (2, 1, 1)


async def test_what_is_given_up(contents: Contents, backup: ScriptedServer, site: Site) -> None:
    """4xx until retry.give_up is a kind of its own, with the server's own words."""
    message_id = contents.pending("ann@a.test", age=3600)
    backup.replies["RCPT"] = "450 4.2.0 later"
    await site.deliver(message_id)
    await site.again(message_id, retry_give_up="60", retry_longest="60")
    found = {group.kind: (group.open, group.text) for group in site.groups()}
    assert found == {"deferred": (0, "later"), "given-up": (1, "later")}


async def test_trouble_with_the_server_is_an_outage(
    contents: Contents, backup: ScriptedServer, site: Site, redis_url: str
) -> None:
    """It has a begin, an end and a reason, and no group: it says nothing of the copies."""
    backup.replies["MAIL"] = "421 4.3.2 shutting down"
    message_id = contents.pending("ann@a.test")
    async with courier(redis_url, backup.destination("new")) as made:
        task = asyncio.ensure_future(made.deliver(contents.enqueue(message_id), [message_id]))
        connection = contents.connection
        await until(lambda: divergence_groups.outages(connection, "new"))
        (outage,) = divergence_groups.outages(connection, "new")
        assert outage.end == 0
        assert "shutting down" in outage.reason
        await asyncio.gather(task, return_exceptions=True)
        backup.replies.clear()
        contents.connection.hincrby(keys.HEALTH + "new", "flush", 1)
        await until(lambda: made.accepting)
        await made.deliver(contents.enqueue(message_id), [message_id])
        await until(lambda: divergence_groups.outages(connection, "new")[0].end > 0)
    assert site.groups() == []


async def test_a_connection_that_breaks_is_no_divergence(
    contents: Contents, backup: ScriptedServer, site: Site
) -> None:
    """The copy is deferred, and the breaker told: what it says of the server is not a reason of the copy."""
    backup.replies["."] = Close()
    message_id = contents.pending("ann@a.test")
    await site.deliver(message_id)
    assert contents.state(message_id).attempts == 1
    assert site.groups() == []
