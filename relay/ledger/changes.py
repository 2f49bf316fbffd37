"""The ledger: every Redis key of smtp-dup and every change of a message's state.

RQ jobs are the means, the ledger is the truth: until a copy is delivered, dropped or in the failed list,
its id is listed here. Each change is one Lua script (beside this file, in lua/) or one MULTI, and does
nothing when the id is not in the state that it expects, so that repeating one is harmless. The functions
that change state only add commands to a pipeline, sync or async; whoever executes the pipeline sees the
Redis errors. Scripts go as EVAL, whole: a script cache is lost with a restart, and NOSCRIPT inside a MULTI
would leave the transaction half done. Not for Redis Cluster: scripts name keys that they compute.

    stage -> release -> (claim -> settle | defer | fail)*     fail -> claim by its own job -> ...
          -> discard                                               -> drop
          -> hold (uncertain) -> release | discard | revive
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from relay.ledger.copy_state import CopyState
from relay.ledger.keys import (
    BUSY,
    IMPORTED,
    MESSAGE,
    MOVED,
    STAGED,
)
from relay.ledger.redis_clock import time_of
from relay.ledger.scripts import script as _script
from relay.mail.ids import text as as_text

NOISE = 900.0  # seconds: see divergence.noise
COVERING = 2  # of a release: an uncertain message with the same digest has the recipients too
WANTED, SETTLED, UNKNOWN = range(3)  # what a ledger says of a file; see judge_files.lua

Pipe = Any  # redis.client.Pipeline or redis.asyncio.client.Pipeline: both only queue commands here


_KNOWN = _script("known")
_STAGE = _script("stage")
_RELEASE = _script("release")
_DISCARD = _script("discard")
_HOLD = _script("hold")
_RESTAGE = _script("restage")
_ADMIT = _script("admit")
_UNSTAGE = _script("unstage")
_REVIVE = _script("revive")
_CLAIM = _script("claim")
_SETTLE = _script("settle", without="turned")
_SETTLE_COUNTED = _script("settle")
_DEFER = _script("defer")
_FAIL = _script("fail")
_UNLEASE = _script("unlease")
_BEREAVE = _script("bereave")
_DROP = _script("drop")
_STOW = _script("stow")
_JUDGE_FILES = _script("judge_files")
_OWNERS = _script("owners")
_REASSIGN = _script("reassign")
_MOVE = _script("move")
_PURGE = _script("purge")
_FORGET = _script("forget")
_TWINS = _script("twins")
_BEAT = _script("beat")


class Staged(NamedTuple):
    """A message to stage: its packed record, in parts, and the absolute deadline (Redis time) of its owner."""

    id: str
    record: tuple[bytes, ...]
    deadline: float


class Released(NamedTuple):
    """A message that the primary accepted, for release to these backups.

    ``recipients`` are its accepted addresses, noted on an uncertain twin with the same digest. ``accepted_at`` is when
    that was, by Redis's clock, for one that Redis hears of only later.
    """

    id: str
    destinations: tuple[str, ...]
    digest: str = ""
    recipients: tuple[str, ...] = ()
    accepted_at: float = 0.0


class Held(NamedTuple):
    """A staged message that becomes uncertain: its copies go out after so many seconds unless a twin covers them."""

    id: str
    digest: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Claim:
    """A copy that is now ours to deliver."""

    id: str
    accepted_at: float
    state: CopyState = field(default_factory=CopyState)
    was_failed: bool = False  # an operator's retry: a fresh clock
    before: str = ""  # the worker that had it in hand and never said what became of it: it may have been sent


def is_known(pipe: Pipe, identity: str, count: int, fresh: str, *, count_on: bool) -> None:
    """Ask whether this is the ledger of that identity, no older than that count; one without any becomes ``fresh``.

    Result: identity, count, what has become of it ("" for nothing), whether its index of lists is whole, what became of
    it when it last changed.
    """
    pipe.eval(_KNOWN, 0, identity, count, fresh, int(count_on))


def beat(pipe: Pipe, process: str, words: str) -> None:
    """Note that a relay process lives, with what it says of itself: JSON without its first brace.

    Result: what stands in the ledger as the topology and as the intent to change it, "" for nothing.
    """
    pipe.eval(_BEAT, 0, process, words)


def stage(pipe: Pipe, messages: Sequence[Staged]) -> None:
    """Write messages before the primary may see their dot."""
    pipe.eval(_STAGE, 0, *(part for m in messages for part in (m.id, str(m.deadline), b"".join(m.record))))


def stage_large(pipe: Pipe, messages: Sequence[Staged]) -> None:
    """Stage messages with large records; a script would have each copied into Lua and out again."""
    commands: list[tuple[Any, ...]] = []
    for m in messages:
        # In this order: see stage.lua.
        commands += (("ZADD", STAGED, m.deadline, m.id), ("SET", MESSAGE + m.id, m.record))
    pipe.transaction(commands)


def release(pipe: Pipe, messages: Sequence[Released]) -> None:
    """Make staged (or uncertain) messages pending for their backups. Result: for each 1, COVERING, or 0 for neither."""
    arguments: list[str] = []
    for m in messages:
        recipients = json.dumps(m.recipients) if m.digest else ""
        arguments += (m.id, m.digest, recipients, repr(m.accepted_at), str(len(m.destinations)), *m.destinations)
    pipe.eval(_RELEASE, 0, *arguments)


def discard(pipe: Pipe, ids: Sequence[str]) -> None:
    """Forget staged or uncertain messages that the primary refused. Result: how many there were."""
    pipe.eval(_DISCARD, 0, *ids)


def hold(pipe: Pipe, messages: Sequence[Held]) -> None:
    """Make staged messages uncertain. Result: how many of them were staged."""
    pipe.eval(_HOLD, 0, *(str(part) for held in messages for part in held))


def restage(pipe: Pipe, spool: str, messages: Sequence[tuple[str, bytes]]) -> None:
    """Bring messages in from the spool of that name, each once: a repetition after a crash does nothing.

    To be followed by hold in the same MULTI. Result: how many were new.
    """
    pipe.eval(_RESTAGE, 0, IMPORTED + spool, *(part for pair in messages for part in pair))


class Admitted(NamedTuple):
    """A message that comes in from the file of that name, due at the backups that ``released`` names: perhaps some."""

    file: str
    record: bytes
    released: Released


def admit(pipe: Pipe, spool: str, messages: Sequence[Admitted]) -> None:
    """Bring messages in as pending, each once for each backup, however often and with whichever others it is named.

    Result: for each how many backups were new.
    """
    arguments: list[str | bytes] = []
    for file, record, m in messages:
        recipients = json.dumps(m.recipients) if m.digest else ""
        arguments += (m.id, record, file, repr(m.accepted_at), m.digest, recipients)
        arguments += (str(len(m.destinations)), *m.destinations)
    pipe.eval(_ADMIT, 0, IMPORTED + spool, *arguments)


def note_of(member: str) -> tuple[str, str]:
    """Return file and backup of a note in ``IMPORTED``; of one about a whole message, its id and ""."""
    file, _, destination = member.partition(" ")
    return file, destination


def unstage(pipe: Pipe, spool: str, ids: Sequence[str], *, strike: bool = False) -> None:
    """Forget what a stage may have left of messages that are in the spool of that name, or were brought in from it.

    ``strike``: ``ids`` are notes of ``IMPORTED`` whose files are gone for good, and go too.
    """
    pipe.eval(_UNSTAGE, 0, IMPORTED + spool, "1" if strike else "0", *ids)


def revive_uncertain(pipe: Pipe, message_id: str, owed: dict[str, str]) -> None:
    """Make an uncertain message pending: ``owed`` maps each backup to a CopyState wire form, "" for all recipients.

    Without any backup the message is forgotten. Result: 1, or 0 for not uncertain any more.
    """
    arguments = [part for pair in owed.items() for part in pair]
    pipe.eval(_REVIVE, 0, message_id, *arguments)


# --- the worker's side ----------------------------------------------------------------------------------------


def claim(pipe: Pipe, destination: str, job: str, worker: str, lease: float, ids: Sequence[str]) -> None:
    """Take the leases of copies for a job. Result for ``claimed``.

    Claimed is what is pending, not leased, and not owned by another job. A failed copy whose own job this is (a
    requeue) moves to pending with a fresh clock.
    """
    pipe.eval(_CLAIM, 0, destination, job, worker, str(lease), *ids)


def claimed(result: Sequence[Sequence[bytes]]) -> tuple[list[Claim], list[str]]:
    """Read claim's result: the claims, and the ids of failed copies that are busy and must be asked for again."""
    claims, later = [], []
    for row in result:
        if not row[0]:  # see heard
            continue
        message_id, verdict, accepted, state, before = row
        if verdict == b"later":
            later.append(as_text(message_id))
        else:
            known, is_retried = CopyState.from_wire(state), verdict == b"retried"
            claims.append(Claim(as_text(message_id), float(accepted), known, is_retried, as_text(before)))
    return claims, later


class Heard(NamedTuple):
    """How the ledger stood at a claim: who it is, how far it has come; what came before ``doubt`` may be repeated.

    ``at`` is the time of the claim by Redis's clock.
    """

    identity: str
    progress: int
    doubt: float
    at: float = 0.0


def heard(result: Sequence[Sequence[bytes]]) -> Heard:
    """Read from claim's result how the ledger stands."""
    _, identity, count, doubt, at = result[0]
    return Heard(as_text(identity), int(count), float(doubt), float(at))


def renew(pipe: Pipe, destination: str, until: float, ids: Sequence[str]) -> None:
    """Extend leases; those that are gone stay gone."""
    pipe.zadd(BUSY + destination, dict.fromkeys(ids, until), xx=True)


def settle(pipe: Pipe, destination: str, ids: Sequence[str], *, counted: bool = False, noise: float = NOISE) -> None:
    """Copies that are delivered. Result: how many were still pending.

    ``counted`` when some may be open in groups of divergence. Here and below, those that were only deferred, and for no
    longer than ``noise`` seconds, are noise there.
    """
    pipe.eval(_SETTLE_COUNTED if counted else _SETTLE, 0, destination, str(noise), *ids)


def defer(pipe: Pipe, destination: str, states: dict[str, CopyState], *, noise: float = NOISE) -> None:
    """Copies to be tried again by the job named in their state; the lease ends. Result: how many were pending."""
    pipe.eval(_DEFER, 0, destination, str(noise), *(part for i, s in states.items() for part in (i, s.to_wire())))


def fail(
    pipe: Pipe,
    destination: str,
    message_id: str,
    failure: CopyState,
    remains: CopyState | None,
    *,
    noise: float = NOISE,
) -> None:
    """Move a copy, or the recipients in ``failure.owed``, to the failed list; what remains stays pending.

    Result: 1, or 0 for not pending.
    """
    left = remains.to_wire() if remains else ""
    pipe.eval(_FAIL, 0, destination, message_id, failure.to_wire(), left, str(noise))


def unlease(pipe: Pipe, destination: str, ids: Sequence[str]) -> None:
    """Give leases back untried."""
    pipe.eval(_UNLEASE, 0, destination, *ids)


def release_leases(pipe: Pipe, destination: str, worker: str) -> None:
    """End the leases of a dead worker: what it had in hand may be claimed at once, by claims that name it."""
    pipe.eval(_BEREAVE, 0, destination, worker)


def drop(pipe: Pipe, destination: str, ids: Sequence[str], *, pending: bool = False) -> None:
    """Forget failed copies (or pending ones) for good. Result: how many there were."""
    pipe.eval(_DROP, 0, destination, "1" if pending else "0", *(part for i in ids for part in (i, "")))


def drop_unchanged(pipe: Pipe, destination: str, copies: Mapping[str, float], *, pending: bool = False) -> None:
    """Forget failed copies (or pending ones) for good: id -> its score as it was read. Result: how many are gone.

    What has another score by now was tried again, what is leased is being delivered: both stay.
    """
    parts = (part for message_id, score in copies.items() for part in (message_id, repr(score)))
    pipe.eval(_DROP, 0, destination, "1" if pending else "0", *parts)


# --- the reconciler's and the operator's side -----------------------------------------------------------------


def reassign(pipe: Pipe, destination: str, job: str, copies: Mapping[str, str | None], *, failed: bool = False) -> None:
    """Make a job the owner of pending (or failed) copies: id -> the job that owned it so far, None for any.

    Only copies with a state have an owner; a pending one under a lease keeps it. Result: how many changed.
    """
    pairs = (part for message_id, owner in copies.items() for part in (message_id, "*" if owner is None else owner))
    pipe.eval(_REASSIGN, 0, destination, "failure" if failed else "own", job, *pairs)


class Move(NamedTuple):
    """A copy that goes to another destination: its state as it was read and as it will be, in wire form.

    "" is no state; ``after`` is None when nothing of it is owed there.
    """

    id: str
    before: str
    after: str | None


def move(pipe: Pipe, source: str, target: str, copies: Sequence[Move], *, failed: bool = False) -> None:
    """Move pending (or failed) copies to another destination, each as old as it is.

    What is leased, has changed since it was read, or is listed there already stays. Result: for each 1 or 0.
    """
    parts = (part for c in copies for part in (c.id, c.before, "-" if c.after is None else c.after))
    pipe.eval(_MOVE, 0, source, target, "failed" if failed else "pending", *parts)


def purge(pipe: Pipe, ids: Sequence[str]) -> None:
    """Delete bodies that nobody lists. Result: how many."""
    pipe.eval(_PURGE, 0, *ids)


def forget(pipe: Pipe, destination: str) -> None:
    """Forget a destination that nothing is listed for. Result: how many are pending, failed, leased; else all 0."""
    pipe.eval(_FORGET, 0, destination)


def stow(pipe: Pipe, message_id: str, stub: bytes, folder: str) -> None:
    """Replace the record of a message that failed and is pending nowhere; its body is in a folder of that identity.

    Result: 1, or 0 for not in that state.
    """
    pipe.eval(_STOW, 0, message_id, stub, MOVED + folder)


def judge_files(pipe: Pipe, folder: str, ids: Sequence[str]) -> None:
    """Ask about the files of a folder of moved bodies. Result for each: WANTED, SETTLED or UNKNOWN."""
    pipe.eval(_JUDGE_FILES, 0, MOVED + folder, *ids)


def note_twins(pipe: Pipe, pairs: Iterable[tuple[str, str]]) -> None:
    """Note digest -> id of messages that are uncertain, where nobody has that digest. Result: how many."""
    pipe.eval(_TWINS, 0, "1", *(part for pair in pairs for part in pair))


def forget_twins(pipe: Pipe, pairs: Iterable[tuple[str, str]]) -> None:
    """Forget digest -> id where the message is not uncertain any more. Result: how many."""
    pipe.eval(_TWINS, 0, "0", *(part for pair in pairs for part in pair))


# --- questions that many ask ----------------------------------------------------------------------------------


def now(connection: Any) -> float:
    """Return Redis's own time, seconds since the epoch: the one clock that all hosts share."""
    return time_of(connection.time())


def owners(connection: Any, destination: str, ids: Sequence[str], *, failed: bool = False) -> list[str]:
    """Return the job that owns each pending (or failed) copy, "" where none does."""
    found = connection.eval(_OWNERS, 0, destination, "failure" if failed else "own", *ids) if ids else []
    return [as_text(job) for job in found]
