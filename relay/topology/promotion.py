"""A promotion from its plan to its end, as `smtp-dup promote` and `undo` run it.

Prepare: every living relay process opens a connection to the new primary; while one cannot, or does not answer, nothing
changes. Commit: the decision, from which there is no way but another one. Follow: each process takes it for its next
transaction. Whoever ran this may be killed at any step: an intent ends by itself, a decision is followed by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from redis import Redis

from relay.config.model import Settings
from relay.ledger import keys
from relay.ledger.audit import Act
from relay.mail.destination import Destination
from relay.topology import decisions, remembered
from relay.topology.decisions import View
from relay.topology.heartbeats import Heartbeat
from relay.topology.state import Decision, Intent, Topology

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
class Plan:
    """What a promotion would do."""

    seen: View
    new: Destination
    old: str  # the primary of now
    demoted: Destination | None  # as it would get copies; None: these settings do not know it
    backups: tuple[str, ...]
    epoch: int
    pending: int  # copies on their way to the new primary
    command: str = "promote"

    @property
    def agree(self) -> bool:
        """Whether the new primary is the primary already, for everybody."""
        seen = self.seen
        return self.new.name == self.old and seen.highest == seen.epoch and all(map(seen.follows, seen.living))


def current(seen: View, settings: Settings) -> str:
    """Return the name of who is the primary now, by the highest epoch that anybody has seen; "" where nobody knows."""
    ahead = [beat for beat in seen.living if beat.epoch > seen.epoch]
    if ahead:
        return max(ahead, key=lambda beat: beat.epoch).primary
    if seen.topology:
        return seen.topology.primary
    return settings.primary.name if settings.primary else ""


def plan(connection: Redis, settings: Settings, name: str, *, command: str = "promote") -> Plan:
    """Look what it would take to make a server the primary. Raises Impossible, RedisError."""
    seen = decisions.view(connection)
    known = {server.name: server for server in (settings.primary, *settings.backups) if server}
    if name not in known:
        others = ", ".join(sorted(known)) or "none"
        raise Impossible(f"these settings have no server named {name}; they name: {others}")
    new, old = known[name], current(seen, settings)
    if new.domains and new is not settings.primary:
        raise Impossible(
            f"{name} takes mail of {len(new.domains)} domains only, by its settings: take domains out first"
        )
    demoted = settings.demoted if settings.primary and old == settings.primary.name else known.get(old)
    pending = int(connection.zcard(keys.PENDING + name))
    return Plan(
        seen,
        new,
        old,
        demoted if old != name else None,
        tuple(n for n in known if n != name),
        seen.highest + 1,
        pending,
        command,
    )


def plan_undo(connection: Redis, settings: Settings) -> Plan:
    """Look what it would take to go back to the primary before. Raises Impossible, RedisError."""
    found, _ = decisions.topology(connection)
    known = (found, remembered.load(settings.state_dir))  # Redis may have lost it, or have been given older data back
    topology = max((t for t in known if t), key=lambda t: t.epoch, default=None)
    if topology is None:
        raise Impossible("there is nothing to undo: nobody has promoted a server")
    if topology.previous.primary == topology.primary:
        raise Impossible(f"there is nothing to undo: {topology.primary} was the primary before, too")
    return plan(connection, settings, topology.previous.primary, command="undo")


def prepare(connection: Redis, made: Plan, seconds: float, report: Report) -> Intent:
    """Have every living process prepare. Raises Unprepared, decisions.Overtaken, RedisError."""
    old = made.old if made.demoted else ""
    intent = decisions.propose(connection, made.epoch, made.new.name, old, seconds)
    try:
        _wait_until_prepared(connection, intent, seconds, report)
    except BaseException:
        decisions.withdraw(connection, intent)
        raise
    return intent


def _wait_until_prepared(connection: Redis, intent: Intent, seconds: float, report: Report) -> None:
    deadline = time.monotonic() + seconds
    while True:
        seen = decisions.view(connection)
        if seen.intent is None or seen.intent.id != intent.id:
            raise Unprepared([_how_it_ended(seen, intent, deadline)])
        answered = [beat for beat in seen.living if beat.prepared == intent.id]
        waiting = [beat for beat in seen.living if beat.prepared != intent.id]
        troubles = [f"{beat.label}: {beat.trouble}" for beat in answered if beat.trouble]
        report(f"preparing: {len(answered)} of {len(seen.living)} processes")
        is_over = time.monotonic() >= deadline - 2 * _EVERY  # the intent must stand when all is well, for the commit
        if is_over or (troubles and not waiting):
            raise Unprepared(troubles + [_silent(beat) for beat in waiting])
        if not waiting:
            return
        time.sleep(_EVERY)


def _how_it_ended(seen: View, intent: Intent, deadline: float) -> str:
    if time.monotonic() >= deadline - 2 * _EVERY:
        waiting = [beat for beat in seen.living if beat.prepared != intent.id]
        return "; ".join(map(_silent, waiting)) or "its time was over"
    return "it was cancelled, or Redis has lost it"


def _silent(beat: Heartbeat) -> str:
    return f"{beat.label}: no answer, last heard {beat.age:.0f} s ago"


def commit(connection: Redis, made: Plan, reason: str, details: dict[str, str], intent: Intent | None) -> Topology:
    """Decide. Raises decisions.Overtaken, RedisError."""
    act = Act(made.command, before=made.old, after=made.new.name, reason=reason, details=details)
    decision = Decision(made.epoch, made.new.name, made.backups, by=act.who, reason=reason)
    return decisions.commit(connection, made.seen, decision, _former(made), act, intent)


def _former(made: Plan) -> Decision:
    """Return what an undo goes back to."""
    topology = made.seen.topology
    if made.old != made.new.name:
        return topology.now if topology and topology.primary == made.old else Decision(0, made.old or made.new.name)
    if topology is None:
        return Decision(0, made.old)
    return topology.previous if topology.primary == made.old else topology.now


@dataclass(frozen=True, slots=True)
class Followed:
    """What has become of a decision: who follows it, who lived when it was made and does not, who was dead before."""

    followed: list[Heartbeat]
    late: list[Heartbeat]
    dead: list[Heartbeat]
    finishing: int  # transactions that go on with the former primary

    @property
    def is_whole(self) -> bool:
        return not self.late and not self.finishing


def follow(connection: Redis, made: Plan, seconds: float, report: Report) -> Followed:
    """Wait until everybody follows and nothing goes on with the former primary, at most so long. Raises RedisError."""
    deadline = time.monotonic() + seconds
    lived = {beat.process for beat in made.seen.living}
    while True:
        beats = decisions.view(connection).beats
        followed = [beat for beat in beats if (beat.epoch, beat.primary) == (made.epoch, made.new.name)]
        behind = [beat for beat in beats if beat not in followed]
        late = [beat for beat in behind if beat.is_alive or beat.process in lived]
        dead = [beat for beat in behind if beat not in late]
        found = Followed(followed, late, dead, sum(beat.in_old for beat in followed if beat.is_alive))
        report(
            f"{len(followed)} of {len(followed) + len(late)} processes follow"
            + (f", {found.finishing} transactions go on with {made.old}" if found.finishing else "")
        )
        if found.is_whole or time.monotonic() >= deadline:
            return found
        time.sleep(_EVERY)
