"""`failed`: the copies that a backup refused or that were given up, and what an operator can do about them.

Message content is written by ``export`` only, see export.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import tee

from redis import Redis

from relay.batches import batched
from relay.cockpit import bulk_actions
from relay.cockpit.conditions import Given, words
from relay.cockpit.formatting import address, moment
from relay.command import bulk, copy_details
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL
from relay.command.filters import read, read_for_change
from relay.command.output import GREEN, RED, YELLOW, Column, Output
from relay.config.loader import Settings
from workers.queues import failed
from workers.queues.selection import FAILED

_FAILED = [
    Column("id", lambda r: r.id),
    Column("destination", lambda r: r.destination),
    Column("sender", lambda r: address(r.sender), detail=True),
    Column("recipients", lambda r: ", ".join(r.recipients), detail=True),
    Column("size", lambda r: str(r.size), numbers=True),
    Column("tries", lambda r: str(r.attempts), numbers=True),
    Column("failed", lambda r: moment(r.failed_at)),
    Column("reply", lambda r: r.reply, detail=True),
]


def listing(settings: Settings, out: Output, filters: Given) -> int:
    """Show the failed copies."""
    chosen = read(filters)
    with ledger_of(settings) as connection:
        unread: dict[str, str] = {}
        rows = (row for page in bulk_actions.pages(connection, FAILED, chosen, unread) for row in failed.rows(page))
        nothing = "Nothing has failed." if chosen.is_bare else "Nothing that failed is like that."
        out.rows(rows, _FAILED, nothing=nothing)
    return bulk.tell_unread(unread)


def show(settings: Settings, out: Output, id: str) -> int:  # noqa: A002 - as the argument is called
    """Show a failed message: each of its failed copies and what was said at each attempt."""
    with ledger_of(settings) as connection:
        details = failed.show(connection, id)
    copy_details.show(out, details)
    return WELL


def retry(
    settings: Settings,
    out: Output,
    ids: tuple[str, ...],
    everything: bool,
    wait: bool,
    dry_run: bool,
    yes: bool,
    filters: Given,
) -> int:
    """Have failed copies tried again; with ``wait`` say what became of each, and no unless all are delivered.

    It loses nothing: there is no question.
    """
    chosen = read_for_change(filters, ids, everything)
    before: dict[tuple[str, str], int] = {}
    with ledger_of(settings) as connection:
        again = bulk_actions.retry(connection, settings, words(filters, ids))

        def act(name: str, copies: Mapping[str, float]) -> int:
            before.update(failed.attempts_of(connection, name, list(copies)))
            return again.act(name, copies)

        action = replace(again, act=act) if wait else again
        status = bulk.run(connection, out, action, chosen, dry_run=dry_run, yes=yes)
        if not wait or not before:
            return status
        sys.stdout.flush()
        shown, found = tee(_outcomes(connection, before))
        out.rows(shown, _OUTCOMES, nothing="")
    return status or (WELL if all(row["outcome"] == "delivered" for row in found) else NO)


_COLOURS = {"delivered": GREEN, "failed": RED}
_OUTCOMES = [
    Column("id", lambda r: r["id"]),
    Column("destination", lambda r: r["destination"]),
    Column("outcome", lambda r: r["outcome"], colour=lambda r: _COLOURS.get(r["outcome"], YELLOW)),
    Column("reply", lambda r: r["reply"] or "-", detail=True),
]
_WAIT_SECONDS = 60.0
_LOOK_EVERY = 0.2
_BATCH = 500  # copies asked about at once


def _outcomes(connection: Redis, before: dict[tuple[str, str], int]) -> Iterator[dict[str, str]]:
    """Yield what became of copies, each once its attempt has ended, or when the patience has."""
    end = time.monotonic() + _WAIT_SECONDS
    rest = dict(before)
    while rest:
        for batch in batched(list(rest), _BATCH):
            for key, (outcome, reply) in zip(batch, failed.fates(connection, batch, rest), strict=True):
                is_over = time.monotonic() > end
                if outcome or is_over:
                    del rest[key]
                    what = outcome or "not tried yet"
                    yield {"id": key[1], "destination": key[0], "outcome": what, "reply": reply}
        if rest:
            time.sleep(_LOOK_EVERY)


def drop(
    settings: Settings, out: Output, ids: tuple[str, ...], everything: bool, dry_run: bool, yes: bool, filters: Given
) -> int:
    """Forget failed copies: those that meet every condition, after a question."""
    chosen = read_for_change(filters, ids, everything)
    with ledger_of(settings) as connection:
        action = bulk_actions.drop_failed(connection, words(filters, ids))
        return bulk.run(connection, out, action, chosen, dry_run=dry_run, yes=yes)
