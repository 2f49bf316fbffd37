"""Whoever can write to Redis can put anything there: commands say so in a line, mail goes on, no file is touched.

A ledger that real processes have filled is spoilt key by key and put back. While it is spoilt the processes go on, and
commands are run: none ends with a traceback, lets an escape sequence through or shows a file of this machine.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis

from support.hostile_values import variants
from support.product import Product
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Any]

SECRET = "this-is-in-no-mail"
# What ends a terminal's line of text, or turns it around.
ESCAPES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
COMMANDS = [
    "queue summary", "queue list", "queue list --json", "queue list --uncertain", "queue show WAITING",
    "failed list", "failed list --json", "failed show FAILED", "failed export FAILED",
    "divergence", "divergence --all --json", "divergence --by domain", "divergence --by recipient",
    "divergence --by day", "divergence show GROUP", "ready", "ready new --json", "topology", "topology --json",
    "audit", "audit --json", "flow", "flow --minutes 30 --json", "top --once --json", "promote new --dry-run",
    "undo --dry-run", "queue drop --all --dry-run", "failed retry --all --dry-run",
    "queue flush", "failed retry --all", "queue move later new", "hold later --reason r --for 1h", "release later",
    "throttle later --off", "divergence ack GROUP --note x", "divergence retry GROUP", "divergence unack GROUP",
    "failed drop --all --yes", "queue drop --all --yes", "queue forget gone", "promote --cancel",
]  # fmt: skip
OF_MOVES = [
    "moved", "moved --json", "moved show u1@example.com", "moved export --format csv", "ready --moved",
    "ready u1@example.com", "route u1@example.com", "move u2@example.com --to new --dry-run",
    "move u3@example.com --to new --yes --wait 1s", "move u1@example.com --back --yes --wait 1s",
    "move --repair --yes --wait 1s", "topology", "check",
]  # fmt: skip
FOREIGN = re.compile(rb"rq:(worker:|scheduler)")  # written anew by whoever lives, all the time
SEED = int(os.environ.get("SMTPDUP_SEED", "4711"))
WAYS, RUNS = map(int, os.environ.get("SMTPDUP_HOSTILE", "1:4").split(":"))


class House:
    """A product with mail in every state, and its ledger as it was then."""

    def __init__(self, product: Product, connection: redis.Redis, outside: Path) -> None:
        self.product = product
        self.connection = connection
        self.outside = outside
        self.snapshot: Mapping[bytes, Any] = {}
        self.names: dict[str, str] = {}
        self._read = 0

    def fill(self, picky: ScriptedServer) -> None:
        product, connection = self.product, self.connection
        for n in range(3):
            product.send(f"s{n}@example.com", f"u{n}@example.com", f"v{n}@example.org")
        wait_until(lambda: connection.zcard("smtpdup:failed:picky") == 3)
        wait_until(lambda: connection.hlen("smtpdup:own:later") == 3)
        for words in ("hold dead --reason why --for 2h", "throttle later --rate 50/s --connections 3"):
            assert product.run(*words.split()).returncode == 0
        for words in (
            "move u1@example.com v1@example.org --to new --yes --note why",
            "move v1@example.org --back --yes",
        ):
            assert product.run(*words.split(), timeout=60).returncode == 0
        for words in ("promote new --yes --force --reason why", "undo --yes --reason why"):
            assert product.run(*words.split(), timeout=60).returncode == 0
        wait_until(lambda: all(connection.keys(f"smtpdup:{name}*") for name in ("flow:", "hosts", "relays", "events")))
        for name, key in (("FAILED", "failed:picky"), ("WAITING", "pending:later"), ("GROUP", "divergence:picky")):
            self.names[name] = connection.zrange(f"smtpdup:{key}", 0, 0)[0].decode()
        found = {key: connection.dump(key) for key in sorted(connection.keys("*"))}
        self.snapshot = {key: value for key, value in found.items() if value is not None}

    def put_back(self) -> None:
        with self.connection.pipeline() as pipe:
            for key in self.connection.keys("*"):
                if not key.startswith(b"rq:worker"):
                    pipe.delete(key)
            for key, value in self.snapshot.items():
                pipe.restore(key, 0, value, replace=True)
            pipe.execute()

    def check(self, words: str) -> str:
        """Run a command; return what is wrong with its end."""
        done = self.product.run(*(self.names.get(word, word) for word in words.split()), timeout=60)
        said = done.stdout + done.stderr
        if done.returncode not in {0, 1, 3} or "Traceback" in said:
            return f"{done.returncode}: {said[-1500:]}"
        if SECRET in said or "root:x:" in said:
            return "it shows a file of this machine"
        if not words.startswith("failed export") and (found := ESCAPES.search(said)):
            return f"it lets {found[0]!r} through: {said[:500]!r}"
        return ""

    def news(self) -> str:
        """Return what the processes have logged since the last time that they never should."""
        log = self.product.log
        fresh, self._read = log[self._read :], len(log)
        found = re.search(r"Traceback|failed unexpectedly|session error", fresh)
        return fresh[max(0, found.start() - 500) : found.start() + 1500] if found else ""


@pytest.fixture
def house(tmp_path: Path, product: Make, scripted: Make, redis_factory: Callable[..., RedisServer]) -> Iterator[House]:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "decoy").write_text(SECRET)
    old, new = scripted(), scripted()
    picky, later = scripted({"RCPT": "550 5.1.1 no such user"}), scripted({"RCPT": "451 4.2.0 later"})
    server = redis_factory()
    made = product(
        primary=f"old={old.address}",
        backups=[f"new={new.address}", f"picky={picky.address}", f"later={later.address}", "dead=127.0.0.1:9"],
        redis_url=server.url,
        settings={"retry.first": "3600", "workers.sweep": "5", "ready.check_every": "2"},
    )
    with server.client() as connection:
        found = House(made, connection, outside)
        found.fill(picky)
        yield found
        found.put_back()
        assert made.send("last@example.com", "last@example.com").startswith("250")
        wait_until(lambda: any(m.sender == "last@example.com" for m in new.messages))
        assert made.stop() == 0
        assert [path.read_text() for path in outside.iterdir()] == [SECRET]


def spoil(
    house: House, chance: random.Random, keys: int, each: int, commands: int, of: bytes = b"", among: Sequence[str] = ()
) -> int:
    """Spoil so many keys, in so many ways each, and run so many commands after each; return how many ways it were."""
    count = 0
    known = [key for key in house.snapshot if not FOREIGN.match(key) and key.startswith(of)]
    for key in chance.sample(known, min(keys, len(known))):
        house.put_back()
        if not house.connection.exists(key):
            continue
        ways = list(variants(house.connection, key))
        for what, way in chance.sample(ways, min(each, len(ways))):
            house.put_back()
            way(house.connection)
            for words in chance.sample(among or COMMANDS, commands):
                trouble = house.check(words)
                assert not trouble, f"{key!r} {what}: smtp-dup {words}: {trouble}"
            assert not (trouble := house.news()), f"{key!r} {what}: {trouble}"
            count += 1
            if count % 10 == 0:
                assert house.product.send("m@example.com", "m@example.com").startswith("250"), f"{key!r} {what}"
    return count


def test_some_keys(house: House) -> None:
    """One way for a dozen of keys."""
    assert spoil(house, random.Random(SEED), 12, 1, 3) >= 6


def test_keys_of_who_has_moved(house: House) -> None:
    """The map, its state and its changes, and the commands that read them."""
    assert spoil(house, random.Random(SEED), 3, 2, 4, b"smtpdup:moved", OF_MOVES) >= 5


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_keys(house: House) -> None:
    """Every key, and some commands after each; ``SMTPDUP_HOSTILE=3:8`` has several ways for each, and most commands."""
    assert spoil(house, random.Random(SEED), 1000, WAYS, RUNS) >= 30 * WAYS
