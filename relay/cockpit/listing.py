"""A sheet of a list of copies: so many rows, and where the next sheet begins. Bounded, however long the list is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from redis import Redis

from workers.queues import backlog, failed, selection
from workers.queues.backlog import WaitingCopy
from workers.queues.failed import FailedCopy
from workers.queues.selection import WAITING, Filter, ListPlace, Which

ROWS = 100
_LOOKED = 10_000  # copies that one sheet looks at, where few of them meet the conditions


@dataclass(slots=True)
class Sheet:
    """The rows of a sheet, of so many copies that may pass.

    ``next`` is where the next one begins, None at the end; ``unread`` says which envelopes could not be read, and why.
    """

    rows: list[WaitingCopy | FailedCopy] = field(default_factory=list)
    looked_at: int = 0
    total: int = 0
    next: ListPlace | None = None
    unread: dict[str, str] = field(default_factory=dict)


def sheet(connection: Redis, which: Which, chosen: Filter, after: ListPlace | None = None) -> Sheet:
    """Return a sheet of what passes, the oldest first. Raises UnknownId, UnknownDestination."""
    found = Sheet(total=selection.size(connection, which, chosen))
    wanted = min(ROWS, chosen.limit or ROWS)
    pages = selection.select(connection, which, replace(chosen, limit=wanted + 1), whole=True, after=after)
    for page in pages:
        found.looked_at += page.looked_at
        found.unread |= page.unread
        room = wanted - len(found.rows)
        is_more = len(page.found) > room
        shown = page._replace(found=page.found[:room])
        found.rows += _rows(connection, which, shown)
        if is_more:
            last = shown.found[-1] if shown.found else None
            behind = ListPlace(page.target.name, last.score, last.id) if last else found.next
            found.next = behind if wanted == ROWS else None
            break
        found.next = page.end
        if found.looked_at >= _LOOKED:
            break
    else:
        found.next = None
    return found


def _rows(connection: Redis, which: Which, page: selection.Page) -> Sequence[WaitingCopy | FailedCopy]:
    return list(backlog.rows(connection, page)) if which is WAITING else list(failed.rows(page))
