"""The copies that wait and those that failed, as listings read them, and what an operator does to those with an id."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from redis import Redis

from workers.queues import backlog, failed, selection
from workers.queues.backlog import WaitingCopy
from workers.queues.failed import FailedCopy
from workers.queues.selection import FAILED, WAITING, Filter, Which

EVERY = object()
Ids = Collection[str] | object


def waiting(connection: Redis, destination: str | None = None) -> Iterator[WaitingCopy]:
    """Yield the rows of what waits, the oldest first. Raises UnknownDestination."""
    pages = selection.select(connection, WAITING, Filter(destination=destination), whole=True)
    for page in pages:
        yield from backlog.rows(connection, page)


def failures(connection: Redis, destination: str | None = None) -> Iterator[FailedCopy]:
    """Yield the rows of what failed, the oldest failure first. Raises UnknownDestination."""
    pages = selection.select(connection, FAILED, Filter(destination=destination), whole=True)
    for page in pages:
        yield from failed.rows(page)


def _chosen(connection: Redis, which: Which, ids: Ids, destination: str | None) -> Iterator[selection.Page]:
    assert ids, "no ids would be all"
    return selection.select(connection, which, Filter(ids=() if ids is EVERY else ids, destination=destination))


def retry(connection: Redis, ids: Ids = EVERY, destination: str | None = None, **how: Any) -> int:
    """Have failed copies tried again; returns how many. ``how`` is what `failed.retry_copies` takes besides."""
    return sum(
        failed.retry_copies(connection, page.target.name, [copy.id for copy in page.found], **how)
        for page in _chosen(connection, FAILED, ids, destination)
    )


def drop_failed(connection: Redis, ids: Ids, destination: str | None = None) -> int:
    """Forget failed copies; returns how many."""
    return sum(
        failed.drop_copies(connection, page.target.name, {copy.id: copy.score for copy in page.found})
        for page in _chosen(connection, FAILED, ids, destination)
    )


def drop_waiting(connection: Redis, ids: Ids, destination: str) -> int:
    """Forget copies that wait, with their jobs; returns how many."""
    count = 0
    for page in _chosen(connection, WAITING, ids, destination):
        count += backlog.drop_copies(connection, destination, {copy.id: copy.score for copy in page.found})
    backlog.tidy(connection, destination, count)
    return count
