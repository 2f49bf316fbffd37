"""A word that does something to many copies: what it would do, the question, the work page by page, and what is left.

Ctrl-C ends it between two pages and says what is left, and so does a Redis that goes away.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from redis import Redis
from redis.exceptions import RedisError

from relay.cockpit import bulk_actions
from relay.cockpit.bulk_actions import Batch, BulkAction, Tally
from relay.cockpit.bulk_preview import BulkPreview, copies
from relay.command import prompt
from relay.command.command_line import tell
from relay.command.exit_status import INTERRUPTED, NO, WELL
from relay.command.long_runs import Stop, progress
from relay.command.output import Output
from workers.queues import selection
from workers.queues.selection import Filter


def run(
    connection: Redis, out: Output, action: BulkAction, chosen: Filter, *, dry_run: bool = False, yes: bool = True
) -> int:
    """Do it, after the question that it has, and record it. Returns the exit status. Raises Misuse."""
    if not dry_run and action.question and not yes:
        prompt.require_somebody()
    tally = Tally()
    if dry_run or (action.question and not yes):
        preview = BulkPreview(connection, action.which)
        if not _look(connection, preview, action, chosen, tally.unread):
            return INTERRUPTED
        if dry_run or not preview.count:
            _show(preview, out, action)
            return tell_unread(tally.unread)
        if not prompt.ask_for(preview.count, action.question.format(copies(preview.count)), preview.lines()):
            return NO
        tally.total = preview.count
        work = bulk_actions.agreed(preview)
    else:
        tally.total = selection.size(connection, action.which, chosen)
        work = bulk_actions.at_once(connection, action, chosen, tally)
    try:
        return _work(out, action, work, tally)
    finally:
        bulk_actions.record(connection, action, tally)


def _look(connection: Redis, preview: BulkPreview, action: BulkAction, chosen: Filter, unread: dict[str, str]) -> bool:
    """Count what it is about. Returns whether it came to an end."""
    total = selection.size(connection, action.which, chosen)
    with Stop() as stop, progress("looking", total) as advance:
        for steps in stop.until(bulk_actions.look(connection, action, chosen, preview, unread)):
            advance(steps)
    if stop.is_asked:
        sys.stderr.write(f"Stopped after a look at {preview.looked_at} of {copies(total)}: nothing was changed.\n")
    return not stop.is_asked


def _show(preview: BulkPreview, out: Output, action: BulkAction) -> None:
    """Write what would be done."""
    if out.as_json:
        found: dict[str, object] = {f"would_{action.name.rpartition(' ')[2]}": preview.count, "bytes": preview.octets}
        if preview.count:
            found["reasons"] = [{"reason": why, "copies": n} for why, n in preview.common_reasons()]
            found["examples"] = [asdict(row) for row in preview.examples]
        out.object(found)
        return
    out.line(f"{copies(preview.count)} would be {action.done}, {preview.octets} bytes.")
    for line in preview.lines():
        out.line(line)


def _work(out: Output, action: BulkAction, work: Iterator[tuple[int, Batch]], tally: Tally) -> int:
    seen = 0
    stop = Stop()
    try:
        with stop, progress(action.done, tally.total) as advance:
            for steps in bulk_actions.carry_out(action, stop.until(work), tally):
                seen += steps
                advance(steps)
    except (RedisError, OSError, KeyboardInterrupt):
        sys.stderr.write(
            f"Broken off: {copies(tally.done)} {action.done} at least, {tally.total - seen} not come to.\n"
        )
        raise
    tally.left = tally.total - seen if stop.is_asked else 0
    _tell(out, action, tally)
    unread = tell_unread(tally.unread)
    return INTERRUPTED if tally.left else unread


def _tell(out: Output, action: BulkAction, tally: Tally) -> None:
    if out.as_json:
        found: dict[str, int] = {action.done: tally.done}
        if action.nothing is not None and not (tally.done or tally.skipped or tally.left):
            found = dict(action.nothing)
        out.object(found | {k: n for k, n in (("skipped", tally.skipped), ("left", tally.left)) if n})
        return
    out.line(action.said.format(copies(tally.done), action.done))
    if tally.skipped:
        out.line(action.skipped.format(copies(tally.skipped)))
    if tally.left:
        out.line(f"Stopped: {copies(tally.left)} not come to.")


def tell_unread(unread: Mapping[str, str]) -> int:
    """Tell of envelopes that could not be judged. Returns the exit status: that is not well."""
    if not unread:
        return WELL
    first = next(iter(unread))
    tell(
        f"{copies(len(unread))} cannot be looked into, and meet no condition about sender, recipients, client, size or "
        f"age; the first is {first}: {unread[first]}"
    )
    return NO
