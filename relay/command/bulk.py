"""A word that does something to many copies: what it would do, the question, the work page by page, and what is left.

What was shown and agreed to is what is worked on, copy by copy: one that has been delivered, claimed or tried again
since is left as it is, and counted. Ctrl-C ends it between two pages and says what is left, and so does a Redis that
goes away.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from redis import Redis
from redis.exceptions import RedisError

from relay.command import prompt
from relay.command.exit_status import INTERRUPTED, NO, WELL
from relay.command.long_runs import Stop, progress
from relay.command.output import Output
from relay.command.survey import Survey, copies
from relay.ledger import audit
from relay.ledger.audit import Act
from relay.mail.text import printable
from workers.queues import selection
from workers.queues.selection import Filter, Page, Which

Batch = tuple[str, Mapping[str, float]]  # a destination, and its copies: id -> time in the list, as it was read


@dataclass(frozen=True, slots=True)
class Deed:
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


def run(connection: Redis, out: Output, deed: Deed, chosen: Filter, *, dry_run: bool = False, yes: bool = True) -> int:
    """Do it, after the question that it has, and record it. Returns the exit status. Raises Misuse."""
    if not dry_run and deed.question and not yes:
        prompt.require_somebody()
    tally = Tally()
    if dry_run or (deed.question and not yes):
        survey = Survey(connection, deed.which)
        if not _look(connection, survey, deed, chosen, tally.unread):
            return INTERRUPTED
        if dry_run or not survey.count:
            survey.show(out, deed.name.rpartition(" ")[2], deed.done)
            return tell_unread(tally.unread)
        if not prompt.ask_for(survey.count, deed.question.format(copies(survey.count)), survey.lines()):
            return NO
        tally.total = survey.count
        work: Iterator[tuple[int, Batch]] = ((len(found), (name, found)) for name, found in survey.batches())
    else:
        tally.total = selection.size(connection, deed.which, chosen)
        work = _pages(connection, deed, chosen, tally)
    try:
        return _work(out, deed, work, tally)
    finally:
        if tally.done or tally.skipped:
            audit.record(connection, Act(deed.name, after=_words(deed, tally), details={"filter": deed.conditions}))


def _look(connection: Redis, survey: Survey, deed: Deed, chosen: Filter, unread: dict[str, str]) -> bool:
    """Count what it is about. Returns whether it came to an end."""
    total = selection.size(connection, deed.which, chosen)
    with Stop() as stop, progress("looking", total) as advance:
        pages = selection.select(connection, deed.which, chosen, whole=True)
        for page in stop.until(judged(pages, chosen.asks_envelope(deed.which), unread)):
            survey.add(page)
            advance(page.looked_at)
    if stop.is_asked:
        sys.stderr.write(f"Stopped after a look at {survey.looked_at} of {copies(total)}: nothing was changed.\n")
    return not stop.is_asked


def _pages(connection: Redis, deed: Deed, chosen: Filter, tally: Tally) -> Iterator[tuple[int, Batch]]:
    """Yield how many copies were looked at, and those that pass."""
    pages = selection.select(connection, deed.which, chosen)
    for page in judged(pages, chosen.asks_envelope(deed.which), tally.unread):
        yield page.looked_at, (page.target.name, {copy.id: copy.score for copy in page.found})


def _work(out: Output, deed: Deed, work: Iterator[tuple[int, Batch]], tally: Tally) -> int:
    seen = 0
    stop = Stop()
    try:
        with stop, progress(deed.done, tally.total) as advance:
            for steps, (destination, found) in stop.until(work):
                count = deed.act(destination, found) if found else 0
                tally.done += count
                tally.skipped += len(found) - count
                tally.by_destination[destination] += count
                seen += steps
                advance(steps)
            for destination, count in tally.by_destination.items():
                deed.finish(destination, count)
    except (RedisError, OSError, KeyboardInterrupt):
        sys.stderr.write(f"Broken off: {copies(tally.done)} {deed.done} at least, {tally.total - seen} not come to.\n")
        raise
    tally.left = tally.total - seen if stop.is_asked else 0
    _tell(out, deed, tally)
    unread = tell_unread(tally.unread)
    return INTERRUPTED if tally.left else unread


def _tell(out: Output, deed: Deed, tally: Tally) -> None:
    if out.as_json:
        found: dict[str, int] = {deed.done: tally.done}
        if deed.nothing is not None and not (tally.done or tally.skipped or tally.left):
            found = dict(deed.nothing)
        out.object(found | {k: n for k, n in (("skipped", tally.skipped), ("left", tally.left)) if n})
        return
    out.line(deed.said.format(copies(tally.done), deed.done))
    if tally.skipped:
        out.line(deed.skipped.format(copies(tally.skipped)))
    if tally.left:
        out.line(f"Stopped: {copies(tally.left)} not come to.")


def _words(deed: Deed, tally: Tally) -> str:
    parts = [f"{count} {deed.done} of {name}" for name, count in tally.by_destination.items() if count]
    parts += [f"{tally.skipped} left as they were"] * bool(tally.skipped) + [f"{tally.left} not come to"] * bool(
        tally.left
    )
    return ", ".join(parts)


def judged(pages: Iterable[Page], asks_envelope: bool, unread: dict[str, str]) -> Iterator[Page]:
    """Pass pages on; notes whose envelopes could not be read, where the conditions asked for them."""
    for page in pages:
        if asks_envelope:
            unread |= page.unread
        yield page


def tell_unread(unread: Mapping[str, str]) -> int:
    """Tell of envelopes that could not be judged. Returns the exit status: that is not well."""
    if not unread:
        return WELL
    first = next(iter(unread))
    sys.stderr.write(
        f"smtp-dup: {copies(len(unread))} cannot be looked into, and meet no condition about sender, recipients, "
        f"client, size or age; the first is {first}: {printable(unread[first])}\n"
    )
    return NO
