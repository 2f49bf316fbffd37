"""Finds bodies that no list of the ledger contains (a leak), by a scan of all message keys.

A body is listed before it is written and unlisted before it is deleted, so an orphan comes from a fault or from manual
changes. It is reported after an hour and deleted only after a week: a loss is worse than a leak. A key whose id has no
valid time is never deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from redis import Redis

from relay.ledger import changes, registry
from relay.ledger import keys as ledger_keys
from relay.mail.ids import made_at

_REPORTED_AFTER = 3600.0
_REMOVED_AFTER = 7 * 86400.0
_PAGE = 1000


def bodies(connection: Redis, tick: Callable[[], object], *, remove: bool) -> Iterator[tuple[str, str]]:
    """Yield (id, action) of orphan bodies; the action is "removed" or "none"."""
    clock = changes.now(connection)
    keys = [ledger_keys.STAGED, ledger_keys.UNCERTAIN]
    keys += [
        kind + name for name in registry.destinations(connection) for kind in (ledger_keys.PENDING, ledger_keys.FAILED)
    ]
    cursor = 0
    while True:
        tick()
        scanned: Any = connection.scan(cursor, match=ledger_keys.MESSAGE + "*", count=_PAGE)
        cursor, found = scanned
        ids = [key.decode("utf-8", "replace").removeprefix(ledger_keys.MESSAGE) for key in found]
        old = [message_id for message_id in ids if clock - made_at(message_id) > _REPORTED_AFTER]
        for message_id in _nowhere(connection, keys, old):
            yield message_id, _removed(connection, message_id, clock) if remove else "none"
        if not cursor:
            return


def _nowhere(connection: Redis, keys: Sequence[str], ids: list[str]) -> list[str]:
    left = ids
    for key in keys:
        if left:
            scores = connection.zmscore(key, left)
            left = [message_id for message_id, score in zip(left, scores, strict=True) if score is None]
    return left


def _removed(connection: Redis, message_id: str, clock: float) -> str:
    if clock - made_at(message_id) <= _REMOVED_AFTER:
        return "none"
    with connection.pipeline(transaction=True) as pipe:
        changes.purge(pipe, [message_id])
        return "removed" if pipe.execute()[0] else "none"
