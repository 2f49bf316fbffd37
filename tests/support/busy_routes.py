"""A product with every kind of route, mail for all of them, an operator who changes them all the time, and the audit.

Two primaries in order, weights, mailboxes that are moved and moved back, and messages that fork. Every server gets its
copies with the null sender: so what it had as the primary, and what as a copy, is told apart.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from support.drained import is_drained
from support.product import QUICK, Product
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

SETTINGS = {
    **QUICK,
    "relay.timeout_seconds": "5",
    "relay.final_timeout_seconds": "10",
    "relay.uncertain_hold": "1",
    "redis.timeout_seconds": "2",
    "routes.split": "fork",
}
NAMES = ("old", "new", "a", "b", "c")
_SERVER = '[[{kind}]]\nname = "{name}"\nurl = "{url}"\nsender = "null"\n'
_ROUTES = """
[[route]]
name = "pair"
match = { recipients = "@pair.example" }
servers = ["a", "b"]
copies = "others"
return_after = "1s"
split = "fork"

[[route]]
name = "balanced"
match = { recipients = "@balanced.example" }
primary = { a = 3, c = 1 }
copies = "others"
"""
OWED = {"pair.example": ("a", "b"), "balanced.example": ("a", "c"), "example.com": ("old", "new")}
_EXPLAINED = re.compile(r"may repeat|uncertain|split copied|released late|accepted late")


def recipients(number: int) -> tuple[str, ...]:
    """Return whom a message is for: one route after the other, and every fourth forks."""
    every = (f"r{number}@pair.example", f"r{number}@balanced.example", f"r{number}@example.com")
    return (*every, "")[number % 4 : number % 4 + 1] if number % 4 != 3 else (every[0], every[2])


def files(servers: Mapping[str, ScriptedServer]) -> dict[str, str]:
    """Return the settings file; the primary by default is "old"."""
    tables = [
        _SERVER.format(kind="backup" if name == "new" else "server", name=name, url=servers[name].address)
        for name in NAMES[1:]
    ]
    return {"settings.toml": "\n".join(tables) + _ROUTES}


class Operator:
    """Somebody who moves mailboxes and changes who answers, one thing after the other, whatever happens meanwhile."""

    def __init__(self, product: Product, servers: Mapping[str, ScriptedServer], count: int) -> None:
        self._product = product
        self._servers = servers
        self._batch = product.directory / "batch"
        self._batch.write_text("".join(f"r{number}@example.com\n" for number in range(count)))
        self.done: list[tuple[str, int]] = []
        self._turns = itertools.cycle(self._acts())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._failure: BaseException | None = None

    def _acts(self) -> Iterator[tuple[str, ...]]:
        forced, reason = ("--force", "--yes", "--wait", "5s"), ("--reason", "a test")
        yield "move", "--file", str(self._batch), "--to", "new", *forced, "--note", "a test"
        yield "promote", "b", "--route", "pair", "--now", *forced, *reason
        yield "a", "down"
        yield "route", "weight", "balanced", "a=1", "c=3", "--now", "--yes", "--wait", "5s"
        yield "move", "--file", str(self._batch), "--back", *forced, "--note", "a test"
        yield "a", "up"
        yield "promote", "a", "--route", "pair", "--now", *forced, *reason
        yield "route", "reset", "balanced", "--now", "--yes", "--wait", "5s"

    def do(self, count: int = 1) -> None:
        """Do the next things."""
        for _ in range(count):
            words = next(self._turns)
            if words[0] == "a":
                self._servers["a"].down() if words[1] == "down" else self._servers["a"].listen()
                continue
            status = self._product.run(*words, timeout=90).returncode
            assert status != 2, words
            self.done.append((" ".join(words[:2]), status))

    def start(self) -> Operator:
        self._thread.start()
        return self

    def _work(self) -> None:
        try:
            while not self._over.is_set():
                self.do()
        except BaseException as error:
            self._failure = error

    def end(self) -> None:
        """End what is being done, and leave all servers well."""
        self._over.set()
        self._thread.join(100)
        self._servers["a"].listen()
        if self._failure is not None:
            raise AssertionError("the operator has failed") from self._failure


def audit(product: Product, servers: Mapping[str, ScriptedServer], sender: Sender, patience: float = 60) -> None:
    """Nothing is lost, nobody's message has two primaries, and each further copy has its line in the log."""
    wait_until(lambda: is_drained(product), patience, lambda: f"not drained: {product.log[-6000:]}")
    log = product.log
    lines = filter(_EXPLAINED.search, log.splitlines())
    explained = {word for line in lines for word in re.findall(r'"(?:id|copy)": "(\w+)"', line)}
    # What a primary of a message that forks gets once more has an id of its own, and the message's Message-ID.
    explained |= {
        event["message_id"] for event in product.events if event.get("id") in explained and "message_id" in event
    }
    answered: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # (id, recipient) -> servers that answered
    tries: dict[tuple[int, str], set[str]] = defaultdict(set)  # (number, recipient) -> ids that a primary has taken
    for name, server in servers.items():
        had: Counter[tuple[int, str, str]] = Counter()
        for message in server.messages:
            number = int(message.header("Subject") or -1)
            made = message.wire.split(b" id ", 1)[1].split(b";", 1)[0].decode()
            for recipient in message.recipients:
                assert name in OWED[recipient.partition("@")[2]], f"{name} got mail of {recipient}"
                had[number, recipient, made] += 1
                if message.sender:
                    answered[made, recipient][name] += 1
                    tries[number, recipient].add(made)
        lost = [
            (number, recipient)
            for number in sender.accepted
            for recipient in recipients(number)
            if name in OWED[recipient.partition("@")[2]] and not any(key[:2] == (number, recipient) for key in had)
        ]
        assert not lost, f"lost at {name}: {lost[:10]}"
        again = [
            (number, recipient, made)
            for (number, recipient, made), count in had.items()
            if count > 1 and not explained & {made, f"<{number}@sender.example>"}
        ]
        told = [line for line in log.splitlines() if again and f'"{again[0][2]}"' in line]
        assert not again, f"twice at {name} without a reason: {again[:10]}; {told}"
    two = {key: found for key, found in answered.items() if found.total() > 1}
    assert not two, f"two primaries: {dict(itertools.islice(two.items(), 10))}"
    more = {key: ids for key, ids in tries.items() if len(ids) > sender.attempts[key[0]]}
    assert not more, f"more often at primaries than sent: {more}"
    unknown = [made for made, _ in answered if f'"{made}"' not in log]
    assert not unknown, f"at a primary, and not in the log: {unknown[:10]}"
