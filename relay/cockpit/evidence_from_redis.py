"""Reads from Redis what is known of a backup, as the evidence on which its readiness is judged.

Nothing here scans: the flow is read by the hour, everything else is one key for each host or destination. Whoever asks
needs no more than the connection; what Redis says is data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from redis.exceptions import ResponseError

from relay.cockpit.divergence import Standing, standing
from relay.cockpit.evidence import Deferrals, Domain, Evidence, Missing, OpenGroup, Refusals, Relay, Restraint
from relay.cockpit.roles_now import by_default
from relay.config.model import Settings
from relay.ledger import changes, divergence_groups, flow, greetings, hosts, keys, overview, probe_evidence, registry
from relay.ledger.divergence import DEFERRED, GIVEN_UP, REFUSED
from relay.ledger.divergence_groups import Group
from relay.ledger.flow import Flow
from relay.ledger.health import Health
from relay.mail.stored import moment
from relay.mail.text import printable
from relay.topology import decisions, promotion
from relay.topology.agreement import differences
from relay.topology.roles import copied_now

HOURS = 35 * 24 + 1  # that the flow is remembered for, and the one that is not over


class UnknownBackup(LookupError):
    """Nobody is called so; the text says who there is."""


def gather(
    connection: Any, settings: Settings, name: str, old: str = "", compared: Sequence[str] = (), route: str = ""
) -> Evidence:
    """Read what is known of a backup, beside the primary or whom ``old`` names. Raises UnknownBackup, RedisError.

    ``compared`` are those that answer beside ``old`` now, on the ``route`` if one is named.
    """
    known = registry.destinations(connection)
    primary, backups = by_default(connection, settings)
    old = old or primary
    if name not in known and name not in backups:
        there = ", ".join(sorted({*known, *backups})) or "none"
        raise UnknownBackup(f"no backup {name!r}; there is: {there}")
    if name == old:
        raise UnknownBackup(f"{name} is the primary")
    copied = (*settings.copied, *copied_now(settings, promotion.standing(connection, settings)))
    now = changes.now(connection)
    hours = flow.read(connection, flow.HOUR, HOURS, now)
    stands = _standing(connection, name)
    said = greetings.read(connection, [name, old])
    seen = decisions.view(connection)
    probed = probe_evidence.read(connection, name, route, now)
    return Evidence(
        name=name,
        old=old,
        now=now,
        compared=[other for other in compared if other != name],
        ready=settings.ready,
        destination=next((b for b in copied if b.name == name), known.get(name)),
        restraint=_restraint(connection, name, now),
        first=_first(connection, hours, name),
        hours=hours,
        day=flow.total(hours[-25:]),
        summary=next((row for row in overview.summary(connection) if row.destination == name), None),
        refusals=stands if isinstance(stands, Missing) else _refusals(stands),
        deferrals=stands if isinstance(stands, Missing) else _deferrals(stands, now),
        outages=stands if isinstance(stands, Missing) else stands.outages,
        domains=stands if isinstance(stands, Missing) else _domains(connection, name),
        old_greeting=said.get(old),
        new_greeting=said.get(name),
        relays=[
            Relay(
                b.label, b.age, b.is_alive, b.generation, b.epoch, b.trouble or b.moved_trouble or _away(name, b.down)
            )
            for b in seen.beats
        ],
        differences=list(differences(seen)),
        hosts=hosts.read(connection),
        reaches=hosts.reaches(connection, name),
        old_reaches=hosts.reaches(connection, old),
        uncertain_late_s=_uncertain(connection, now),
        probed=[one for what, one in probed.items() if what != probe_evidence.REFUSALS],
        probed_refusals=probed.get(probe_evidence.REFUSALS),
    )


def _away(name: str, down: Sequence[str]) -> str:
    """Return what a relay process says of a server of its routes that it cannot use."""
    return f"cannot use {name}, so that others of its route answer" if name in down else ""


def _first(connection: Any, hours: Sequence[Flow], name: str) -> float | None:
    """Return when the first copy came, to the minute where minutes are remembered."""
    first = next((hour.start for hour in hours if name in hour.destinations), None)
    if first is None:
        return None
    minutes = flow.read(connection, flow.MINUTE, 60, first + 3599)
    return next((minute.start for minute in minutes if name in minute.destinations), first)


def _uncertain(connection: Any, now: float) -> float:
    """Return for how long the message that should go out first has been due."""
    first = connection.zrange(keys.UNCERTAIN, 0, 0, withscores=True)
    return max(0.0, now - moment(first[0][1])) if first else 0.0


def _restraint(connection: Any, name: str, now: float) -> Restraint:
    """Return what operators have set: a hold, a throttle."""
    health = Health.read(connection, name)
    held = ""
    if health.hold is not None and health.is_held(now):
        since = time.strftime("%H:%M", time.localtime(health.hold.since))
        held = f"by {health.hold.by} since {since}: {health.hold.reason}"
    return Restraint(held=held, throttled=f"to {health.bounds}" if health.bounds else "")


def _standing(connection: Any, name: str) -> Standing | Missing:
    try:
        return standing(connection, name)
    except ResponseError as error:  # another type of key, put there by others
        return Missing(f"the ledger's record of it makes no sense: {printable(str(error))}; see `smtp-dup divergence`")


def _refusals(found: Standing) -> Refusals:
    groups = [OpenGroup(_words(g), g.open) for g in found.open if g.kind in {REFUSED, GIVEN_UP}]
    return Refusals(groups, found.acknowledged)


def _words(group: Group) -> str:
    """Return how a group is called: "550 5.1.1 no such mailbox"."""
    return printable(" ".join(str(part) for part in (group.code or "", group.status, group.reason) if part))


def _deferrals(found: Standing, now: float) -> Deferrals:
    """Count what has been put off for long: of a group's open recipients those that did not come lately."""
    hour = int(now // 3600)
    old = [max(0, g.open - g.hours.get(hour, 0) - g.hours.get(hour - 1, 0)) for g in found.open if g.kind == DEFERRED]
    return Deferrals(sum(old), found.noise, found.taken + found.deferred)


def _domains(connection: Any, name: str) -> dict[str, Domain]:
    counts = divergence_groups.domains(connection, name)
    return {domain: Domain(taken, deferred + refused) for domain, (taken, deferred, refused, _) in counts.items()}
