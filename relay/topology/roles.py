"""What a decision means on this host: its settings say what each name stands for, the decision who of them answers.

Every server that the settings name gets each message, as the primary or as a copy; a decision only says who is the
primary. So a host whose settings do not know the one that was promoted goes on as they say, and loses nothing: it is
late, and says so. The same holds for each route.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from relay.config.model import Settings
from relay.config.routes import Route
from relay.mail.destination import Destination
from relay.mail.text import count
from relay.topology import route_roles
from relay.topology.state import Intent, Topology


@dataclass(frozen=True, slots=True)
class Roles:
    """The primary and the backups, as this host's settings define them, since a decision; epoch 0: since none.

    ``routes`` are those of the settings, with the roles that were decided for them.
    """

    epoch: int
    primary: Destination
    backups: tuple[Destination, ...]
    routes: tuple[Route, ...] = ()


def as_settings_say(settings: Settings) -> Roles:
    """Return the roles before any decision. Raises ValueError for settings without a primary."""
    if settings.primary is None:
        raise ValueError("a relay needs a primary")
    return Roles(0, settings.primary, settings.backups, settings.route_table)


def decided(settings: Settings, topology: Topology) -> Roles | None:
    """Return the roles after a decision; None where these settings do not know who was promoted."""
    primary = settings.primary
    if primary is None:
        return None
    routes = route_roles.table(settings, topology)
    if topology.primary == primary.name:
        return Roles(topology.epoch, primary, settings.backups, routes)
    for backup in settings.backups:
        if backup.name == topology.primary:
            # The former primary takes the place of the one that leaves it.
            others = tuple(settings.demoted if b is backup else b for b in settings.backups)
            return Roles(topology.epoch, backup, tuple(b for b in others if b is not None), routes)
    return None


def backups_now(settings: Settings, topology: Topology | None) -> tuple[Destination, ...]:
    """Return who gets copies by default now, as these settings define them, also settings without a primary."""
    roles = decided(settings, topology) if topology else None
    return roles.backups if roles else settings.backups


def copied_now(settings: Settings, topology: Topology | None) -> tuple[Destination, ...]:
    """Return everybody who may get copies now, by default or by a route."""
    return copied(settings, backups_now(settings, topology), route_roles.table(settings, topology))


def copied(settings: Settings, backups: Iterable[Destination], routes: Iterable[Route]) -> tuple[Destination, ...]:
    """Return everybody who may get copies where these are the backups and the routes."""
    found = {backup.name: backup for backup in backups}
    for name in dict.fromkeys(name for route in routes for name in route.copied):
        server = found.get(name) or as_copied(settings, name)
        if server is not None:
            found[name] = server
    return tuple(found.values())


def may_be_copied(settings: Settings) -> tuple[Destination, ...]:
    """Return everybody who may get copies, whatever is decided and whoever moves."""
    names = [server.name for server in (settings.primary, *settings.backups) if server]
    names += [name for route in settings.route_table for name in (*route.servers, *route.copied)]
    return tuple(server for name in dict.fromkeys(names) if (server := as_copied(settings, name)))


def as_copied(settings: Settings, name: str) -> Destination | None:
    """Return a server as it gets copies: one that these settings owe none gets them as relay.demoted says."""
    for known in (*settings.backups, *([settings.demoted] if settings.demoted else [])):
        if known.name == name:
            return known
    server = next((server for server in settings.servers if server.name == name), None)
    if server is None or any(name in route.copied for route in settings.route_table):
        return server
    tables = (table for table, _ in settings.layers.servers)
    table = next((t for t in tables if isinstance(t, Mapping) and t.get("name") == name), {})
    sender, soft_bounce = settings.relay.demoted
    return replace(server, sender=table.get("sender", sender), soft_bounce=table.get("soft_bounce", soft_bounce))


def objection(settings: Settings, intent: Intent) -> str:
    """Say why these settings do not let a server be the primary; "" where they do."""
    if intent.route:
        return route_roles.objection(settings, intent)
    known = {server.name: server for server in (settings.primary, *settings.backups) if server}
    missing = [name for name in (intent.primary, intent.old) if name and name not in known]
    if missing:
        return f"its settings do not name {' and '.join(missing)}"
    server = known[intent.primary]
    if server.domains and server is not settings.primary:
        return f"{server.name} takes mail of {count(len(server.domains), 'domain')} only, by its settings: domains"
    return ""


def disagreement(settings: Settings, topology: Topology | None) -> str:
    """Say where these settings are otherwise than what was decided; "" where they agree."""
    return "; ".join(_disagreements(settings, topology)) if topology else ""


def _disagreements(settings: Settings, topology: Topology) -> Iterator[str]:
    primary, now = settings.primary, topology.now
    if primary is not None and topology.primary != primary.name:
        promoted = f"{now.primary} was promoted (epoch {now.epoch}, by {now.by or 'somebody'})"
        if decided(settings, topology) is None:
            yield f"{promoted}, but these settings do not name it: mail goes to {primary.name}; add it, and reload"
        else:
            yield (
                f"{promoted} and answers, although the settings name {primary.name}: edit them to agree, or "
                "promote that"
            )
    yield from route_roles.disagreements(settings, topology)
