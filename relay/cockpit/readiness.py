"""Is a backup ready to be the primary? The verdict over all criteria, and the evidence for it, read from Redis.

Nothing here scans: the flow is read by the hour, everything else is one key for each host or destination. Whoever asks
needs no more than the connection; what Redis says is data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.exceptions import ResponseError

from relay.cockpit.criteria import CRITERIA, Criterion
from relay.cockpit.divergence import Standing, standing
from relay.cockpit.evidence import Deferrals, Domain, Evidence, Missing, OpenGroup, Refusals, Relay, Restraint
from relay.cockpit.finding import Finding, Result
from relay.config.model import Settings
from relay.ledger import changes, divergence_groups, flow, greetings, hosts, keys, overview, registry
from relay.ledger.divergence import DEFERRED, GIVEN_UP, REFUSED
from relay.ledger.divergence_groups import Group
from relay.ledger.flow import Flow
from relay.ledger.health import Health
from relay.mail.stored import moment
from relay.mail.text import printable
from relay.topology import decisions, promotion, route_roles
from relay.topology.agreement import differences
from relay.topology.roles import copied_now

HOURS = 35 * 24 + 1  # that the flow is remembered for, and the one that is not over


class UnknownBackup(LookupError):
    """Nobody is called so; the text says who there is."""


class UnknownRoute(LookupError):
    """No route is called so; the text says which there are."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A criterion and what it came to."""

    criterion: Criterion
    finding: Finding

    def as_object(self) -> dict[str, Any]:
        """Return it for a program."""
        criterion = self.criterion
        return {
            "number": criterion.number,
            "criterion": criterion.name,
            "result": self.finding.result.value,
            "text": self.finding.text,
            "age_s": self.finding.age,
            "rule": criterion.rule,
            "settings": list(criterion.settings),
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a backup is ready to take the place of the primary ``old``, by which criteria, at the moment ``at``."""

    name: str
    old: str
    at: float
    judged: Sequence[Judged]

    def having(self, result: Result) -> list[Judged]:
        """Return the criteria that came to this."""
        return [j for j in self.judged if j.finding.result is result]

    @property
    def is_ready(self) -> bool:
        """Whether no criterion fails, and none is unknown."""
        return not any(j.finding.result.blocks for j in self.judged)

    @property
    def summary(self) -> str:
        """The verdict in a line."""
        counts = ((Result.FAIL, "fails", "fail"), (Result.UNKNOWN, "unknown", "unknown"))
        parts = [f"{n} {one if n == 1 else many}" for r, one, many in counts if (n := len(self.having(r)))]
        warnings = len(self.having(Result.WARN))
        if self.is_ready:
            parts = [f"{len(self.judged)} criteria"]
        if warnings:
            parts.append("1 warning" if warnings == 1 else f"{warnings} warnings")
        return f"{'READY' if self.is_ready else 'NOT READY'}: {', '.join(parts)}"

    def as_object(self) -> dict[str, Any]:
        """Return it for a program."""
        return {
            "destination": self.name,
            "primary": self.old,
            "ready": self.is_ready,
            "at": self.at,
            "summary": self.summary,
            "criteria": [j.as_object() for j in self.judged],
        }


def judge(evidence: Evidence) -> Verdict:
    """Return the verdict on what is known."""
    found = [(criterion, criterion.judge(evidence)) for criterion in CRITERIA]
    judged = tuple(Judged(criterion, finding) for criterion, finding in found if finding is not None)
    return Verdict(evidence.name, evidence.old, evidence.now, judged)


def verdict(connection: Any, settings: Settings, name: str, old: str = "") -> Verdict:
    """Ask about one backup, beside the primary or whom ``old`` names. Raises UnknownBackup, RedisError."""
    return judge(gather(connection, settings, name, old))


def verdicts(connection: Any, settings: Settings) -> list[Verdict]:
    """Ask about every backup that there is now. Raises RedisError."""
    return [verdict(connection, settings, name) for name in backups_now(connection, settings)]


def primary_now(connection: Any, settings: Settings) -> str:
    """Return the name of the primary: by the last decision, else by these settings."""
    decided = promotion.standing(connection, settings)
    return decided.primary if decided else settings.primary.name if settings.primary else ""


def backups_now(connection: Any, settings: Settings) -> list[str]:
    """Return the names of those that get copies now, by the last decision and these settings."""
    decided = promotion.standing(connection, settings)
    primary = decided.primary if decided else settings.primary.name if settings.primary else ""
    former = [settings.primary] if settings.primary and decided else []
    servers = [*former, *settings.copied, *copied_now(settings, decided)]
    return [name for name in dict.fromkeys(server.name for server in servers) if name != primary]


def on_route(connection: Any, settings: Settings, route: str) -> tuple[str, list[str]]:
    """Return who answers first on a route now, and who else has its mail. Raises UnknownRoute."""
    routes = {found.name: found for found in route_roles.table(settings, promotion.standing(connection, settings))}
    if route not in routes:
        raise UnknownRoute(f"no route {printable(route)!r}; there is: {', '.join(routes) or 'none'}")
    found = routes[route]
    first = found.first
    return first, [name for name in dict.fromkeys(found.copied) if name != first]


def gather(connection: Any, settings: Settings, name: str, old: str = "") -> Evidence:
    """Read what is known of a backup, beside the primary or whom ``old`` names. Raises UnknownBackup, RedisError."""
    known = registry.destinations(connection)
    old = old or primary_now(connection, settings)
    if name not in known and name not in backups_now(connection, settings):
        there = ", ".join(sorted({*known, *backups_now(connection, settings)})) or "none"
        raise UnknownBackup(f"no backup {name!r}; there is: {there}")
    if name == old:
        raise UnknownBackup(f"{name} is the primary")
    copied = (*settings.copied, *copied_now(settings, promotion.standing(connection, settings)))
    now = changes.now(connection)
    hours = flow.read(connection, flow.HOUR, HOURS, now)
    stands = _standing(connection, name)
    said = greetings.read(connection, [name, old])
    seen = decisions.view(connection)
    return Evidence(
        name=name,
        old=old,
        now=now,
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
    bounds = [f"{health.rate:g}/s"] * bool(health.rate)
    bounds += [f"{health.connections} connections"] * bool(health.connections)
    return Restraint(held=held, throttled=f"to {' and '.join(bounds)}" if bounds else "")


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
