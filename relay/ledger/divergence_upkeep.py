"""What changes groups of divergence beside counting: an operator's acknowledgement, and the sweep.

Everything is decided from what is stored, so a sweep may run twice or be interrupted. A group that is damaged is
forgotten, since nothing could be counted there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from relay.ledger import changes, keys
from relay.ledger.divergence_groups import HOUR, Acknowledgement, Group, groups, is_group
from relay.mail.ids import text

_HOURS_KEPT = 35 * 24
_NOTE = 1000  # characters of an operator's words
_PARTS = {keys.DIVERGED: b"hash", keys.EXAMPLES: b"zset", keys.WHOM: b"zset", keys.SEALED: b"hash"}  # of one group


# Acknowledging ------------------------------------------------------------------------------------------------------


def acknowledge(
    connection: Any, found: Group, by: str, note: str, seconds: float, domains: Sequence[str] = ()
) -> Acknowledgement:
    """Let a group not count for so many seconds; returns what is stored. ``domains``: only while it is of these."""
    now = changes.now(connection)
    ack = Acknowledgement(
        by=by[:_NOTE],
        note=note[:_NOTE],
        at=now,
        until=now + seconds,
        domains=tuple(domain.lower() for domain in domains) or tuple(found.domains),
        more_domains=found.more_domains,
        rate=found.rate(now),
        counted=found.hours.get(int(now // HOUR), 0),
    )
    connection.hset(keys.of_group(keys.DIVERGED, found.destination, found.key), "ack", ack.to_json())
    return ack


def unacknowledge(connection: Any, found: Group) -> bool:
    """Let a group count again; returns whether it was acknowledged."""
    return bool(connection.hdel(keys.of_group(keys.DIVERGED, found.destination, found.key), "ack"))


# Sweeping -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did to a group, and why."""

    key: str
    what: str


def sweep(connection: Any, destination: str, before: float, elapsed: Callable[[float], float]) -> list[Swept]:
    """Forget empty groups that were last seen before that time, old hours, and acknowledgements that are over.

    ``elapsed`` says how many seconds ago a time was: a clock that is set ends no acknowledgement for good.
    """
    now = changes.now(connection)
    done = list(_mend_types(connection, destination))
    for found in groups(connection, destination):
        hash_key = keys.of_group(keys.DIVERGED, destination, found.key)
        if found.last > now + HOUR:  # the clock was wrong then
            connection.zadd(keys.DIVERGENCE + destination, {found.key: now}, xx=True)
            connection.hset(hash_key, "last", f"{now:.6f}")
        elif not found.open and found.last < before:
            forget(connection, destination, [found.key])
            done.append(Swept(found.key, "empty, forgotten"))
            continue
        why = found.reopened(now)
        if why and found.ack and (now < found.ack.until or elapsed(found.ack.at) >= found.ack.until - found.ack.at):
            connection.hdel(hash_key, "ack")
            done.append(Swept(found.key, f"open again: {why}"))
        first, last = now // HOUR - _HOURS_KEPT, now // HOUR + 1
        if old := [f"h{hour}" for hour in found.hours if not first <= hour <= last]:
            connection.hdel(hash_key, *old)
    return done


def forget(connection: Any, destination: str, names: Sequence[str]) -> None:
    """Forget groups."""
    with connection.pipeline(transaction=True) as pipe:
        for name in names:
            pipe.zrem(keys.DIVERGENCE + destination, name)
            for prefix in _PARTS:
                pipe.delete(keys.of_group(prefix, destination, name))
        pipe.execute()


def _mend_types(connection: Any, destination: str) -> list[Swept]:
    """Forget what is no list of groups, and groups that are none: nothing could be counted there."""
    key = keys.DIVERGENCE + destination
    if connection.type(key) not in {b"zset", b"none"}:
        connection.delete(key)
        return [Swept("", "no list of groups, forgotten")]
    names = [text(name) for name in cast("list[bytes]", connection.zrange(key, 0, -1))]
    strange = [name for name in names if not is_group(name)]
    if strange:
        connection.zrem(key, *strange)
    with connection.pipeline(transaction=False) as pipe:
        kept = [name for name in names if is_group(name)]
        for name in kept:
            for prefix in _PARTS:
                pipe.type(keys.of_group(prefix, destination, name))
        types = pipe.execute()
    damaged = [
        name
        for n, name in enumerate(kept)
        if types[4 * n] == b"none"
        or any(t not in {e, b"none"} for t, e in zip(types[4 * n : 4 * n + 4], _PARTS.values(), strict=True))
    ]
    forget(connection, destination, damaged)
    return [Swept(name, "damaged, forgotten") for name in damaged]
