"""Every change of a message's state in the ledger (the keys are in keys.py).

The ledger and not the RQ jobs is authoritative: until a copy is delivered, dropped or in the failed list, its id is
listed here. Each change is one Lua script (in lua/) or one MULTI, and does nothing if the id is not in the expected
state, so that repeating one is harmless. The functions only add commands to a pipeline, sync or async; Redis errors
are raised when the pipeline is executed. "Result" is the reply to the command. Scripts are sent whole, by EVAL: a
restart empties the script cache, and NOSCRIPT inside a MULTI would leave the transaction half done. Not for Redis
Cluster, since scripts compute the names of keys.

    stage -> release -> (claim -> settle | defer | fail)*     fail -> claim by its own job -> ...
          -> discard                                               -> drop
          -> hold (uncertain) -> release | discard | revive
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quoted
from typing import Any, NamedTuple

from relay.ledger.copy_state import FRESH, CopyState
from relay.ledger.keys import BUSY, IMPORTED, MESSAGE, MOVED, STAGED
from relay.ledger.redis_clock import time_of
from relay.ledger.scripts import script
from relay.mail.ids import text as as_text
from relay.redisio.pipeline import CommandBatch

NOISE = 900.0  # seconds: see divergence.noise
LEASE_SECONDS = 60.0
HANDED_SECONDS = 20.0  # of a lease taken for a worker by a release: one that lives renews it before it ends
COVERING = 2  # of a release: an uncertain message with the same digest has the recipients too
WANTED, SETTLED, UNKNOWN = range(3)  # the ledger's verdict on a file; see judge_files.lua

Pipe = Any  # redis.client.Pipeline or redis.asyncio.client.Pipeline: both only queue commands here


class Staged(NamedTuple):
    """A message to stage: its packed record, in parts, and the absolute deadline (Redis time) of its owner."""

    id: str
    record: tuple[bytes, ...]
    deadline: float


class Released(NamedTuple):
    """A message that the primary accepted, for release to these backups.

    ``recipients`` are its accepted addresses; they are noted as covered on an uncertain message with the same digest
    (its twin). ``accepted_at`` is the time of acceptance by Redis's clock, if the release comes later.
    """

    id: str
    destinations: tuple[str, ...]
    digest: str = ""
    recipients: tuple[str, ...] = ()
    accepted_at: float = 0.0
    holders: tuple[str, ...] = ()  # for each backup the worker that gets its copy at once, with a lease; "" for none


class Held(NamedTuple):
    """A staged message that becomes uncertain: its copies are delivered after the hold unless a twin covers them."""

    id: str
    digest: str
    seconds: float


class Claim(NamedTuple):
    """A copy that the worker has claimed for delivery."""

    id: str
    accepted_at: float
    state: CopyState = FRESH
    was_failed: bool = False  # an operator's retry: the retry schedule starts again
    before: str = ""  # a worker that claimed it before and reported no outcome: it may have been sent
    size: int = 0  # octets of its record, as stored


def is_known(pipe: Pipe, identity: str, count: int, fresh: str, *, count_on: bool) -> None:
    """Ask whether this is the ledger with that identity, no older than that count; a new ledger gets ``fresh``.

    Result: identity, count, the change found now ("" for none), whether the index of lists is whole, the last change.
    """
    pipe.eval(script("known"), 0, identity, count, fresh, int(count_on))


def beat(pipe: Pipe, process: str, words: str) -> None:
    """Note the heartbeat of a relay process; ``words`` is JSON without its first brace.

    Result: the topology, the intent to change it, and the state of the map of moved mailboxes, as stored, "" for none.
    """
    pipe.eval(script("beat"), 0, process, words)


def stage(pipe: CommandBatch, messages: Sequence[Staged]) -> None:
    """Write messages before the primary may see their dot.

    Without a script, which would copy each record into Lua and out again: that takes Redis half as long again.
    """
    listed: list[str] = ["ZADD", STAGED]
    written: list[str | bytes | tuple[bytes, ...]] = ["MSET"]
    for message_id, record, deadline in messages:
        listed += (str(deadline), message_id)
        written += (MESSAGE + message_id, record if pipe.is_large else b"".join(record))
    pipe.transaction((listed, written))  # listed before it is written: a body that nobody lists is a leak


def release(pipe: Pipe, messages: Sequence[Released]) -> None:
    """Make staged (or uncertain) messages pending for their backups, leased to their holders.

    Result: for each 1, COVERING, or 0 for neither.
    """
    arguments: list[str] = []
    for m in messages:
        recipients = f"[{', '.join(map(_quoted, m.recipients))}]" if m.digest else ""
        arguments += (m.id, m.digest, recipients, repr(m.accepted_at), str(len(m.destinations)), *m.destinations)
        arguments.append(" ".join([f"{n + 1}={holder}" for n, holder in enumerate(m.holders) if holder]))
    pipe.eval(script("release"), 0, str(HANDED_SECONDS), *arguments)


def discard(pipe: Pipe, ids: Sequence[str]) -> None:
    """Delete staged or uncertain messages that the primary refused. Result: their number."""
    pipe.eval(script("discard"), 0, *ids)


def hold(pipe: Pipe, messages: Sequence[Held]) -> None:
    """Make staged messages uncertain. Result: the number that were staged."""
    pipe.eval(script("hold"), 0, *(str(part) for held in messages for part in held))


def restage(pipe: Pipe, spool: str, messages: Sequence[tuple[str, bytes]]) -> None:
    """Import messages from the spool of that name, each only once: a repetition after a crash does nothing.

    Must be followed by hold in the same MULTI. Result: the number of new ones.
    """
    pipe.eval(script("restage"), 0, IMPORTED + spool, *(part for pair in messages for part in pair))


class Admitted(NamedTuple):
    """A message imported from the file of that name, due at the backups that ``released`` names, perhaps not all."""

    file: str
    record: bytes
    released: Released


def admit(pipe: Pipe, spool: str, messages: Sequence[Admitted]) -> None:
    """Import messages as pending, each only once for each backup, however often that backup is named.

    Result: for each message, the number of new backups.
    """
    arguments: list[str | bytes] = []
    for file, record, m in messages:
        recipients = json.dumps(m.recipients) if m.digest else ""
        arguments += (m.id, record, file, repr(m.accepted_at), m.digest, recipients)
        arguments += (str(len(m.destinations)), *m.destinations)
    pipe.eval(script("admit"), 0, IMPORTED + spool, *arguments)


def note_of(member: str) -> tuple[str, str]:
    """Return (file, backup) of a note in ``IMPORTED``; for a note about a whole message, (id, "")."""
    file, _, destination = member.partition(" ")
    return file, destination


def unstage(pipe: Pipe, spool: str, ids: Sequence[str], *, strike: bool = False) -> None:
    """Delete what a stage may have left of messages that are in the spool of that name, or were imported from it.

    ``strike``: ``ids`` are notes in ``IMPORTED`` whose files are durably deleted; the notes are deleted too.
    """
    pipe.eval(script("unstage"), 0, IMPORTED + spool, "1" if strike else "0", *ids)


def revive_uncertain(pipe: Pipe, message_id: str, owed: dict[str, str]) -> None:
    """Make an uncertain message pending: ``owed`` maps each backup to a CopyState wire form, "" for all recipients.

    Without any backup the message is deleted. Result: 1, or 0 if it is no longer uncertain.
    """
    arguments = [part for pair in owed.items() for part in pair]
    pipe.eval(script("revive"), 0, message_id, *arguments)


# --- the worker's side ----------------------------------------------------------------------------------------


def claim(pipe: Pipe, destination: str, job: str, worker: str, lease: float, ids: Sequence[str]) -> None:
    """Lease copies to a job; ``lease`` is in seconds. Result: to be read by ``claimed`` and ``heard``.

    A copy is claimed if it is pending, not leased, and not owned by another job. A failed copy that is owned by this
    job (a requeue) becomes pending again, and its retry schedule starts again.
    """
    pipe.eval(script("claim"), 0, destination, job, worker, str(lease), *ids)


def claimed(result: Sequence[Sequence[bytes]]) -> tuple[list[Claim], list[str]]:
    """Read the result of claim: the claims, and the ids of leased failed copies, which must be claimed again later."""
    claims, later = [], []
    for row in result:
        if not row[0]:  # the row for ``heard``
            continue
        message_id, verdict, accepted, state, before, size = row
        if verdict == b"later":
            later.append(as_text(message_id))
        else:
            known, is_retried = CopyState.from_wire(state) if state else FRESH, verdict == b"retried"
            holder = as_text(before) if before else ""
            claims.append(Claim(as_text(message_id), float(accepted), known, is_retried, holder, int(size)))
    return claims, later


class Heard(NamedTuple):
    """The state of the ledger at a claim: its identity and count; copies accepted before ``doubt`` may be repeated.

    ``at`` is the time of the claim by Redis's clock.
    """

    identity: str
    progress: int
    doubt: float
    at: float = 0.0


def heard(result: Sequence[Sequence[bytes]]) -> Heard:
    """Read the state of the ledger from the result of claim."""
    _, identity, count, doubt, at = result[0]
    return Heard(as_text(identity), int(count), float(doubt), float(at))


def renew(pipe: Pipe, destination: str, until: float, ids: Sequence[str]) -> None:
    """Extend leases that still exist."""
    pipe.zadd(BUSY + destination, dict.fromkeys(ids, until), xx=True)


def settle(pipe: Pipe, destination: str, ids: Sequence[str], *, counted: bool = False, noise: float = NOISE) -> None:
    """Remove delivered copies. Result: the number that were still pending.

    ``counted``: some may be open in groups of divergence. Here and below, copies that were only deferred, for at most
    ``noise`` seconds, count as noise there.
    """
    pipe.eval(script("settle") if counted else script("settle", without="turned"), 0, destination, str(noise), *ids)


def defer(pipe: Pipe, destination: str, states: dict[str, CopyState], *, noise: float = NOISE) -> None:
    """Store the state of deferred copies, which the job named there tries again, and end their leases.

    Result: the number that were pending.
    """
    pipe.eval(
        script("defer"), 0, destination, str(noise), *(part for i, s in states.items() for part in (i, s.to_wire()))
    )


def fail(
    pipe: Pipe,
    destination: str,
    message_id: str,
    failure: CopyState,
    remains: CopyState | None,
    *,
    noise: float = NOISE,
) -> None:
    """Move a copy, or the recipients in ``failure.owed``, to the failed list; ``remains`` stays pending.

    Result: 1, or 0 if it was not pending.
    """
    left = remains.to_wire() if remains else ""
    pipe.eval(script("fail"), 0, destination, message_id, failure.to_wire(), left, str(noise))


def unlease(pipe: Pipe, destination: str, worker: str, ids: Sequence[str]) -> None:
    """End leases of a worker without a try."""
    pipe.eval(script("unlease"), 0, destination, worker, *ids)


def release_leases(pipe: Pipe, destination: str, worker: str) -> Any:
    """End the leases of a dead worker, so that its copies can be claimed at once; ``Claim.before`` names it.

    Result: the ids of those copies.
    """
    return pipe.eval(script("bereave"), 0, destination, worker)


def drop(pipe: Pipe, destination: str, ids: Sequence[str], *, pending: bool = False) -> None:
    """Delete failed copies (or pending ones). Result: their ids."""
    pipe.eval(script("drop"), 0, destination, "1" if pending else "0", *(part for i in ids for part in (i, "")))


def drop_unchanged(pipe: Pipe, destination: str, copies: Mapping[str, float], *, pending: bool = False) -> None:
    """Delete failed copies (or pending ones) unless they have changed: id -> the score that was read.

    A copy with another score was tried again, and a leased copy is being delivered: both stay. Result: the others' ids.
    """
    parts = (part for message_id, score in copies.items() for part in (message_id, repr(score)))
    pipe.eval(script("drop"), 0, destination, "1" if pending else "0", *parts)


# --- the reconciler's and the operator's side -----------------------------------------------------------------


def reassign(pipe: Pipe, destination: str, job: str, copies: Mapping[str, str | None], *, failed: bool = False) -> None:
    """Make a job the owner of pending (or failed) copies: id -> the previous owner, None for any.

    Only copies with a state have an owner; a leased pending copy keeps its own. Result: the number of changes.
    """
    pairs = (part for message_id, owner in copies.items() for part in (message_id, "*" if owner is None else owner))
    pipe.eval(script("reassign"), 0, destination, "failure" if failed else "own", job, *pairs)


class Move(NamedTuple):
    """A copy that moves to another destination: its state as it was read, and its new state, in wire form.

    "" means no state; ``after`` is None if no recipient is owed there.
    """

    id: str
    before: str
    after: str | None


def move(pipe: Pipe, source: str, target: str, copies: Sequence[Move], *, failed: bool = False) -> None:
    """Move pending (or failed) copies to another destination; they keep their time.

    A copy that is leased, has changed since it was read, or is listed there already stays. Result: for each 1 or 0.
    """
    parts = (part for c in copies for part in (c.id, c.before, "-" if c.after is None else c.after))
    pipe.eval(script("move"), 0, source, target, "failed" if failed else "pending", *parts)


def purge(pipe: Pipe, ids: Sequence[str]) -> None:
    """Delete bodies of messages that no list contains. Result: their number."""
    pipe.eval(script("purge"), 0, *ids)


def forget(pipe: Pipe, destination: str) -> None:
    """Delete a destination without copies. Result: its pending, failed and leased copies; all 0 if it is deleted."""
    pipe.eval(script("forget"), 0, destination)


def stow(pipe: Pipe, message_id: str, stub: bytes, folder: str) -> None:
    """Replace the record of a failed message, pending nowhere, by its stub; the body is in the folder of that identity.

    Result: 1, or 0 if not in that state.
    """
    pipe.eval(script("stow"), 0, message_id, stub, MOVED + folder)


def judge_files(pipe: Pipe, folder: str, ids: Sequence[str]) -> None:
    """Ask whether the files of a folder of moved bodies are needed. Result: for each WANTED, SETTLED or UNKNOWN."""
    pipe.eval(script("judge_files"), 0, MOVED + folder, *ids)


def note_twins(pipe: Pipe, pairs: Iterable[tuple[str, str]]) -> None:
    """Note digest -> id of uncertain messages, if the digest is not noted yet. Result: the number noted."""
    pipe.eval(script("twins"), 0, "1", *(part for pair in pairs for part in pair))


def forget_twins(pipe: Pipe, pairs: Iterable[tuple[str, str]]) -> None:
    """Delete digest -> id of messages that are no longer uncertain. Result: the number deleted."""
    pipe.eval(script("twins"), 0, "0", *(part for pair in pairs for part in pair))


# --- questions that many ask ----------------------------------------------------------------------------------


def now(connection: Any) -> float:
    """Return the time by Redis's clock, which all hosts share, in seconds since the epoch."""
    return time_of(connection.time())


def owners(connection: Any, destination: str, ids: Sequence[str], *, failed: bool = False) -> list[str]:
    """Return the job that owns each pending (or failed) copy, "" for none."""
    found = connection.eval(script("owners"), 0, destination, "failure" if failed else "own", *ids) if ids else []
    return [as_text(job) for job in found]
