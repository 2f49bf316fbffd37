"""Moving mailboxes as an operator asks for it: what is asked, what keeps a mailbox where it is, and what would change.

Each address is looked at as `promote` looks at a server once: the new server must get copies of its mail, have none of
them failed there, and none that waits for long. What Redis says is data; what nobody can tell keeps nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from relay.cockpit import formatting
from relay.config.model import Settings
from relay.config.types import quoted
from relay.ledger import audit, changes, divergence_groups, hosts, queries
from relay.ledger.health import Health
from relay.mail.address_keys import EVERYBODY, NULL_SENDER, entry_key, lookup_keys
from relay.mail.destination import Destination
from relay.mail.recipient import Recipient
from relay.mail.text import printable
from relay.routing import loading, moved_copy
from relay.routing.decisions import RouteDecision, RoutePlan, Router
from relay.routing.moved_copy import MovedMap
from relay.routing.table_file import entries as entries_of
from relay.smtpd.recipients import typed_path
from relay.smtpd.syntax import SyntaxProblem
from relay.topology import decisions, moving, promotion
from relay.topology.decisions import View
from relay.topology.heartbeats import Heartbeat
from relay.topology.moved import MapState, MovedEntry, is_key
from relay.topology.roles import as_settings_say, decided
from workers.queues import selection
from workers.queues.selection import FAILED, WAITING, Filter

_LOOKED = 200_000  # copies, at most, whose recipients are looked at
_FRESH_SECONDS = 300.0
_ANY = "any-mailbox"  # stands for everybody in a domain


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be moved: as it was given, its key, and its line in a file; ``to`` where the file names a server."""

    text: str
    key: str
    line: int = 0
    to: str = ""

    @property
    def shown(self) -> str:
        return f"line {self.line}: {self.key}" if self.line else self.key


@dataclass(frozen=True, slots=True)
class Kept:
    """What is not moved, and why."""

    address: str
    why: str


@dataclass(slots=True)
class MovePlan:
    """What a batch would change. ``objections`` are about all of it, ``kept`` about single addresses."""

    seen: View
    state: MapState | None
    held: MovedMap  # this host's copy
    to: str  # "" for each to its former server
    wanted: dict[str, MovedEntry | None] = field(default_factory=dict)
    before: dict[str, MovedEntry] = field(default_factory=dict)
    formers: dict[str, str] = field(default_factory=dict)  # key -> who answers now
    kept: list[Kept] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    objections: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    lost: str = ""  # why Redis does not have the map as it was

    @property
    def known(self) -> int:
        """The highest generation that anybody goes by."""
        return moving.highest(self.seen.beats, self.held.state)

    @property
    def generation(self) -> int:
        return max(self.known, self.state.generation if self.state else 0) + 1


# What is asked --------------------------------------------------------------------------------------------------------


def wish(text: str, *, fold: bool, is_domain: bool = False, line: int = 0, to: str = "") -> Wish | Kept:
    """Read an address, or a domain as @example.com."""
    bare = text.strip()
    if bare.startswith("<") and bare.endswith(">") and bare != NULL_SENDER:
        bare = bare[1:-1]
    label = f"line {line}: {printable(bare)}" if line else printable(bare)
    if is_domain:
        bare = f"@{bare.removeprefix('@')}"
        if "@" in bare[1:]:
            return Kept(label, "expected a domain: example.com, or .example.com for all below it")
    elif line and "@" not in bare and "." in bare.strip("."):
        bare = f"@{bare}"  # a list of domains
    if "@" not in bare:
        return Kept(label, "expected user@example.com: an address without a domain takes the default route")
    try:
        key = entry_key(bare, fold=fold)
        if "@" in bare[1:]:  # an address, read and looked up as the relay does with that of a message
            key = lookup_keys(typed_path(bare, "TO"), fold=fold)[0]
    except ValueError as error:
        return Kept(label, str(error))
    except SyntaxProblem:
        return Kept(label, "expected what RCPT TO:<user@example.com> can have between the brackets")
    if key in {EVERYBODY, NULL_SENDER} or not is_key(key):
        return Kept(label, "expected user@example.com or @example.com")
    return Wish(printable(bare), key, line, to)


def wishes_of_file(text: str, *, fold: bool) -> Iterator[Wish | Kept]:
    """Yield what a file asks for: an address a line, Postfix's texthash, or CSV with a header."""
    faults: list[str] = []
    for line, key, value in entries_of(text, faults):
        yield wish(key, fold=fold, line=line, to=value)
    for fault in faults:
        yield Kept(fault.partition(": ")[0], fault.partition(": ")[2] or fault)


# Who answers ----------------------------------------------------------------------------------------------------------


class Answering:
    """Who answers for whom, moved or not, as these settings and the last promotion have it."""

    def __init__(self, connection: Any, settings: Settings) -> None:
        """Raises BadTable, RedisError."""
        topology = promotion.standing(connection, settings)
        roles = (topology and decided(settings, topology)) or as_settings_say(settings)
        self.primary = roles.primary.name
        self.backups = tuple(backup.name for backup in roles.backups)
        self._settings = settings
        tables = loading.tables_as_they_are(settings, lambda _: None)
        self._router: Router = loading.router_of(settings, tables).with_routes(roles.routes)
        self._plan: RoutePlan = self._router.plan(
            self.primary,
            "",
            "127.0.0.1",
            settings.smtp.addresses[0],
            token="message",  # noqa: S106  (no password)
        )
        self._servers = {server.name: server for server in (*settings.named, *roles.backups)}

    def former(self, key: str) -> RouteDecision:
        """Return what holds for an address or a domain that has not moved. Raises OSError."""
        return self._plan.decide(sample(key))

    def keys(self, key: str) -> list[str]:
        """Return the keys under which an address of this one is looked up: its own, and its domain's."""
        return self._router.keys(sample(key))

    def is_copied(self, key: str, name: str) -> bool:
        """Say whether a server has the mail of an address or domain: it answers, or gets copies."""
        found = self.former(key)
        if name in found.servers[:1]:
            return True
        server: Destination | None = self._servers.get(name)
        wants = server is None or server.wants(Recipient(sample(key)))
        return name in found.copied(self.backups) and wants


def sample(key: str) -> str:
    """Return an address that stands for what a key is for."""
    local, _, domain = key.rpartition("@")
    if local:
        return key
    return f"{_ANY}@any-host{domain}" if domain.startswith(".") else f"{_ANY}@{domain}"


# What keeps a mailbox where it is -------------------------------------------------------------------------------------


def troubles(connection: Any, settings: Settings, name: str, wanted: Iterable[str]) -> dict[str, list[str]]:
    """Return for each of these keys what is wrong with its copies at a server: some have failed, or wait for long.

    Raises RedisError, TooMany.
    """
    looking = _Looking(settings, frozenset(wanted), changes.now(connection))
    groups = divergence_groups.groups(connection, name)
    looking.acknowledged = {group.key for group in groups if group.is_acknowledged(looking.now)}
    looked = 0
    for which in (WAITING, FAILED):
        with suppress(queries.UnknownDestination):
            for page in selection.select(connection, which, Filter(destination=name), whole=True):
                looked += page.looked_at
                if looked > _LOOKED:
                    raise TooMany
                for row in page.found:
                    looking.look(which, row, page.target)
    return _in_words(name, looking.failed, looking.waiting)


@dataclass(slots=True)
class _Looking:
    """What is found wrong with the copies of some keys."""

    settings: Settings
    keys: frozenset[str]
    now: float
    acknowledged: set[str] = field(default_factory=set)  # groups of divergence
    waiting: dict[str, list[float]] = field(default_factory=dict)  # key -> ages
    failed: dict[str, list[str]] = field(default_factory=dict)  # key -> replies

    def look(self, which: selection.Which, row: selection.Found, target: Destination) -> None:
        state, age = row.state, self.now - row.score
        if which is FAILED and (not state.open or any(group[1:] not in self.acknowledged for group, _ in state.open)):
            for key in self._asked(row, target):
                self.failed.setdefault(key, []).append(printable(state.last_reply))
        elif which is WAITING and (state.attempts or age > self.settings.ready.max_age):
            for key in self._asked(row, target):
                self.waiting.setdefault(key, []).append(age)

    def _asked(self, row: selection.Found, target: Destination) -> set[str]:
        fold, addresses = self.settings.routes.fold_local, queries.addressees(row.envelope, target, row.state)
        return {key for address in addresses for key in lookup_keys(address, fold=fold) if key in self.keys}


def _in_words(
    name: str, failed: Mapping[str, Sequence[str]], waiting: Mapping[str, Sequence[float]]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, replies in failed.items():
        said = f": {replies[-1][:120]}" if replies[-1] else ""
        found.setdefault(key, []).append(f"{formatting.count(len(replies), 'copy', 'copies')} failed at {name}{said}")
    for key, ages in waiting.items():
        copies = f"{formatting.count(len(ages), 'copy waits', 'copies wait')}"
        found.setdefault(key, []).append(f"{copies} for {name}, the oldest for {formatting.span(max(ages))}")
    return found


class TooMany(Exception):
    """More copies wait than can be looked through."""


def objections(connection: Any, settings: Settings, name: str, beats: Sequence[Heartbeat]) -> Iterator[str]:
    """Yield why nobody should be moved to a server now."""
    for beat in beats:
        if beat.moved is None:
            yield f"{beat.label} runs version {beat.version}, which knows no moves: update it first"
        elif name not in beat.servers:
            yield f"the settings of {beat.label} do not name {name}"
    health = Health.read(connection, name)
    state, reason = health.describe(changes.now(connection))
    if state != "ok":
        yield f"{name} is {state}: {printable(reason)}" if reason else f"{name} is {state}"
    relaying = {host.place for host in hosts.read(connection) if host.relays}
    fresh = max(_FRESH_SECONDS, 3 * settings.ready.check_every)
    for reach in hosts.reaches(connection, name):
        if reach.place in relaying and reach.age <= fresh and not reach.ok:
            yield f"{name} cannot be used from {reach.host}: {printable(reach.text)}"


# The plan -------------------------------------------------------------------------------------------------------------


def plan(
    connection: Any,
    settings: Settings,
    asked: Sequence[Wish | Kept],
    to: str,
    *,
    back: bool = False,
    note: str = "",
    force: bool = False,
) -> MovePlan:
    """Look what it would take to move these, or to move them back. Raises BadTable, OSError, RedisError.

    With ``force`` what is wrong with an address is a remark.
    """
    made = begin(connection, settings, to)
    made.kept = [one for one in asked if isinstance(one, Kept)]
    wanted = list({one.key: one for one in asked if isinstance(one, Wish)}.values())
    answering = Answering(connection, settings)
    looked_up = {one.key: answering.keys(one.key) for one in wanted}
    keys = list(dict.fromkeys(key for some in looked_up.values() for key in some))
    found = made.held.entries(keys) if made.lost else moving.entries(connection, keys)[0]
    made.before = {one.key: found[one.key] for one in wanted if one.key in found}
    for one in wanted:
        by = next((found[key].server for key in looked_up[one.key] if key in found), "")
        made.formers[one.key] = by or answering.former(one.key).servers[0]
    if back:
        _back(made, wanted, looked_up, found, answering)
    else:
        made.objections += objections(connection, settings, to, made.seen.living)
        _forth(connection, settings, made, wanted, answering, note, force=force)
    if not made.seen.living:
        made.remarks.append("no relay process lives: each follows at its start")
    return made


def begin(connection: Any, settings: Settings, to: str = "") -> MovePlan:
    """Look how the map stands, and who goes by it, before anything is moved. Raises RedisError."""
    seen = decisions.view(connection)
    made = MovePlan(seen, seen.moves, moved_copy.load_or_tell(settings.state_dir), to)
    made.lost = moving.lost(made.known, seen.moves, seen.nonsense_of_moves, moving.size(connection))
    held, state = made.held.state, seen.moves
    if not made.lost and state and held.generation == state.generation and held.id != state.id:
        made.lost = "Redis holds another map of who has moved than the relays go by"
    return made


def _forth(
    connection: Any,
    settings: Settings,
    made: MovePlan,
    wanted: Sequence[Wish],
    answering: Answering,
    note: str,
    *,
    force: bool,
) -> None:
    to, by = made.to, audit.operator()
    try:
        wrong = troubles(connection, settings, to, [one.key for one in wanted])
    except TooMany:
        made.objections.append(f"over {_LOOKED:,} copies wait for {to} or have failed: whose they are is not looked up")
        wrong = {}
    for one in wanted:
        before = made.before.get(one.key)
        if one.to and one.to != to:
            made.kept.append(Kept(one.shown, f"its line says {quoted(one.to)}, the command {to}"))
        elif before is not None and before.server == to:
            made.already.append(one.key)
        else:
            why = "; ".join(wrong.get(one.key, ()))
            if not answering.is_copied(one.key, to):
                why = f"{to} gets no copies of its mail: what came so far is not there"
            if why and not force:
                made.kept.append(Kept(one.shown, why))
                continue
            if why:
                made.remarks.append(f"{one.key}: {why}")
            made.wanted[one.key] = MovedEntry(to, 0.0, by, note)
    domains = divergence_groups.domains(connection, to)
    never = sorted({d for one in wanted if (d := one.key.rpartition("@")[2]) not in domains or not domains[d][0]})
    if never and wanted and to != answering.primary:
        made.remarks.append(f"no copy for {formatting.some(never)} has been delivered to {to} so far")
    if to == answering.primary and not settings.route_table and made.wanted:
        made.remarks.append(f"{to} answers by default: these stay there whoever is promoted")


def _back(
    made: MovePlan,
    wanted: Sequence[Wish],
    looked_up: Mapping[str, Sequence[str]],
    found: Mapping[str, MovedEntry],
    answering: Answering,
) -> None:
    for one in wanted:
        before = made.before.get(one.key)
        others = [key for key in looked_up[one.key] if key in found and key != one.key]
        if before is None and others:
            where = f"{others[0]} has moved to {found[others[0]].server}"
            made.kept.append(Kept(one.shown, f"it has no entry of its own, {where}: move it --to another server"))
        elif before is None:
            made.already.append(one.key)
        elif made.to and before.server != made.to:
            made.kept.append(Kept(one.shown, f"it has moved to {before.server}, not to {made.to}"))
        else:
            made.wanted[one.key] = None
            if others:
                made.remarks.append(f"{one.key} stays at {found[others[0]].server}, since {others[0]} has moved there")
            elif before.server == answering.former(one.key).servers[0]:
                made.remarks.append(f"{one.key} stays at {before.server}, which answers for it anyway")
