"""The Settings as the rest of the program uses them: one frozen dataclass for each section.

Durations are seconds (float), sizes are bytes. The loader has validated every value.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from relay.config.options import SECTIONS
from relay.config.routes import Route
from relay.config.types import Demoted, PageHost, listen_addresses, mask, sentinel_url
from relay.mail.addresses import Network, within
from relay.mail.destination import Destination
from relay.mail.timeouts import Timeouts


@dataclass(frozen=True, slots=True)
class SmtpSettings:
    """The client side."""

    listen: str
    domain: str
    processes: int
    max_connections: int
    max_message_bytes: int
    max_recipients: int
    max_bytes_in_flight: int
    max_hops: int
    max_line_bytes: int
    max_headers: int
    max_header_bytes: int
    max_connections_per_client: int
    min_data_rate: int
    bare_newline: str
    bare_newline_exclusions: tuple[Network, ...]
    allowed_networks: tuple[Network, ...]
    allowed_domains: tuple[str, ...]
    users_file: Path | None
    auth_without_tls: bool
    tls: str
    tls_certificate: Path | None
    tls_key: Path | None
    listen_tls: str
    xforward_networks: tuple[Network, ...]
    proxy_protocol: bool
    proxy_networks: tuple[Network, ...]
    idle_timeout: float
    lease_idle_timeout: float
    greeting_delay: float

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """(host, port) of each listening socket; the host "" means all interfaces."""
        return listen_addresses(self.listen)

    @property
    def tls_addresses(self) -> tuple[tuple[str, int], ...]:
        """(host, port) of each listening socket with TLS from the first octet."""
        return listen_addresses(self.listen_tls)

    @property
    def offers_tls(self) -> bool:
        """Whether clients can use TLS."""
        return self.tls_certificate is not None and (self.tls != "none" or bool(self.listen_tls))

    def allows(self, address: str) -> bool:
        """Return whether a client with this IP address may send mail without logging in."""
        return within(address, self.allowed_networks)

    @property
    def process_count(self) -> int:
        """``processes``, or half the number of cores that this process may use.

        The other half is for the workers and Redis, which a message costs about as much; and the fewer processes, the
        more messages share a commit: two on two cores take 12 to 19 % more processor time a message than one.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return self.processes or max(1, (cores or 1) // 2)


@dataclass(frozen=True, slots=True, repr=False)
class RelaySettings:
    """The primary leg. The destinations are raw texts with passwords: use Settings.primary and .backups instead."""

    destination_primary: str
    destination_backups: tuple[str, ...]
    timeout_seconds: float
    greeting_timeout_seconds: float
    command_timeout_seconds: float
    messages_per_connection: int
    connection_age: float
    final_timeout_seconds: float
    require_durable_copies: bool
    await_release: bool
    uncertain_hold: float
    demoted: Demoted

    @property
    def timeouts(self) -> Timeouts:
        """The time-outs of a server; a ``timeout_seconds`` of minutes raises the others to at least that."""
        least = self.timeout_seconds
        return Timeouts(least, max(least, self.greeting_timeout_seconds), max(least, self.command_timeout_seconds))


@dataclass(frozen=True, slots=True, repr=False)
class RedisSettings:
    """The Redis in which copies wait. The URLs may hold passwords, so they are excluded from repr."""

    url: str  # "": the embedded Redis, which only `up` starts; with Sentinels the host is ignored
    timeout_seconds: float
    sentinels: tuple[str, ...] = ()  # as written in the settings
    service: str = "mymaster"
    replicas: int = 0
    program: str = ""  # of the embedded one; "": see relay.redisio.embedded

    @property
    def sentinel_urls(self) -> tuple[str, ...]:
        return tuple(sentinel_url(text) for text in self.sentinels)

    @property
    def sentinel_addresses(self) -> tuple[str, ...]:
        """host:port of each Sentinel, without its password."""
        return tuple(
            mask(text).partition("://")[2].rpartition("@")[2].partition("/")[0].partition("?")[0]
            for text in self.sentinel_urls
        )

    @property
    def shown(self) -> str:
        """The URL without its password, or the service and its Sentinels, for logs and listings."""
        if self.sentinels:
            return f"{self.service} of the Sentinels {', '.join(self.sentinel_addresses)}"
        return mask(self.url)

    def at(self, url: str) -> RedisSettings:
        """Return these settings with another URL, such as that of the embedded Redis."""
        return replace(self, url=url) if url else self


@dataclass(frozen=True, slots=True)
class SpoolSettings:
    """The spool, which holds the copies that Redis cannot take."""

    dir: Path | None  # None: no spool
    min_free: int


@dataclass(frozen=True, slots=True)
class StorageSettings:
    """How copies are stored in Redis and in the spool."""

    key_file: Path | None  # None: not encrypted


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """The schedule of a deferred copy, in seconds."""

    first: float
    longest: float
    give_up: float


@dataclass(frozen=True, slots=True)
class FailedSettings:
    """How long failed copies are kept, and how many bytes of them in Redis."""

    ttl: float
    max_bytes: int


@dataclass(frozen=True, slots=True)
class DivergenceSettings:
    """What counts as noise, and how long closed reasons are listed; in seconds."""

    noise: float
    keep: float


@dataclass(frozen=True, slots=True)
class ReadySettings:
    """What `smtp-dup ready` requires of a backup before it may become the primary; 0 or false: not required."""

    days: int = 7
    min_messages: int = 1000
    busiest_hour: bool = True
    max_open: int = 0
    max_deferred: int = 1  # percent
    max_age: float = 60.0
    max_age_p99: float = 300.0
    calm: float = 86400.0
    max_slower: int = 2
    probe_age: float = 604800.0
    arrived_age: float = 604800.0
    require_arrived: bool = False
    check_every: float = 300.0


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """The trace: how addresses are kept, how much of it, for how long (seconds)."""

    addresses: str = "clear"
    max_bytes: int = 2 << 30  # 0: no trace
    keep: float = 14 * 86400.0


@dataclass(frozen=True, slots=True)
class RoutesSettings:
    """How addresses are compared with those of [[route]]."""

    fold_local: bool = True
    split: str = "defer"


@dataclass(frozen=True, slots=True)
class StatusSettings:
    """The page, health and metrics over HTTP."""

    listen: str  # "": off
    users_file: Path | None = None
    hosts: tuple[PageHost, ...] = ()
    dashboard_url: str = ""

    @property
    def address(self) -> tuple[str, int] | None:
        return listen_addresses(self.listen)[0] if self.listen else None


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Level and format of the log."""

    level: str
    format: str
    addresses: bool = False


@dataclass(frozen=True, slots=True)
class WorkersSettings:
    """The worker processes; ``processes`` for each backup, or one for all quiet ones of more than ``shared_above``."""

    processes: int
    shared_above: int
    batch: int
    connections: int
    first_try_from_memory: bool
    sweep: float

    @property
    def job_size(self) -> int:
        """The most copies in a job: one script claims them, and Lua's ``unpack`` is limited to some 8,000 values."""
        return min(self.batch, 1000)


@dataclass(frozen=True, slots=True, repr=False)
class Layers:
    """What the settings were made of, secrets too: values as they were given, and where each came from.

    ``tables`` are the [[backup]], each with the place of every field, ``servers`` the [[server]] and ``routes`` the
    [[route]]; ``of_backups`` is what flags say of a backup.
    """

    given: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    tables: Sequence[tuple[Any, Mapping[str, str]]] = ()
    of_backups: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    servers: Sequence[tuple[Any, Mapping[str, str]]] = ()
    routes: Sequence[tuple[Any, Mapping[str, str]]] = ()

    def are_within(self, others: Layers) -> bool:
        """Say whether all that is given here, but for the state folder, is given there, too, wherever it came from."""
        keys = self.given.keys() - {"state_dir"}
        return (
            all(key in others.given and self.given[key][0] == others.given[key][0] for key in keys)
            and all(any(table == other for other, _ in others.tables) for table, _ in self.tables)
            and all(any(table == other for other, _ in others.servers) for table, _ in self.servers)
            and all(any(table == other for other, _ in others.routes) for table, _ in self.routes)
            and all(fields == others.of_backups.get(name) for name, fields in self.of_backups.items())
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, in seconds and bytes; ``origins`` maps each key that was set to its place."""

    smtp: SmtpSettings
    relay: RelaySettings
    redis: RedisSettings
    spool: SpoolSettings
    storage: StorageSettings
    retry: RetrySettings
    failed: FailedSettings
    divergence: DivergenceSettings
    ready: ReadySettings
    trace: TraceSettings
    status: StatusSettings
    log: LogSettings
    workers: WorkersSettings
    routes: RoutesSettings
    state_dir: Path
    primary: Destination | None
    demoted: Destination | None  # the primary as it gets copies, once another has been promoted
    backups: tuple[Destination, ...]
    origins: Mapping[str, str]
    layers: Layers = field(default_factory=Layers, repr=False, compare=False)
    servers: tuple[Destination, ...] = ()  # [[server]]: only routes name them
    route_table: tuple[Route, ...] = ()

    @property
    def named(self) -> tuple[Destination, ...]:
        """Every server that has a name here: the primary, the backups, and those of [[server]]."""
        return (*([self.primary] if self.primary else []), *self.backups, *self.servers)

    @property
    def copied(self) -> tuple[Destination, ...]:
        """Every server that may get copies: the backups, and whom a route owes some."""
        if not self.route_table:
            return self.backups
        forks = any(route.split == "fork" for route in self.route_table)  # then any may get a part as a copy
        wanted = {name for route in self.route_table for name in route.copied}
        wanted = ({s.name for s in self.named} if forks else wanted) - {backup.name for backup in self.backups}
        others = (*([self.demoted] if self.demoted else []), *self.servers)
        return (*self.backups, *(server for server in others if server.name in wanted))

    def value(self, key: str) -> Any:
        """Return the value of a dotted key."""
        found: Any = self
        for part in key.split("."):
            found = getattr(found, part)
        return found


PARTS: dict[str, type] = {name: kind for name, kind in get_type_hints(Settings).items() if name in SECTIONS}
DEMOTED_ORIGIN = "demoted"  # of the [[backup]] that the primary would be
