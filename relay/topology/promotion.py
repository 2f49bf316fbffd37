"""A promotion from its plan to its end, as `smtp-dup promote` and `undo` run it.

Prepare: every living relay process opens a connection to the new primary; while one cannot, or does not answer, nothing
changes. Commit: the decision, from which there is no way but another one. Follow: each process takes it for its next
transaction. Whoever ran this may be killed at any step: an intent ends by itself, a decision is followed by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from redis import Redis

from relay.config.model import Settings
from relay.config.routes import Match, Route, lmtp_faults
from relay.ledger import keys
from relay.ledger.audit import Act
from relay.mail.destination import Destination
from relay.mail.text import count
from relay.topology import decisions, remembered, roles, route_roles
from relay.topology.decisions import View
from relay.topology.heartbeats import Heartbeat
from relay.topology.state import Decision, Intent, RouteRoles, Topology

PROMOTE, UNDO, ROUTE_WEIGHT, ROUTE_RESET = "promote", "undo", "route weight", "route reset"
COMMANDS = (PROMOTE, UNDO, ROUTE_WEIGHT, ROUTE_RESET)  # that decide, as the audit calls them
_EVERY = 0.2  # seconds between two looks at the processes

Report = Callable[[str], None]


class Impossible(Exception):
    """It cannot be done; nothing has changed."""


class Unprepared(Exception):
    """Not every process could prepare; nothing has changed. ``lines`` say who, and why."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("nothing has changed: not every process is prepared")
        self.lines = list(lines)


@dataclass(frozen=True, slots=True)
class RouteChange:
    """What becomes of one route; ``decided`` None: it is as each host's settings say, ``after`` as these do."""

    route: Route  # as it is now, here
    after: Route  # without servers where these settings have no such route
    decided: RouteRoles | None

    @property
    def is_forgotten(self) -> bool:
        """Whether these settings have no such route any more, and what was decided for it is taken back."""
        return not self.after.servers

    @property
    def in_words(self) -> tuple[str, str]:
        """Who answers before and after."""
        after = "as the settings say" if self.is_forgotten else route_roles.of(self.after).in_words()
        return route_roles.of(self.route).in_words(), after


@dataclass(frozen=True, slots=True)
class Plan:
    """What a promotion would do: by default, or with a ``change`` on one route."""

    seen: View
    new: Destination
    old: str  # the primary of now
    demoted: Destination | None  # as it would get copies; None: these settings do not know it
    backups: tuple[str, ...]
    epoch: int
    pending: int  # copies on their way to the new primary
    command: str = "promote"
    change: RouteChange | None = None
    default: str = ""  # who is the primary afterwards where no route matches
    routes: dict[str, RouteRoles] = field(default_factory=dict)  # all that are decided afterwards
    last: Topology | None = None  # the decision that this is the next to

    @property
    def agree(self) -> bool:
        """Whether all is for everybody as it would be."""
        seen = self.seen
        if self.change:
            is_so = self.change.route == self.change.after
        else:  # hosts may begin with different ones
            is_so = all(name == self.new.name for name in (self.old, *(beat.primary for beat in seen.living)))
        return is_so and seen.highest == seen.epoch and all(map(seen.follows, seen.living))

    @property
    def is_of_route(self) -> bool:
        """Whether it is about a route as a whole, of which several servers answer, instead of one server."""
        return self.change is not None and (self.command == ROUTE_WEIGHT or len(self.change.after.answering) != 1)

    @property
    def title(self) -> str:
        """What it is about, to be typed by whoever wants it: the new primary, or the route where that has several."""
        return self.change.route.name if self.change and self.is_of_route else self.new.name

    def is_followed_by(self, beat: Heartbeat) -> bool:
        """Say whether a process does what this has decided."""
        return (beat.epoch, beat.primary) == (self.epoch, self.default) and beat.goes_by(self.routes)


def current(seen: View, settings: Settings) -> str:
    """Return the name of who is the primary now, by the highest epoch that anybody has seen; "" where nobody knows."""
    ahead = [beat for beat in seen.living if beat.epoch > seen.epoch]
    if ahead:
        return max(ahead, key=lambda beat: beat.epoch).primary
    if seen.topology:
        return seen.topology.primary
    return settings.primary.name if settings.primary else ""


def standing(connection: Redis, settings: Settings) -> Topology | None:
    """Return the last decision, as Redis or this host knows it. Raises RedisError."""
    return _later(decisions.topology(connection)[0], settings)


def latest(seen: View, settings: Settings) -> Topology | None:
    """Return the last decision: Redis may have lost it, or have been given older data back."""
    return _later(seen.topology, settings)


def _later(found: Topology | None, settings: Settings) -> Topology | None:
    known = (found, remembered.load(settings.state_dir))
    return max((t for t in known if t), key=lambda t: t.epoch, default=None)


def _last(seen: View, settings: Settings, *, is_undone: bool = False) -> Topology | None:
    """Return the last decision, to make the next one after it.

    Raises Impossible where only a process of another host knows it, and it would be forgotten in part.
    """
    found = latest(seen, settings)
    ahead = [beat for beat in seen.living if beat.epoch > (found.epoch if found else 0) and (beat.routes or is_undone)]
    if ahead:
        last = max(ahead, key=lambda beat: beat.epoch)
        about = f", about {' and '.join(sorted(last.routes))}" if last.routes else ""
        raise Impossible(
            f"{last.label} goes by epoch {last.epoch}{about}, of which neither Redis nor this host knows any more: run "
            "this on its host"
        )
    return found


def plan(connection: Redis, settings: Settings, name: str, *, command: str = PROMOTE) -> Plan:
    """Look what it would take to make a server the primary. Raises Impossible, RedisError."""
    seen = decisions.view(connection)
    known = {server.name: server for server in (settings.primary, *settings.backups) if server}
    if name not in known:
        others = ", ".join(sorted(known)) or "none"
        raise Impossible(f"these settings have no server named {name}; they name: {others}")
    new, old = known[name], current(seen, settings)
    _check_domains(new, settings)
    demoted = settings.demoted if settings.primary and old == settings.primary.name else known.get(old)
    before = _last(seen, settings)
    return Plan(
        seen,
        new,
        old,
        demoted if old != name else None,
        tuple(n for n in known if n != name),
        seen.highest + 1,
        _pending(connection, name),
        command,
        default=name,
        routes=dict(before.now.routes) if before else {},
        last=before,
    )


def plan_undo(connection: Redis, settings: Settings) -> Plan:
    """Look what it would take to undo the last decision. Raises Impossible, RedisError."""
    seen = decisions.view(connection)
    topology = _last(seen, settings, is_undone=True)
    if topology is None:
        raise Impossible("there is nothing to undo: nobody has promoted a server")
    before, changed = topology.previous, topology.changed
    if before.primary != topology.primary:
        return replace(plan(connection, settings, before.primary, command=UNDO), routes=dict(before.routes))
    if not changed:
        raise Impossible(f"there is nothing to undo: {topology.primary} was the primary before, too")
    return _plan_route(connection, settings, changed[0], lambda _: before.routes.get(changed[0]), UNDO)


def plan_on_route(connection: Redis, settings: Settings, name: str, route: str) -> Plan:
    """Look what it would take to have a server answer on a route. Raises Impossible, RedisError."""
    return _plan_route(connection, settings, route, lambda found: route_roles.promoted(found, name), PROMOTE)


def plan_weights(connection: Redis, settings: Settings, route: str, weights: Mapping[str, float]) -> Plan:
    """Look what it would take to share the mail of a route by these weights. Raises Impossible, RedisError."""
    return _plan_route(connection, settings, route, lambda found: route_roles.weighed(found, weights), ROUTE_WEIGHT)


def plan_reset(connection: Redis, settings: Settings, route: str) -> Plan:
    """Look what it would take to have a route be as each host's settings say. Raises Impossible, RedisError."""
    return _plan_route(connection, settings, route, lambda _: None, ROUTE_RESET)


def _plan_route(
    connection: Redis, settings: Settings, name: str, decide: Callable[[Route], RouteRoles | None], command: str
) -> Plan:
    seen = decisions.view(connection)
    topology = _last(seen, settings)
    here = {route.name: route for route in route_roles.table(settings, topology)}
    as_set = next((route for route in settings.route_table if route.name == name), None)
    before = here.get(name) or _gone(name, topology)
    try:
        decided = decide(before) if before else None
    except route_roles.Unsuitable as error:
        raise Impossible(str(error)) from error
    if before is None or (as_set is None and decided):
        there = ", ".join(here) or "none"
        raise Impossible(f"these settings have no route {name}; there is: {there}")
    if as_set is None:
        return _plan_to_forget(seen, settings, before, topology, command)
    after = route_roles.applied(before, decided) if decided else as_set
    known = {server.name: server for server in settings.named}
    strangers = sorted({*after.servers, *after.backups} - known.keys())
    if strangers:
        raise Impossible(f"these settings have no server named {' and '.join(strangers)}")
    for fault in (text for _, text in lmtp_faults(after, known)):
        raise Impossible(f"{name}: {fault}")
    new = known[after.first]
    if command == PROMOTE:
        _check_domains(new, settings)
    routes = dict(topology.now.routes) if topology else {}
    routes.pop(name, None)
    if decided:
        routes[name] = decided
    backups = topology.now.backups if topology else tuple(backup.name for backup in settings.backups)
    old = before.first
    return Plan(
        seen,
        new,
        old,
        roles.as_copied(settings, old) if old in after.copied else None,
        backups,
        seen.highest + 1,
        _pending(connection, new.name),
        command,
        RouteChange(before, after, decided),
        current(seen, settings),
        routes,
        topology,
    )


def _gone(name: str, topology: Topology | None) -> Route | None:
    """Return a route that was decided about, and is in these settings no more."""
    roles = topology.now.routes.get(name) if topology else None
    return route_roles.applied(Route(name, Match(), ()), roles) if roles else None


def _plan_to_forget(seen: View, settings: Settings, before: Route, topology: Topology | None, command: str) -> Plan:
    """Return what it takes to forget what was decided for a route that these settings have no more."""
    default = current(seen, settings)
    primary = next((server for server in settings.named if server.name == default), settings.primary)
    if primary is None or topology is None:
        raise Impossible(f"these settings have no route {before.name}, and no primary")
    return Plan(
        seen,
        primary,
        default,
        None,
        topology.now.backups,
        seen.highest + 1,
        0,
        command,
        RouteChange(before, Route(before.name, Match(), ()), None),
        default,
        {name: roles for name, roles in topology.now.routes.items() if name != before.name},
        topology,
    )


def _check_domains(new: Destination, settings: Settings) -> None:
    if new.domains and new is not settings.primary:
        some = count(len(new.domains), "domain")
        raise Impossible(f"{new.name} takes mail of {some} only, by its settings: take domains out first")


def _pending(connection: Redis, name: str) -> int:
    return int(connection.zcard(keys.PENDING + name))


def prepare(connection: Redis, made: Plan, seconds: float, report: Report) -> Intent:
    """Have every living process prepare. Raises Unprepared, decisions.Overtaken, RedisError."""
    old = made.old if made.demoted else ""
    _check_default(made)
    change = made.change
    route = change.route.name if change else ""
    servers = change.after.answering if change and change.decided else ()  # else each host's own
    intent = decisions.propose(connection, made.epoch, made.new.name, old, seconds, route=route, servers=servers)
    try:
        _wait_until_prepared(connection, intent, seconds, report)
    except BaseException:
        decisions.withdraw(connection, intent)
        raise
    return intent


def other_defaults(made: Plan) -> list[Heartbeat]:
    """Return the processes that would get another primary by default with the first decision about a route."""
    if made.change is None or made.last is not None:
        return []
    return [beat for beat in made.seen.living if beat.primary != made.default]


def _check_default(made: Plan) -> None:
    if others := other_defaults(made):
        raise Unprepared(
            [
                f"{beat.label}: {beat.primary} is the primary by default there, {made.default} here: have the settings "
                "agree, or promote one of them by default first"
                for beat in others
            ]
        )


def _wait_until_prepared(connection: Redis, intent: Intent, seconds: float, report: Report) -> None:
    deadline = time.monotonic() + seconds
    while True:
        seen = decisions.view(connection)
        answered = [beat for beat in seen.living if beat.prepared == intent.id]
        waiting = [beat for beat in seen.living if beat.prepared != intent.id]
        is_over = time.monotonic() >= deadline - 2 * _EVERY  # the intent must stand when all is well, for the commit
        if seen.intent is None or seen.intent.id != intent.id:
            ended = "; ".join(map(_silent, waiting)) or "its time was over"
            raise Unprepared([ended if is_over else "it was cancelled, or Redis has lost it"])
        troubles = [f"{beat.label}: {beat.trouble}" for beat in answered if beat.trouble]
        if intent.route:
            older = [beat for beat in seen.living if beat.routes is None]
            troubles += [
                f"{beat.label}: smtp-dup {beat.version} there knows no decision about routes" for beat in older
            ]
        report(f"preparing: {len(answered)} of {count(len(seen.living), 'process', 'processes')}")
        if is_over or (troubles and not waiting):
            raise Unprepared(troubles + [_silent(beat) for beat in waiting])
        if not waiting:
            return
        time.sleep(_EVERY)


def _silent(beat: Heartbeat) -> str:
    return f"{beat.label}: no answer, last heard {beat.age:.0f} s ago"


def commit(connection: Redis, made: Plan, reason: str, details: dict[str, str], intent: Intent | None) -> Topology:
    """Decide. Raises decisions.Overtaken, RedisError."""
    before, after = made.old, made.new.name
    if made.change:
        details = {"route": made.change.route.name, **details}
        before, after = made.change.in_words
    act = Act(made.command, before=before, after=after, reason=reason, details=details)
    decision = Decision(
        made.epoch, made.default or made.new.name, made.backups, by=act.who, reason=reason, routes=made.routes
    )
    return decisions.commit(connection, made.seen, decision, _former(made), act, intent)


def _former(made: Plan) -> Decision:
    """Return what an undo goes back to."""
    if made.change:
        return made.last.now if made.last else Decision(0, made.default)
    topology = made.seen.topology
    routes = dict(made.last.now.routes) if made.last else {}
    if made.old != made.new.name:
        is_known = topology is not None and topology.primary == made.old
        return topology.now if topology and is_known else Decision(0, made.old or made.new.name, routes=routes)
    if topology is None:
        return Decision(0, made.old, routes=routes)
    return topology.previous if topology.primary == made.old else topology.now
