"""What a decision means on this host: its settings say what each name stands for, the decision who of them answers.

Every server that the settings name gets each message, as the primary or as a copy; a decision only says who is the
primary. So a host whose settings do not know the one that was promoted goes on as they say, and loses nothing: it is
late, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from relay.config.model import Settings
from relay.mail.destination import Destination
from relay.topology.state import Intent, Topology


@dataclass(frozen=True, slots=True)
class Roles:
    """The primary and the backups, as this host's settings define them, since a decision; epoch 0: since none."""

    epoch: int
    primary: Destination
    backups: tuple[Destination, ...]


def as_settings_say(settings: Settings) -> Roles:
    """Return the roles before any decision. Raises ValueError for settings without a primary."""
    if settings.primary is None:
        raise ValueError("a relay needs a primary")
    return Roles(0, settings.primary, settings.backups)


def decided(settings: Settings, topology: Topology) -> Roles | None:
    """Return the roles after a decision; None where these settings do not know who was promoted."""
    primary = settings.primary
    if primary is None:
        return None
    if topology.primary == primary.name:
        return Roles(topology.epoch, primary, settings.backups)
    for backup in settings.backups:
        if backup.name == topology.primary:
            # The former primary takes the place of the one that leaves it.
            others = tuple(settings.demoted if b is backup else b for b in settings.backups)
            return Roles(topology.epoch, backup, tuple(b for b in others if b is not None))
    return None


def backups_now(settings: Settings, topology: Topology | None) -> tuple[Destination, ...]:
    """Return who gets copies now, as these settings define them, also settings without a primary."""
    roles = decided(settings, topology) if topology else None
    return roles.backups if roles else settings.backups


def objection(settings: Settings, intent: Intent) -> str:
    """Say why these settings do not let a server be the primary; "" where they do."""
    known = {server.name: server for server in (settings.primary, *settings.backups) if server}
    missing = [name for name in (intent.primary, intent.old) if name and name not in known]
    if missing:
        return f"its settings do not name {' and '.join(missing)}"
    server = known[intent.primary]
    if server.domains and server is not settings.primary:
        return f"{server.name} takes mail of {len(server.domains)} domains only, by its settings: domains"
    return ""


def disagreement(settings: Settings, topology: Topology | None) -> str:
    """Say where these settings name another primary than the one that was promoted; "" where they agree."""
    primary = settings.primary
    if topology is None or primary is None or topology.primary == primary.name:
        return ""
    now = topology.now
    promoted = f"{now.primary} was promoted (epoch {now.epoch}, by {now.by or 'somebody'})"
    if decided(settings, topology) is None:
        return f"{promoted}, but these settings do not name it: mail goes to {primary.name}"
    return f"{promoted} and answers, although the settings name {primary.name}: edit them to agree, or promote that"
