"""Primary and backup trade places again and again under load, while processes are killed: every message is at both.

The short form is part of the suite. ``SMTPDUP_SWAPS=20:10000`` runs it with so many swaps and transactions.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import redis

from relay.config import loader
from relay.config.loader import Settings
from relay.topology import decisions, promotion
from support.drained import is_drained
from support.product import Product
from support.recorded_sessions import Transaction
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

SWAPS, TRANSACTIONS = map(int, os.environ.get("SMTPDUP_SWAPS", "5:400").split(":"))
SETTINGS = {
    "smtp.processes": "2",
    "retry.first": "1",
    "retry.longest": "2",
    "relay.timeout_seconds": "5",
    "relay.uncertain_hold": "1",
    "redis.timeout_seconds": "2",
}
TABLE = '[[backup]]\nname = "new"\nurl = "{}"\nsender = "null"\n'  # so that a copy is told from the primary's own
MORTAL = ("relay-1", "relay-2", "worker-new-1", "redis")


class Operator:
    """Somebody who promotes whoever is a backup now, whatever happens to the processes meanwhile."""

    def __init__(self, product: Product, source: random.Random) -> None:
        self.product = product
        self.source = source
        self.decided = Counter[str]()
        self._settings: Settings = loader.load(
            {"config": str(product.directory / "settings.toml")}, product.environment
        )

    def swap(self) -> None:
        """Promote the other one; once in a while without a question."""
        wait_until(self._try, 60, lambda: f"no swap:\n{self.product.log[-3000:]}", 0.1)

    def _try(self) -> bool:
        try:
            with redis.Redis.from_url(self.product.redis_url) as client:
                seen = decisions.view(client)
                other = "old" if promotion.current(seen, self._settings) == "new" else "new"
                plan = promotion.plan(client, self._settings, other)
                intent = None
                if self.source.random() < 0.7:
                    intent = promotion.prepare(client, plan, 10, lambda _: None)
                promotion.commit(client, plan, "test", {}, intent)
                self.decided[other] += 1
                return True
        except (redis.RedisError, decisions.Overtaken, promotion.Unprepared):
            return False

    def is_followed(self) -> bool:
        """Whether every living relay process follows the last decision, as far as Redis says."""
        try:
            with redis.Redis.from_url(self.product.redis_url) as client:
                seen = decisions.view(client)
                return bool(seen.living) and all(map(seen.follows, seen.living))
        except redis.RedisError:
            return False

    def kill(self) -> str:
        """End one process as a power cut would."""
        name = self.source.choice(MORTAL)
        self.product.child(name).kill()
        return name


def message_id(transaction: Transaction) -> str:
    found = re.search(rb"\bid ([\w.-]+)", transaction.trace)
    assert found, transaction.trace
    return found[1].decode()


def legs(server: ScriptedServer, *, copies: bool) -> Counter[str]:
    """Return how often each message came, as the primary's own or as copies, which have the null sender."""
    return Counter(message_id(m) for m in server.messages if (m.sender == "") == copies)


def numbers(server: ScriptedServer) -> set[int]:
    return {int(m.header("Subject") or -1) for m in server.messages}


@pytest.mark.timeout(60 + 40 * SWAPS)
def test_swaps_under_load_with_kills(product: Callable[..., Product], scripted: Callable[..., ScriptedServer]) -> None:
    """Nothing is lost; each message has one primary and its copy at the other; what comes twice is in the log."""
    old, new = scripted(), scripted()
    both = product(primary=f"old={old.address}", settings=SETTINGS, files={"settings.toml": TABLE.format(new.address)})
    operator = Operator(both, random.Random(SWAPS))
    sender = Sender(both.smtp_port, range(TRANSACTIONS), patience=40 * SWAPS)
    step = TRANSACTIONS // (SWAPS + 1)
    sender.pause_at(step + step // 2)  # however fast it is, each primary gets a part
    sender.start()
    killed = Counter[str]()
    for n in range(1, SWAPS + 1):
        wait_until(lambda n=n: len(sender.accepted) >= min(step * n, TRANSACTIONS - 1), 60)
        killer = threading.Thread(target=lambda: killed.update([operator.kill()]))
        killer.start()  # before, during or after
        operator.swap()
        killer.join()
        wait_until(operator.is_followed, 60)
        sender.pause_at(step * (n + 1) + step // 2 if n < SWAPS else TRANSACTIONS)
    accepted = sender.join()
    assert accepted == set(range(TRANSACTIONS))
    wait_until(lambda: is_drained(both), 60, lambda: f"not drained: {both.log[-3000:]}")
    with redis.Redis.from_url(both.redis_url) as client:
        last = decisions.view(client)
        wait_until(lambda: all(map(last.follows, decisions.view(client).living)))
        assert last.epoch >= SWAPS

    assert not accepted - numbers(old), "lost at old"
    assert not accepted - numbers(new), "lost at new"
    events = both.events
    said = {e["id"]: e["copies"] for e in events if e["event"] == "accepted"}
    explained = {e.get("id") for e in events if e["event"] in {"may repeat", "uncertain", "uncertain copied"}}
    explained |= {e.get("id") for e in events if e["event"] == "abandoned"}
    own = {"old": legs(old, copies=False), "new": legs(new, copies=False)}
    copied = {"old": legs(old, copies=True), "new": legs(new, copies=True)}
    other = {"old": "new", "new": "old"}
    for message, copies in said.items():
        assert own[other[copies]][message] == 1, f"{message} was not at its primary {other[copies]} once"
        assert not own[copies][message], f"{message} had two primaries"
        assert not copied[other[copies]][message], f"{message} was copied to its primary"
        assert copied[copies][message] >= 1, f"{message} was not copied to {copies}"
    twice = {m for legs_of in (*own.values(), *copied.values()) for m, count in legs_of.items() if count > 1}
    assert not twice - explained
    assert set(said.values()) == {"old", "new"}, "both were the primary"
    assert both.stop() == 0
    print(f"{SWAPS} swaps, {TRANSACTIONS} transactions, killed {dict(killed)}, {len(twice)} twice, all explained")
