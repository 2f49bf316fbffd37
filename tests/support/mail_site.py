"""A whole site around smtp-dup, as an operator has one: an MTA in front, the old server and the new one behind.

``verify`` and ``explain_repeats`` are what an operator does after a crash: have the ledger put right, and look up in
the logs why something arrived twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import redis

from relay.config import loader
from relay.ledger import keys
from support import stored_mail
from support.corpus import Mail
from support.postfix_instance import PostfixInstance
from support.product import Product
from support.stored_mail import Stored
from support.waiting import wait_until
from workers.upkeep import reconciler

MakeProduct = Callable[..., Product]
StartPostfix = Callable[[PostfixInstance], PostfixInstance]

DOMAINS = ("example.com", "bücher.example")
# By default Postfix removes Bcc, Content-Length and Return-Path, and puts a space where there is a lone CR.
LITERAL = {"message_drop_headers": "", "cleanup_replace_stray_cr_lf": "no"}


class Server(Protocol):
    """Whatever can stand for a primary or a backup."""

    @property
    def address(self) -> str: ...


class Site:
    """Postfix in front, smtp-dup, and a store on either side: Postfix too, where a test gives no other server.

    ``front`` are more settings of the Postfix in front.
    """

    def __init__(
        self,
        product: MakeProduct,
        postfix: StartPostfix,
        *,
        primary: Server | None = None,
        backup: Server | None = None,
        front: Mapping[str, str] | None = None,
    ) -> None:
        self.old: Any = primary or postfix(PostfixInstance.store(DOMAINS, **LITERAL))
        self.new: Any = backup or postfix(PostfixInstance.store(DOMAINS, **LITERAL))
        self.product = product(
            primary=self.old.address,
            backups=[self.new.address],
            settings={
                "retry.first": "1",
                "retry.longest": "2",
                "relay.timeout_seconds": "5",
                "relay.greeting_timeout_seconds": "1",
                "relay.command_timeout_seconds": "1",
            },
        )
        self.front = postfix(PostfixInstance.front(self.product.smtp_port, **LITERAL, **(front or {})))

    def wait_settled(self, timeout: float = 60) -> None:
        """Wait until nothing is on its way anywhere: neither in Postfix's queue nor in ours."""
        wait_until(self.front.queue_empty, timeout, lambda: f"in the front's queue:\n{self.front.log[-3000:]}", 0.2)
        wait_until(
            lambda: (row := self.product.summary())["pending"] == row["retrying"] == 0,
            timeout,
            lambda: f"{self.product.json('queue', 'list')}\n{self.product.log[-3000:]}",
            0.2,
        )


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


def deliver_all(site: Site, mails: list[Mail]) -> None:
    """Flush the front until its queue is empty, and wait until everything has arrived."""
    flush_all(site.front)
    for store in (site.old, site.new):
        stored_mail.wait_for(store, mails)
    site.wait_settled()


def flush_all(front: PostfixInstance) -> None:
    """Flush until the queue is empty: what is being tried or was submitted just now does not count for a flush."""

    def is_empty() -> bool:
        front.flush()
        return front.queue_empty()

    wait_until(is_empty, 60, lambda: front.log[-3000:], interval=1)


def verify(site: Site, timeout: float = 60) -> dict[str, str]:
    """End each hold, and do what `queue verify` does, its two looks soon after one another, until nothing is left.

    Returns what became of the uncertain: ids with "copied..." or "covered...".
    """
    became: dict[str, str] = {}

    def is_over() -> bool:
        settings = loader.load(environ=site.product.environment, directories=())
        with redis.Redis.from_url(site.product.redis_url) as connection:
            for message_id in connection.zrange(keys.UNCERTAIN, 0, -1):
                connection.zadd(keys.UNCERTAIN, {message_id: 1}, xx=True)  # long ago
            rows = reconciler.verify(connection, settings, pause=0.5).findings
            became.update({row.id: row.action for row in rows if row.finding == "uncertain"})
            return not connection.zcard(keys.UNCERTAIN) and not site.product.summary()["pending"]

    wait_until(is_over, timeout, lambda: f"still uncertain:\n{site.product.log[-3000:]}")
    # The housekeeping process may have been faster than the command.
    for event in site.product.events:
        if event["event"] in {"uncertain covered", "uncertain copied"}:
            became.setdefault(event["id"], event["event"].removeprefix("uncertain "))
    return became


def recipients(store: PostfixInstance) -> list[str]:
    """Return for whom mail has arrived, bounces included."""
    return [re.search(rb"(?m)^X-Original-To: (.*)$", raw)[1].decode() for raw in store.maildir_messages()]


def explain_repeats(site: Site, at_old: list[Stored], at_new: list[Stored], became: dict[str, str]) -> None:
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
