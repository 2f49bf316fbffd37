"""`queue`: what waits for each backup, and what an operator can do about it."""

from __future__ import annotations

from relay import ledger, spool
from relay.command.connection import ledger_of
from relay.command.exit_status import WELL, CannotSay, Misuse, Trouble
from relay.command.output import GREEN, YELLOW, Column, Output, address, as_object, moment, span
from relay.settings import Settings
from workers import backlog, reconcile

_SUMMARY = [
    Column("destination", lambda r: r.destination),
    Column("pending", lambda r: str(r.pending), numbers=True),
    Column("oldest", lambda r: span(r.oldest_age_s) if r.pending else "-", numbers=True),
    Column("retrying", lambda r: str(r.retrying), numbers=True),
    Column("failed", lambda r: str(r.failed), numbers=True),
    Column("delivered", lambda r: str(r.delivered), numbers=True),
    Column("state", lambda r: f"{r.state}: {r.reason}" if r.reason else r.state, detail=True,
           colour=lambda r: GREEN if r.state == "ok" else YELLOW),
]  # fmt: skip
_WAITING = [
    Column("id", lambda r: r.id),
    Column("destination", lambda r: r.destination),
    Column("sender", lambda r: address(r.sender), detail=True),
    Column("recipients", lambda r: ", ".join(r.recipients), detail=True),
    Column("size", lambda r: str(r.size), numbers=True),
    Column("received", lambda r: moment(r.received_at)),
    Column("tries", lambda r: str(r.attempts), numbers=True),
    Column("next try", lambda r: moment(r.next_attempt_at)),
    Column("last reply", lambda r: r.last_reply or "-", detail=True),
]
_FINDINGS = [
    Column("finding", lambda f: f.finding),
    Column("id", lambda f: f.id or "-"),
    Column("destination", lambda f: f.destination or "-"),
    Column("action", lambda f: f.action, detail=True),
]


def summary(settings: Settings, out: Output) -> int:
    """Show one line for each destination, and this host's spool, also while Redis is away."""
    try:
        with ledger_of(settings) as connection:
            rows = ledger.summary(connection)
    except CannotSay:
        _spool_summary(settings, out)
        raise
    found = _spool(settings)
    if out.as_json:
        # Each line is a destination, as ever; the spool, which is this host's and no destination's, stands in all.
        for row in rows:
            waiting = found.backlogs.get(row.destination, 0)
            out.object({**as_object(row), "spooled": waiting, "spool": as_object(found)})
        return WELL
    out.rows(rows, _SUMMARY, nothing="No destination has been used yet.")
    _spool_summary(settings, out)
    return WELL


def _spool(settings: Settings) -> spool.Summary:
    try:
        return spool.summary(settings.spool.dir)
    except OSError as error:
        raise Trouble(f"the spool cannot be read: {error}") from error


def _spool_summary(settings: Settings, out: Output) -> None:
    found = _spool(settings)
    if out.as_json:
        out.object({"spool": as_object(found)})
        return
    if found.messages:
        age = span(found.oldest_age_s)
        out.line(f"This host's spool: {found.messages} messages, {found.bytes} bytes, the oldest {age} old.")
    for name, count in found.backlogs.items():
        out.line(f"  {count} of them wait for {name} alone.")
    if found.corrupt:
        out.line(f"Set aside as unreadable: {found.corrupt} files in {settings.spool.dir}/corrupt.")
    if found.unfinished:
        where = f"{settings.spool.dir}/unfinished"
        out.line(f"Half written at a crash, never acknowledged: {found.unfinished} files in {where}.")


def listing(settings: Settings, out: Output, destination: str | None) -> int:
    """Show the copies that wait."""
    with ledger_of(settings) as connection:
        out.rows(backlog.listing(connection, destination), _WAITING, nothing="Nothing waits.")
    return WELL


def flush(settings: Settings, out: Output, destination: str | None) -> int:
    """Have all that waits tried now."""
    with ledger_of(settings) as connection:
        count = backlog.flush(connection, destination)
    out.count("flushed", count, "Everything that waits is due now: {}.")
    return WELL


def move(settings: Settings, out: Output, source: str, target: str) -> int:
    """Give what waits for one destination, and what failed there, to another."""
    if source == target:
        raise Misuse("the two destinations are the same")
    with ledger_of(settings) as connection:
        moved = backlog.move(connection, source, target)
    if out.as_json:
        out.object(as_object(moved))
    else:
        out.line(
            f"From {source} to {target}: {moved.pending} that waited, {moved.failed} that had failed; "
            f"{moved.covered} dropped, as {target} has copies for the same recipients; {moved.left} left."
        )
    return WELL


def verify(settings: Settings, out: Output, dry_run: bool) -> int:
    """Compare the ledger with RQ, repair what disagrees, and show it."""
    with ledger_of(settings) as connection:
        report = reconcile.verify(connection, settings, repair=not dry_run)
    out.rows(report.findings, _FINDINGS, nothing="Everything is as it should be.")
    return WELL
