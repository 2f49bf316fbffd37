"""`queue`: what waits for each backup, and what an operator can do about it."""

from __future__ import annotations

from dataclasses import asdict

from relay.cockpit import bulk_actions
from relay.cockpit.bulk_preview import copies
from relay.cockpit.conditions import Given, words
from relay.cockpit.formatting import address, moment, span
from relay.command import bulk, copy_details
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, CannotSay, Misuse, Trouble
from relay.command.filters import read, read_for_change
from relay.command.output import GREEN, YELLOW, Column, Output
from relay.config.loader import Settings
from relay.ledger import audit, overview
from relay.ledger.audit import Act
from relay.mail.text import count
from relay.spool import writer
from relay.topology import promotion
from relay.topology.roles import copied_now
from workers.queues import backlog
from workers.queues.selection import WAITING

_SUMMARY = [
    Column("destination", lambda r: r.destination),
    Column("pending", lambda r: str(r.pending), numbers=True),
    Column("oldest", lambda r: span(r.oldest_age_s, "") if r.pending else "-", numbers=True),
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
_UNCERTAIN = [
    Column("id", lambda r: r.id),
    Column("sender", lambda r: address(r.sender), detail=True),
    Column("recipients", lambda r: ", ".join(r.recipients), detail=True),
    Column("size", lambda r: str(r.size), numbers=True),
    Column("received", lambda r: moment(r.received_at)),
    Column("copied at", lambda r: moment(r.copied_at)),
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
            rows = overview.summary(connection)
    except CannotSay:
        _spool_summary(settings, out)
        raise
    found = _spool(settings)
    if out.as_json:
        # Each line is a destination, as ever; the spool, which is this host's and no destination's, stands in all.
        for row in rows:
            waiting = found.backlogs.get(row.destination, 0)
            out.object({**asdict(row), "spooled": waiting, "spool": asdict(found)})
        return WELL
    out.rows(rows, _SUMMARY, nothing="No destination has been used yet.")
    _spool_summary(settings, out)
    return WELL


def _spool(settings: Settings) -> writer.SpoolSummary:
    try:
        return writer.summary(settings.spool.dir)
    except OSError as error:
        raise Trouble(f"the spool cannot be read: {error}") from error


def _spool_summary(settings: Settings, out: Output) -> None:
    found = _spool(settings)
    if out.as_json:
        out.object({"spool": asdict(found)})
        return
    if found.messages:
        age = span(found.oldest_age_s)
        out.line(f"This host's spool: {count(found.messages, 'message')}, {found.bytes} bytes, the oldest {age} old.")
    for name, number in found.backlogs.items():
        out.line(f"  {count(number, 'of them waits', 'of them wait')} for {name} alone.")
    if found.corrupt:
        out.line(f"Set aside as unreadable: {count(found.corrupt, 'file')} in {settings.spool.dir}/corrupt.")
    if found.unfinished:
        where = f"{settings.spool.dir}/unfinished"
        out.line(f"Half written at a crash, never acknowledged: {count(found.unfinished, 'file')} in {where}.")


def listing(settings: Settings, out: Output, uncertain: bool, filters: Given) -> int:
    """Show the copies that wait, or the messages whose fate at the primary is unknown."""
    chosen = read(filters)
    if uncertain and not chosen.is_bare:
        raise Misuse("an uncertain message has no destination yet: --uncertain or a filter, not both")
    with ledger_of(settings) as connection:
        if uncertain:
            out.rows(backlog.uncertain(connection), _UNCERTAIN, nothing="Nothing is uncertain.")
            return WELL
        unread: dict[str, str] = {}
        pages = bulk_actions.pages(connection, WAITING, chosen, unread)
        rows = (row for page in pages for row in backlog.rows(connection, page))
        out.rows(rows, _WAITING, nothing="Nothing waits." if chosen.is_bare else "Nothing that waits is like that.")
    return bulk.tell_unread(unread)


def show(settings: Settings, out: Output, id: str) -> int:  # noqa: A002 - as the argument is called
    """Show a message that waits: each of its copies and what was said at each attempt."""
    with ledger_of(settings) as connection:
        details = backlog.show(connection, id)
    copy_details.show(out, details)
    return WELL


def drop(
    settings: Settings, out: Output, ids: tuple[str, ...], everything: bool, dry_run: bool, yes: bool, filters: Given
) -> int:
    """Forget copies that wait: those that meet every condition, after a question."""
    chosen = read_for_change(filters, ids, everything)
    with ledger_of(settings) as connection:
        action = bulk_actions.drop_waiting(connection, words(filters, ids))
        return bulk.run(connection, out, action, chosen, dry_run=dry_run, yes=yes)


def flush(
    settings: Settings, out: Output, ids: tuple[str, ...], everything: bool, dry_run: bool, yes: bool, filters: Given
) -> int:
    """Have what waits tried now: all, or what meets every condition. It loses nothing: there is no question."""
    chosen = read(filters, ids) if not everything else read_for_change(filters, ids, everything)
    with ledger_of(settings) as connection:
        if chosen.is_destination_alone and not dry_run:
            count = backlog.flush(connection, chosen.destination)
            act = Act("queue flush", after=f"{count} flushed", details={"filter": words(filters, ids)})
            audit.record(connection, act)
            out.say(f"Everything that waits is due now: {copies(count)}.", {"flushed": count})
            return WELL
        action = bulk_actions.flush(connection, settings, words(filters, ids))
        return bulk.run(connection, out, action, chosen, dry_run=dry_run, yes=yes)


def move(settings: Settings, out: Output, source: str, target: str) -> int:
    """Give what waits for one destination, and what failed there, to another."""
    if source == target:
        raise Misuse("the two destinations are the same")
    with ledger_of(settings) as connection:
        moved = backlog.move(connection, source, target, settings.workers.job_size)
    out.say(
        f"From {source} to {target}: {moved.pending} that waited, {moved.failed} that had failed; "
        f"{moved.covered} dropped, as {target} has copies for the same recipients; {moved.left} left.",
        asdict(moved),
    )
    return WELL


def forget(settings: Settings, out: Output, name: str) -> int:
    """Forget a destination that is no backup any more and that nothing is listed for."""
    if any(backup.name == name for backup in settings.copied):
        raise Trouble(f"{name} is a backup in these settings: take it out of them and restart first")
    waiting = _spool(settings).backlogs.get(name, 0)
    if waiting:
        raise Trouble(f"{count(waiting, 'copy', 'copies')} for {name} in this host's spool")
    with ledger_of(settings) as connection:
        topology = promotion.standing(connection, settings)
        if any(backup.name == name for backup in copied_now(settings, topology)):
            raise Trouble(f"{name} is a backup since {topology.primary if topology else 'another'} was promoted")
        try:
            backlog.forget(connection, name)
        except backlog.StillNeeded as error:
            raise Trouble(str(error)) from error
    out.say(f"{name} is forgotten.", {"forgotten": name})
    return WELL


def verify(settings: Settings, out: Output, dry_run: bool) -> int:
    """Compare the ledger with RQ, repair what disagrees, and show it. Says no when something did."""
    from workers.upkeep import reconciler  # noqa: PLC0415  (0.1 s, which the listings do not take)

    with ledger_of(settings) as connection:
        report = reconciler.verify(connection, settings, repair=not dry_run)
    out.rows(report.findings, _FINDINGS, nothing="Everything is as it should be.")
    if dry_run and report.findings and not out.as_json:
        out.line("Nothing was changed. The reconciler repairs these at its next sweeps; `queue verify` does it now.")
    return NO if report.disagreed else WELL
