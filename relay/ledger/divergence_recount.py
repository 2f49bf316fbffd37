"""How many are open in each group of divergence, counted again from the states of all copies, which are the truth.

A failover can lose a group and keep the states, or the other way round. What changes while it is counted is left to the
next time: a group's ``turns`` tells. A group that is gone comes back from the reply that a state remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from relay.ledger import changes, keys, queries
from relay.ledger.copy_state import CopyState
from relay.ledger.divergence import LETTERS, MOST_GROUPS, OTHERS, STAGES, key_of
from relay.ledger.divergence_groups import Group, groups
from relay.mail import encryption, refusal_class, reply_text
from relay.mail.envelope import Envelope
from relay.mail.ids import is_id, text
from relay.mail.reply import Reply
from relay.mail.reply_text import Known

_PAGE = 1000
_KINDS = {letter: kind for kind, letter in LETTERS.items()}
_RESTS = {letter: OTHERS[kind] for letter, kind in _KINDS.items()}
# KEYS: a group. ARGV: its turns when they were read, how many are open. Only what has not changed since is mended.
_MEND = """
if (redis.call('HGET', KEYS[1], 'turns') or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'open', ARGV[2])
return 1
"""


@dataclass(slots=True)
class _Counted:
    """What the states say of one group, and one copy that is in it."""

    letter: str
    message_id: str
    state: CopyState
    recipient: int
    recipients: int = 0
    messages: int = 0


@dataclass(frozen=True, slots=True)
class Mended:
    """A group whose number of open recipients was wrong."""

    key: str
    was: int
    now: int


def recount(
    connection: Any,
    destination: str,
    ours: Known,
    *,
    repair: bool = True,
    tick: Callable[[], object] = lambda: None,
    most: int = MOST_GROUPS,
) -> list[Mended]:
    """Compare each group with the states of all copies; returns what is, or was, wrong."""
    before = {found.key: found for found in groups(connection, destination)}
    counted = _count(connection, destination, tick)
    if not before and not counted:
        return []
    after = {found.key: found for found in groups(connection, destination)}
    mended: list[Mended] = []
    lost = {key: found for key, found in counted.items() if key not in after}
    room = most - sum(not found.is_rest for found in after.values())
    for key, found in list(lost.items())[: max(0, room)]:
        if repair and key not in before:
            _restore(connection, destination, key, found, ours)
        mended.append(Mended(key, 0, found.recipients))
        del lost[key]
    for group in after.values():
        expected = counted[group.key].recipients if group.key in counted else 0
        if group.is_rest:
            here = (found for found in lost.values() if _RESTS.get(found.letter, "other") == group.key)
            expected = sum(found.recipients for found in here)
        was = before.get(group.key)
        if was is None or (was.turns, was.open) != (group.turns, group.open) or group.open == expected:
            continue
        if not repair or _mend(connection, group, expected):
            mended.append(Mended(group.key, group.open, expected))
    return mended


def _mend(connection: Any, group: Group, expected: int) -> bool:
    key = keys.of_group(keys.DIVERGED, group.destination, group.key)
    return bool(connection.eval(_MEND, 1, key, group.turns, expected))


def _count(connection: Any, destination: str, tick: Callable[[], object]) -> dict[str, _Counted]:
    counted: dict[str, _Counted] = {}
    seen: set[tuple[str, str, int]] = set()  # a page may come twice, and a copy may be pending and failed
    for message_id, state in _states(connection, destination, tick):
        for group, recipients in state.open:
            fresh = [i for i in recipients if (group, message_id, i) not in seen]
            if not fresh:
                continue
            seen.update((group, message_id, i) for i in fresh)
            found = counted.setdefault(group[1:], _Counted(group[0], message_id, state, fresh[0]))
            found.recipients += len(fresh)
            found.messages += 1
    return counted


def _states(connection: Any, destination: str, tick: Callable[[], object]) -> Iterator[tuple[str, CopyState]]:
    for prefix in (keys.OWN, keys.FAILURE):
        cursor = -1
        while cursor:
            cursor, page = connection.hscan(prefix + destination, max(0, cursor), count=_PAGE)
            tick()
            for name, value in page.items():
                if b'"g":' in value and is_id(message_id := text(name)):
                    yield message_id, CopyState.from_wire(value)


def _restore(connection: Any, destination: str, key: str, found: _Counted, ours: Known) -> None:
    """Make a group again of what a state remembers."""
    (envelope,) = queries.envelopes(connection, [found.message_id])
    kind = _KINDS.get(found.letter, "refused")
    stage, reply, status, words = _remembered(destination, key, kind, found, envelope, ours)
    at = found.state.history[-1].at if found.state.history else changes.now(connection)
    first = found.state.history[0].at if found.state.history else at
    with connection.pipeline(transaction=True) as pipe:
        pipe.hset(keys.of_group(keys.DIVERGED, destination, key), mapping={
            "kind": kind, "stage": stage, "code": reply.code, "status": status, "text": words,
            "class": refusal_class.classify(reply.code, status, words).name, "own": int(stage == "own"),
            "reply": "" if encryption.is_on() else reply.text, "first": first, "last": at,
            "seen": found.recipients, "open": found.recipients, "messages": found.messages,
        })  # fmt: skip
        pipe.zadd(keys.of_group(keys.EXAMPLES, destination, key), {found.message_id: at})
        pipe.zadd(keys.DIVERGENCE + destination, {key: at})
        pipe.execute()


def _remembered(
    destination: str, key: str, kind: str, found: _Counted, envelope: Envelope | None, ours: Known
) -> tuple[str, Reply, str, str]:
    """Return stage, reply, status and text of a group: of the reply that gives its key, or else of the last one."""
    known = ours
    if envelope is not None and found.recipient < len(envelope.recipients):
        known = ours.of(envelope, found.recipient)
    last = ("", Reply.of(0), "", "")
    for attempt in reversed(found.state.history):
        code, _, words = attempt.reply.partition(" ")
        is_reply = code.isdecimal() and len(code) == 3
        reply = Reply.of(int(code), words) if is_reply else Reply.of(451, attempt.reply)  # words of ours
        status, shown = reply_text.normalise(reply, known)
        for stage in STAGES:
            if key_of(destination, kind, stage, reply.code, status, shown) == key:
                return stage, reply, status, shown
        last = last if last[2] or last[3] else ("", reply, status, shown)
    return last
