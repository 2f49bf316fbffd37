"""Relay hosts with routes of every kind, and worker hosts, that share one Redis and seven servers.

The hosts are products with state folders of their own. Every server gets its copies with the null sender: so what it
had as a primary, and what as a copy, is told apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import suppress

import redis

from relay.ledger import keys, overview
from relay.spool import writer
from relay.topology import decisions
from support.product import QUICK, Product
from support.redis_link import RedisLink
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

SETTINGS = {
    **QUICK,
    "relay.final_timeout_seconds": "6",
    "relay.uncertain_hold": "2",
    "redis.timeout_seconds": "2",
    "workers.sweep": "5",
    "workers.shared_above": "2",
    "routes.split": "fork",
}
NAMES = ("old", "new", "a", "b", "c", "shop", "archive")
OWED = {
    "pair.example": ("a", "b"),
    "trio.example": ("a", "b", "c"),
    "balanced.example": ("a", "c"),
    "shop.example": ("shop", "archive"),
    "example.com": ("old", "new"),
}
_SERVER = '[[{kind}]]\nname = "{name}"\nurl = "{url}"\nsender = "null"\n'
_ROUTES = """
[[route]]
name = "pair"
match = {{ recipients = "@pair.example" }}
servers = ["a", "b"]
copies = "others"
return_after = "{return_after}"
split = "fork"

[[route]]
name = "trio"
match = {{ recipients = "@trio.example" }}
servers = {trio}
copies = "others"
return_after = "{return_after}"

[[route]]
name = "balanced"
match = {{ recipients = "@balanced.example" }}
primary = {{ a = {weight}, c = 1 }}
copies = "others"

[[route]]
name = "shop"
match = {{ recipients = "@shop.example" }}
primary = "shop"
backups = ["archive"]
split = "fork"
"""


def recipients(number: int) -> tuple[str, ...]:
    """Return whom a message is for: one route, or two to all of them."""
    source = random.Random(f"recipients {number}")
    names = source.sample(sorted(OWED), source.choice((1, 1, 1, 2, 2, 3, len(OWED))))
    return tuple(f"r{number}@{name}" for name in names)


def routes(trio: str = '["a", "b", "c"]', return_after: str = "1s", weight: int = 3) -> str:
    """Return the routes as a settings file has them."""
    return _ROUTES.format(trio=trio, return_after=return_after, weight=weight)


class Hosts:
    """Relay hosts and worker hosts with the same settings and one Redis."""

    def __init__(
        self,
        make: Callable[..., Product],
        redis: RedisServer,
        servers: Mapping[str, ScriptedServer],
        *,
        relays: int = 3,
        workers: int = 1,
        link: Callable[[], RedisLink] | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """``link`` makes each host's own way to Redis, which can be cut."""
        self.redis, self.servers = redis, servers
        self.links: dict[Product, RedisLink] = {}
        self._link = link
        tables = [
            _SERVER.format(kind="backup" if name == "new" else "server", name=name, url=servers[name].address)
            for name in NAMES[1:]
        ]
        self._tables = "\n".join(tables)
        self._make = make
        self._settings = {**SETTINGS, **(settings or {})}
        self.relays = [self._host("relay") for _ in range(relays)]
        self.workers = [self._host("workers") for _ in range(workers)]

    def _host(self, command: str) -> Product:
        link = self._link() if self._link else None
        host = self._make(
            command=command,
            primary=f"old={self.servers['old'].address}",
            redis_url=link.url if link else self.redis.url,
            settings=self._settings,
            files={"settings.toml": self._tables + routes()},
        )
        if link:
            self.links[host] = link
        return host

    def write_routes(self, host: Product, **changes: object) -> None:
        """Put other routes into the settings file of a host."""
        (host.directory / "settings.toml").write_text(self._tables + routes(**changes))

    @property
    def all(self) -> list[Product]:
        return [*self.relays, *self.workers]

    @property
    def log(self) -> str:
        return "\n".join(host.log for host in self.all)


def is_drained(hosts: Hosts) -> bool:
    """Say whether nothing is under way any more; the hosts' own sweeps find what has lost its job."""
    with suppress(redis.RedisError), hosts.redis.client() as client:
        spooled = sum(writer.summary(host.state_dir / "spool").messages for host in hosts.relays)
        left = spooled + client.zcard(keys.UNCERTAIN) + client.zcard(keys.STAGED)
        return not left and all(row.pending == 0 for row in overview.summary(client))
    return False


def retry_what_failed(hosts: Hosts, patience: float = 120) -> int:
    """Have all failed copies tried again until none has failed, and all is delivered; returns how many were retried."""
    retried = 0
    asker = hosts.relays[0]

    def is_done() -> bool:
        nonlocal retried
        if not is_drained(hosts):
            return False
        failed = asker.json("failed", "list")
        retried += len(failed)
        if failed:
            asker.run("failed", "retry", "--all", "--yes", timeout=60)
        return not failed

    wait_until(is_done, patience, lambda: f"not drained: {asker.run('queue', 'summary').stdout}", 0.5)
    return retried


def agree(hosts: Hosts, patience: float = 60) -> None:
    """All relay processes of all hosts go by what was decided and moved last."""
    with hosts.redis.client() as client:

        def differ() -> list[str]:
            seen = decisions.view(client)
            return [
                f"{beat.label}: {beat.epoch} {beat.primary} {beat.trouble} {beat.moved} {beat.moved_trouble}"
                for beat in seen.living
                if not seen.follows(beat) or not seen.goes_by_moves(beat) or beat.trouble
            ]

        wait_until(lambda: not differ(), patience, lambda: f"not followed: {differ()}", 0.5)
