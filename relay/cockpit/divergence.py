"""Divergence as people see it: what stands open at a backup, by reason, domain, recipient or day.

All is read from the groups in the ledger and never from the copies, whatever there are of them. An acknowledged group
is not open, and neither is noise: what was put off at first and delivered soon after.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from relay.cockpit.formatting import moment
from relay.config.model import Settings
from relay.ledger import archive, audit, changes, divergence_groups, divergence_upkeep, keys, queries
from relay.ledger.audit import Act
from relay.ledger.copy_state import CopyState
from relay.ledger.divergence import DEFERRED, GIVEN_UP, MOST_WHOM, NOISE, OTHERS, REFUSED
from relay.ledger.divergence_groups import Acknowledgement, Group, Outage
from relay.mail.ids import is_id, text
from workers.queues import failed

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Standing:
    """How one backup stands, for the question whether it is ready.

    ``open`` are the groups that have open recipients and are not acknowledged, those with the most first. ``noise`` are
    recipients that were put off at first and delivered soon, ``taken`` all that it took.
    """

    open: tuple[Group, ...]
    acknowledged: int
    noise: int
    taken: int
    outages: tuple[Outage, ...]

    @property
    def deferred(self) -> int:
        """How many recipients are put off, and still owed their copy."""
        return sum(group.open for group in self.open if group.kind == DEFERRED)


def standing(connection: Any, destination: str) -> Standing:
    """Return how a backup stands. Raises RedisError."""
    now = changes.now(connection)
    groups = divergence_groups.groups(connection, destination)
    domains = divergence_groups.domains(connection, destination)
    return Standing(
        open=tuple(sorted((g for g in groups if g.counts(now)), key=lambda g: g.open, reverse=True)),
        acknowledged=sum(group.open > 0 and group.is_acknowledged(now) for group in groups),
        noise=sum(group.noise for group in groups),
        taken=sum(taken for taken, *_ in domains.values()),
        outages=tuple(divergence_groups.outages(connection, destination)),
    )


# Looking at groups --------------------------------------------------------------------------------------------------


def chosen(
    connection: Any,
    destination: str | None = None,
    *,
    since: float = 0.0,
    kind: str | None = None,
    everything: bool = False,
) -> list[Group]:
    """Return the groups that an operator asks for, those with the most open recipients first.

    Unless for ``everything``, that is what is open and not acknowledged, and with ``kind`` what is of this kind: noise
    is open no more. ``since`` (seconds since the epoch) leaves out what was last seen before. Raises RedisError,
    UnknownDestination.
    """
    now = changes.now(connection)
    found: list[Group] = []
    for target in queries.destinations(connection, destination):
        for group in divergence_groups.groups(connection, target.name):
            if group.last < since or (kind is not None and not _is_of(group, kind)):
                continue
            if everything or group.counts(now) or (kind == NOISE and group.noise):
                found.append(group)
    return sorted(found, key=lambda group: (-group.open, -group.seen, group.destination, group.key))


def _is_of(group: Group, kind: str) -> bool:
    return group.noise > 0 if kind == NOISE else group.kind == kind


def find(connection: Any, key: str, destination: str | None = None) -> list[Group]:
    """Return the groups with this key: at most one, but for those that hold the rest. Raises UnknownDestination."""
    found = (
        divergence_groups.group(connection, target.name, key)
        for target in queries.destinations(connection, destination)
    )
    return [group for group in found if group is not None]


def state(group: Group, now: float) -> str:
    """Return how a group stands in words: open, acknowledged, noise, or over."""
    if group.is_acknowledged(now) and group.ack and group.open:
        return f"acknowledged until {moment(group.ack.until)}"
    if group.open:
        return "open"
    return "noise" if group.is_noise else "over"


def reply(group: Group) -> str:
    """Return what the backup says, without what is of one message only."""
    code = f"{group.code} {group.status}".strip() if group.code else ""
    soft = " (5xx, softened)" if group.soft else ""
    return f"{code} {group.text}{soft}".strip()


def endings(group: Group) -> str:
    """Return what became of those recipients that are open no more: "3 delivered later, 1 dropped"."""
    ends = (
        (group.resolved, "delivered later"),
        (group.noise, "soon"),
        (group.dropped, "dropped"),
        (group.moved, "moved"),
    )
    return ", ".join(f"{count} {how}" for count, how in ends if count)


@dataclass(frozen=True, slots=True)
class Sum:
    """Recipients in the chosen groups that have something in common: a domain, an address, a day."""

    what: str
    destination: str
    recipients: int
    groups: int


def summed(connection: Any, groups: Sequence[Group], by: str) -> list[Sum]:
    """Add up recipients by domain, recipient or day; nothing where the reasons themselves are wanted."""
    if by == "recipient":
        return by_recipient(connection, groups)
    return {"domain": by_domain, "day": by_day}.get(by, lambda _: [])(groups)


def by_domain(groups: Iterable[Group]) -> list[Sum]:
    """Add up recipients by their domains; those that are not kept stand under "other"."""

    def parts(group: Group) -> Iterator[tuple[str, int]]:
        yield from group.domains.items()
        if group.more_domains:
            yield "other", group.more_domains

    return _sums((group, parts(group)) for group in groups)


def by_day(groups: Iterable[Group]) -> list[Sum]:
    """Add up recipients by the day on which each was first counted, the last one first."""
    found = _sums((group, ((_day(hour), count) for hour, count in group.hours.items())) for group in groups)
    return sorted(found, key=lambda one: (one.what, one.destination), reverse=True)


def by_recipient(connection: Any, groups: Sequence[Group]) -> list[Sum]:
    """Add up by recipient; those that are not kept stand under "other"."""

    def parts(group: Group) -> Iterator[tuple[str, int]]:
        yield from divergence_groups.whom(connection, group.destination, group.key, MOST_WHOM)
        if group.more:
            yield "other", group.more

    return _sums((group, parts(group)) for group in groups)


def _day(hour: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(hour * divergence_groups.HOUR))


def _sums(parts: Iterable[tuple[Group, Iterable[tuple[str, int]]]]) -> list[Sum]:
    counts: Counter[tuple[str, str]] = Counter()
    groups: dict[tuple[str, str], set[str]] = {}
    for group, found in parts:
        for what, count in found:
            counts[group.destination, what] += count
            groups.setdefault((group.destination, what), set()).add(group.key)
    return [Sum(what, name, count, len(groups[name, what])) for (name, what), count in counts.most_common()]


# The copies of a group ----------------------------------------------------------------------------------------------


def failed_copies(connection: Any, group: Group) -> list[str]:
    """Return the ids of failed copies that are open in a group: what a retry of it is about."""
    listed = {found.key for found in divergence_groups.groups(connection, group.destination)}
    ids = []
    cursor = -1
    while cursor:
        cursor, page = connection.hscan(keys.FAILURE + group.destination, max(0, cursor), count=_PAGE)
        for name, value in page.items():
            if is_id(message_id := text(name)) and any(
                _is_in(group, counted, listed) for counted, _ in CopyState.from_wire(value).open
            ):
                ids.append(message_id)
    return sorted(set(ids))


def _is_in(group: Group, counted: str, listed: set[str]) -> bool:
    if counted[1:] in listed:
        return counted[1:] == group.key
    letter = {"d": DEFERRED, "g": GIVEN_UP}.get(counted[:1], REFUSED)
    return OTHERS[letter] == group.key


# What an operator does about a group --------------------------------------------------------------------------------


def acknowledge(
    connection: Any, group: Group, note: str, seconds: float, domains: Sequence[str] = ()
) -> Acknowledgement:
    """Let a group not count for so many seconds, and record it. Raises RedisError."""
    before = state(group, changes.now(connection))
    ack = divergence_upkeep.acknowledge(connection, group, audit.operator(), note, seconds, domains)
    after = divergence_groups.group(connection, group.destination, group.key) or group
    _record(connection, "divergence ack", group, before, state(after, changes.now(connection)), note)
    return ack


def unacknowledge(connection: Any, group: Group, note: str) -> bool:
    """Let a group count again; returns whether it did not. Raises RedisError."""
    was = divergence_upkeep.unacknowledge(connection, group)
    if was:
        _record(connection, "divergence unack", group, "acknowledged", "open", note)
    return was


def retry(connection: Any, settings: Settings, group: Group) -> int:
    """Have a group's failed copies tried again now; returns how many. Raises RedisError."""
    ids = failed_copies(connection, group)
    if not ids:
        return 0
    folder = archive.folder(settings.state_dir)
    count = failed.retry_copies(connection, group.destination, ids, folder, settings.workers.job_size)
    _record(connection, "divergence retry", group, f"{len(ids)} failed", f"{count} tried again", "")
    return count


def _record(connection: Any, command: str, group: Group, before: str, after: str, note: str) -> None:
    details = {"key": group.key, "destination": group.destination, "reply": f"{group.code} {group.text}"}
    audit.record(connection, Act(command, before, after, note, details))
