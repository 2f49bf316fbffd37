"""What operators do to many copies at once: drop, try now, try again; page by page, so that it can be stopped.

What was shown and agreed to is what is worked on, copy by copy: one that has been delivered, claimed or tried again
since is left as it is, and counted. Whatever ends the work, what was done by then is in the audit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from redis import Redis

from relay.cockpit.bulk_preview import BulkPreview
from relay.config.model import Settings
from relay.ledger import archive, audit
from relay.ledger.audit import Act
from workers.queues import backlog, failed, selection
from workers.queues.selection import FAILED, WAITING, Filter, Page, Which

Batch = tuple[str, Mapping[str, float]]  # a destination, and its copies: id -> time in the list, as it was read


@dataclass(frozen=True, slots=True)
class BulkAction:
    """What is done: its words, and ``act``, which does it to a batch and returns to how many."""

    name: str  # "queue drop"
    done: str  # "dropped"
    which: Which
    act: Callable[[str, Mapping[str, float]], int]
    question: str = ""  # "Drop {} for good": asked unless --yes. What has none loses nothing
    said: str = "{} {}."  # of how many copies and ``done``
    skipped: str = "{} left as they are: delivered, being delivered or tried again meanwhile."
    finish: Callable[[str, int], object] = lambda _destination, _count: None  # behind the last batch
    nothing: Mapping[str, int] | None = None  # what --json says where no copy meets the conditions
    conditions: str = "--all"  # as on the command line, for the audit


@dataclass(slots=True)
class Tally:
    """What it has come to."""

    total: int = 0
    done: int = 0
    skipped: int = 0
    left: int = 0  # not come to
    by_destination: Counter[str] = field(default_factory=Counter)
    unread: dict[str, str] = field(default_factory=dict)


# What there is to do ------------------------------------------------------------------------------------------------


def drop_waiting(connection: Redis, conditions: str) -> BulkAction:
    """Forget copies that wait, for good."""
    return BulkAction(
        "queue drop", "dropped", WAITING,
        lambda name, copies: backlog.drop_copies(connection, name, copies),
        question="Drop {} that wait, for good",
        finish=lambda name, count: backlog.tidy(connection, name, count),
        nothing={"would_drop": 0, "bytes": 0},
        conditions=conditions,
    )  # fmt: skip


def flush(connection: Redis, settings: Settings, conditions: str) -> BulkAction:
    """Have copies that wait tried now."""
    return BulkAction(
        "queue flush", "flushed", WAITING,
        lambda name, copies: backlog.flush_copies(connection, name, list(copies), settings.workers.job_size),
        said="Due now: {}.",
        conditions=conditions,
    )  # fmt: skip


def drop_failed(connection: Redis, conditions: str) -> BulkAction:
    """Forget copies that failed, for good."""
    return BulkAction(
        "failed drop", "dropped", FAILED,
        lambda name, copies: failed.drop_copies(connection, name, copies),
        question="Drop {} that failed, for good",
        conditions=conditions,
    )  # fmt: skip


def retry(connection: Redis, settings: Settings, conditions: str) -> BulkAction:
    """Have copies that failed tried again."""
    folder = archive.folder(settings.state_dir)
    return BulkAction(
        "failed retry", "retried", FAILED,
        lambda name, copies: failed.retry_copies(connection, name, list(copies), folder, settings.workers.job_size),
        said="{} will be tried again now.",
        conditions=conditions,
    )  # fmt: skip


# Looking, and doing -------------------------------------------------------------------------------------------------


def look(
    connection: Redis, action: BulkAction, chosen: Filter, preview: BulkPreview, unread: dict[str, str]
) -> Iterator[int]:
    """Count what an action is about, into the preview; yields how many copies each page has looked at."""
    for page in pages(connection, action.which, chosen, unread):
        preview.add(page)
        yield page.looked_at


def agreed(preview: BulkPreview) -> Iterator[tuple[int, Batch]]:
    """Yield what was looked at before: the steps, and the batch."""
    return ((len(found), (name, found)) for name, found in preview.batches())


def at_once(connection: Redis, action: BulkAction, chosen: Filter, tally: Tally) -> Iterator[tuple[int, Batch]]:
    """Yield what meets the conditions as it is found: how many copies were looked at, and those that pass."""
    for page in pages(connection, action.which, chosen, tally.unread, whole=False):
        yield page.looked_at, (page.target.name, {copy.id: copy.score for copy in page.found})


def carry_out(action: BulkAction, work: Iterable[tuple[int, Batch]], tally: Tally) -> Iterator[int]:
    """Do it batch by batch, and what is left behind the last; yields the steps of each.

    Who stops in between has done so much, and ``record`` tells.
    """
    for steps, (destination, found) in work:
        count = action.act(destination, found) if found else 0
        tally.done += count
        tally.skipped += len(found) - count
        tally.by_destination[destination] += count
        yield steps
    for destination, count in tally.by_destination.items():
        action.finish(destination, count)


def record(connection: Redis, action: BulkAction, tally: Tally) -> None:
    """Record what was done, if anything was."""
    if tally.done or tally.skipped:
        audit.record(connection, Act(action.name, after=_words(action, tally), details={"filter": action.conditions}))


def _words(action: BulkAction, tally: Tally) -> str:
    parts = [f"{count} {action.done} of {name}" for name, count in tally.by_destination.items() if count]
    parts += [f"{tally.skipped} left as they were"] * bool(tally.skipped)
    parts += [f"{tally.left} not come to"] * bool(tally.left)
    return ", ".join(parts)


def pages(
    connection: Redis, which: Which, chosen: Filter, unread: dict[str, str], *, whole: bool = True
) -> Iterator[Page]:
    """Yield what meets the conditions; notes whose envelopes could not be read, where the conditions ask for them."""
    for page in selection.select(connection, which, chosen, whole=whole):
        if chosen.asks_envelope(which):
            unread |= page.unread
        yield page
