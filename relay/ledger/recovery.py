"""Recovery of messages whose owner went away between staging and release: held, then copied all the same.

What a dead process staged becomes uncertain: perhaps the primary has it, perhaps not, and the client never heard
our 2xx. A client that sends it again notes its recipients on the uncertain twin. When the hold is over, copies
go out for whoever is not covered: a duplicate beats a loss. Everything here may be repeated and may run in
several processes at once. A record that cannot be read is set aside for an hour, again and again, and logged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from redis import Redis

from relay import maillog
from relay.batches import batched
from relay.ledger import changes, keys, queries, registry, rq_jobs
from relay.ledger.changes import Released
from relay.ledger.copy_state import CopyState
from relay.ledger.queries import UnknownId
from relay.ledger.rq_jobs import JOB_SIZE
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope, MalformedRecord
from relay.mail.headers import equality_digest
from relay.mail.ids import is_id, owner_of, text
from relay.mail.stored import parsed, texts

_GRACE = 60.0  # seconds past its deadline before a staged message counts as left behind
_SET_ASIDE = 3600.0
_COLLECTED = 5.0  # seconds before the newest copy; well over a dispatcher's window
_LOOKED_AT = 50_000  # newest copies of a backup: what others have taken while the dead one's successor was started


class Owed(NamedTuple):
    """What a backup gets of an uncertain message: the recipients owed, how many a twin covers, the copy's state."""

    owed: tuple[int, ...]
    covered: int
    state: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """A message that is not uncertain any more, and what each backup gets of it."""

    id: str
    shares: dict[str, Owed]
    spare_of: str = ""


def abandon(connection: Redis, owner: str, hold_seconds: float) -> list[str]:
    """Make everything uncertain that a dead relay process had staged. Returns the ids."""
    held: list[str] = []
    for page in queries.pages(connection, keys.STAGED):
        held += _hold(connection, [i for i, _ in page if owner_of(i) == owner], hold_seconds)
    connection.hdel(keys.OWNERS, owner)
    return held


def take_over(
    connection: Redis,
    place: str,
    owner: str,
    hold_seconds: float,
    job_size: int = JOB_SIZE,
    *,
    instance: str = "",
    living: frozenset[str] = frozenset(),
) -> list[str]:
    """Register a relay process at its place, and abandon what its dead predecessors there had staged. Returns the ids.

    A place (host, state folder, name of the process) has one process at a time, but for those of other settings that
    come or go: ``living`` are the instances that run there now.
    """
    connection.hset(keys.OWNERS, owner, f"{place}\n{instance}" if instance else place)
    owners = cast("dict[bytes, bytes]", connection.hgetall(keys.OWNERS))
    here = {text(other): text(where).partition("\n") for other, where in owners.items()}
    dead = {o for o, (where, _, who) in here.items() if where == place and o != owner and who not in living}
    held = [message_id for other in sorted(dead) for message_id in abandon(connection, other, hold_seconds)]
    if dead:
        _dispatch_last(connection, dead, job_size)
    return held


def _dispatch_last(connection: Redis, dead: set[str], job_size: int) -> None:
    """Make jobs for what dead processes released last: they collect ids for a moment before they make a job of them.

    Whatever has a job already is in two then, which does no harm: it is claimed once. Each one's last moments count
    from its own newest copy: others have gone on, perhaps for as long as it took to start us.
    """
    for name in registry.destinations(connection):
        for ids in batched(_last_of(connection, name, dead), job_size):
            with connection.pipeline(transaction=True) as pipe:
                rq_jobs.enqueue(pipe, rq_jobs.queue(connection, name), name, ids)
                pipe.execute()


def _last_of(connection: Redis, name: str, dead: set[str]) -> list[str]:
    """Return the newest pending copies of each of these processes, the oldest first."""
    newest: dict[str, float] = {}
    found: dict[str, None] = {}
    for start in range(0, _LOOKED_AT, queries.PAGE):
        page = cast(
            "list[tuple[bytes, float]]",
            connection.zrange(keys.PENDING + name, start, start + queries.PAGE - 1, desc=True, withscores=True),
        )
        for message_id, at in ((text(member), score) for member, score in page):
            owner = owner_of(message_id)
            if is_id(message_id) and owner in dead and at >= newest.setdefault(owner, at) - _COLLECTED:
                found[message_id] = None
        if len(page) < queries.PAGE or (len(newest) == len(dead) and page[-1][1] < min(newest.values()) - _COLLECTED):
            break
    return list(reversed(found))


def hold_overdue(connection: Redis, hold_seconds: float) -> list[str]:
    """Make everything uncertain that is staged for longer than its owner would. Returns the ids."""
    held: list[str] = []
    for page in queries.pages(connection, keys.STAGED, until=changes.now(connection) - _GRACE):
        held += _hold(connection, [message_id for message_id, _ in page], hold_seconds)
    return held


def note_twins(connection: Redis, known: set[str]) -> None:
    """Note the digests of uncertain messages that have none yet, and forget those of messages that are not uncertain.

    ``known`` are ids that were looked at before; it is brought up to date.
    """
    uncertain = {message_id for page in queries.pages(connection, keys.UNCERTAIN) for message_id, _ in page}
    noted = cast("dict[bytes, bytes]", connection.hgetall(keys.TWINS))
    twins = [(text(digest), i) for digest, ids in noted.items() for i in text(ids).split()]
    unknown = sorted(uncertain - known - {i for _, i in twins})
    new = [(digest, i) for i in unknown if (digest := _digest(connection, i))]
    stale = [(digest, i) for digest, i in twins if i not in uncertain]
    with connection.pipeline(transaction=True) as pipe:
        if stale:
            changes.forget_twins(pipe, stale)
        if new:
            changes.note_twins(pipe, new)
        pipe.execute()
    known.clear()
    known |= uncertain


def tell_of_repeats(connection: Redis, released: Released) -> None:
    """Log which backups may have a message already that was released now and covers an uncertain one.

    A backup that the uncertain one is not for was its primary: another was promoted since. It may have the one, and
    gets a copy of the other.
    """
    twins = cast("bytes | None", connection.hget(keys.TWINS, released.digest))
    for twin in text(twins or b"").split():
        envelope = queries.envelopes(connection, [twin])[0] if is_id(twin) else None
        for name in released.destinations if envelope else ():
            if envelope and name not in envelope.destinations:
                maillog.repeated(released.id, name, f"it may have taken {twin}, the same mail, when it was the primary")


def copy_due(connection: Redis, backups: Sequence[Destination] = (), job_size: int = JOB_SIZE) -> Iterator[Recovered]:
    """Make uncertain messages pending whose hold is over, with jobs, for the recipients that no twin covers.

    ``backups`` are the definitions of this process; those of the ledger count too.
    """
    definitions = {d.name: d for d in backups} | registry.destinations(connection)
    for page in queries.pages(connection, keys.UNCERTAIN, until=changes.now(connection), size=job_size):
        ids = [message_id for message_id, _ in page]
        covered = cast("list[bytes | None]", connection.hmget(keys.COVERED, ids))
        due = []
        for message_id, envelope, lists in zip(ids, queries.envelopes(connection, ids), covered, strict=True):
            if envelope is None:
                _set_aside(connection, message_id)
            else:
                due.append(Recovered(message_id, _shares(envelope, definitions, _addresses(lists)), envelope.spare_of))
        yield from _revive(connection, due)


def _shares(envelope: Envelope, definitions: Mapping[str, Destination], covered: set[str]) -> dict[str, Owed]:
    shares = {}
    for name in envelope.destinations:
        wanted = envelope.owed_to(definitions.get(name) or Destination(name, "", 0))
        owed = tuple(i for i in wanted if envelope.recipients[i].address not in covered)
        if owed:
            state = "" if len(owed) == len(wanted) else CopyState(owed=owed).to_wire()
            shares[name] = Owed(owed, len(wanted) - len(owed), state)
    return shares


def _addresses(lists: bytes | None) -> set[str]:
    """Read what twins have covered: a JSON list a line. Addresses are compared exactly."""
    found: set[str] = set()
    for line in (lists or b"").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # who is not covered for sure gets a copy
            found |= set(texts(parsed(line)))
    return found


def _revive(connection: Redis, due: Sequence[Recovered]) -> Iterator[Recovered]:
    """Make messages pending, with one job per backup in the same transaction."""
    if not due:
        return
    with connection.pipeline(transaction=True) as pipe:
        for message in due:
            changes.revive_uncertain(pipe, message.id, {name: share.state for name, share in message.shares.items()})
        for name in sorted({name for message in due for name in message.shares}):
            ids = [message.id for message in due if name in message.shares]
            rq_jobs.enqueue(pipe, rq_jobs.queue(connection, name), name, ids)
        revived = pipe.execute()[: len(due)]
    for message, is_ours in zip(due, revived, strict=True):
        if is_ours:
            for name, share in message.shares.items():
                maillog.uncertain_copied(message.id, name, len(share.owed), share.covered, message.spare_of)
            if not message.shares:
                maillog.uncertain_covered(message.id)
            yield message


def _hold(connection: Redis, ids: Sequence[str], seconds: float) -> list[str]:
    held = []
    for message_id in ids:
        with connection.pipeline(transaction=True) as pipe:
            changes.hold(pipe, [changes.Held(message_id, _digest(connection, message_id), seconds)])
            if pipe.execute()[0]:
                maillog.abandoned(message_id, seconds)
                held.append(message_id)
    return held


def _digest(connection: Redis, message_id: str) -> str:
    """Return the name of mail equal to this; "" when it has none, is gone, or cannot be read."""
    try:
        message = queries.message(connection, message_id)
    except (UnknownId, MalformedRecord):
        return ""
    return equality_digest(message.envelope.sender, message.body)


def _set_aside(connection: Redis, message_id: str) -> None:
    if connection.exists(keys.MESSAGE + message_id):
        reason = "it can be read now"
        try:
            queries.message(connection, message_id)
        except (UnknownId, MalformedRecord) as error:
            reason = str(error)
        maillog.notice("error", "unreadable message", id=message_id, reason=reason)
        connection.zadd(keys.UNCERTAIN, {message_id: changes.now(connection) + _SET_ASIDE}, xx=True)
    else:
        maillog.body_missing(message_id, "")
        with connection.pipeline(transaction=True) as pipe:
            changes.discard(pipe, [message_id])
            pipe.execute()
