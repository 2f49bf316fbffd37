"""`ready`: whether a backup is ready to be the primary, by 17 criteria, and why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from relay.cockpit import extensions, mailboxes, moves
from relay.cockpit.evidence_from_redis import UnknownBackup, gather
from relay.cockpit.finding import Result
from relay.cockpit.mailboxes import MailboxVerdict
from relay.cockpit.readiness import Judged, Verdict, judge
from relay.cockpit.roles_now import UnknownRoute, by_default, on_route
from relay.command.connection import ledger_of
from relay.command.exit_status import CANNOT_SAY, NO, WELL, CannotSay, Misuse, Trouble
from relay.command.output import GREEN, RED, YELLOW, Column, Output
from relay.config.loader import Settings
from relay.ledger.flow import total

_COLOURS = {Result.PASS: GREEN, Result.WARN: YELLOW, Result.FAIL: RED, Result.UNKNOWN: YELLOW}
_CRITERIA = [
    Column("", lambda j: str(j.criterion.number), numbers=True),
    Column("result", lambda j: j.finding.result.value, colour=lambda j: _COLOURS[j.finding.result]),
    Column("criterion", lambda j: j.criterion.name),
    Column("found", lambda j: j.finding.text, detail=True),
]
_OF_MAILBOX = [
    Column("result", lambda j: j.finding.result.value, colour=lambda j: _COLOURS[j.finding.result]),
    Column("criterion", lambda j: j.criterion),
    Column("found", lambda j: j.finding.text, detail=True),
]
_EXPLAINED = [
    *_CRITERIA,
    Column("rule:", lambda j: j.criterion.rule, detail=True),
    Column("settings:", lambda j: ", ".join(j.criterion.settings) or "none", detail=True),
]
EXTENSIONS = [
    Column("extension", lambda r: r.extension),
    Column("old", lambda r: r.old),
    Column("new", lambda r: r.new),
    Column("used by mail seen", lambda r: r.used or "-", detail=True),
]


def show(
    settings: Settings, out: Output, name: str | None, check: bool, moved: bool, route: str, nagios: bool, explain: bool
) -> int:
    """Give the verdict on one backup, or on each; on a mailbox, or all that have moved. Says no unless ready."""
    try:
        if moved or "@" in (name or ""):
            return _mailboxes(settings, out, name or "", check=check, moved=moved, nagios=nagios)
        if check:
            raise Misuse("--check is about one mailbox: smtp-dup ready user@example.com --check")
        return _backups(settings, out, name, route, nagios=nagios, explain=explain)
    except CannotSay as error:
        if nagios:
            out.line(f"SMTP-DUP UNKNOWN - {error}")
        raise


def _backups(settings: Settings, out: Output, name: str | None, route: str, *, nagios: bool, explain: bool) -> int:
    try:
        with ledger_of(settings) as connection:
            old, others, answering = (
                on_route(connection, settings, route) if route else ("", by_default(connection, settings)[1], ())
            )
            if route and name and name not in others:
                raise Misuse(f"{name} gets no copies on {route}; {', '.join(others) or 'nobody'} does")
            evidence = [
                gather(connection, settings, each, old, answering, route) for each in ([name] if name else others)
            ]
    except (UnknownBackup, UnknownRoute) as error:
        raise Misuse(str(error)) from error
    if not evidence:
        raise Trouble(f"nobody gets copies on {route}" if route else "there is no backup")
    verdicts = [judge(known) for known in evidence]
    if nagios:
        return _nagios(verdicts, out)
    for known, verdict in zip(evidence, verdicts, strict=True):
        rows = extensions.compare(known.old_greeting, known.new_greeting, total(known.hours))
        if out.as_json:
            out.object({**verdict.as_object(), "ehlo": [asdict(row) for row in rows]})
            continue
        if known is not evidence[0]:
            out.line("")
        _show(verdict, rows, out, explain=explain)
    return WELL if all(verdict.is_ready for verdict in verdicts) else NO


def _mailboxes(settings: Settings, out: Output, address: str, *, check: bool, moved: bool, nagios: bool) -> int:
    if moved and check:
        raise Misuse("--check is about one mailbox: not with --moved")
    if moved and address:
        raise Misuse("--moved is about all that have moved: without a name")
    asked = moves.wish(address, fold=settings.routes.fold_local) if address else None
    if isinstance(asked, moves.Kept):
        raise Misuse(f"{asked.address}: {asked.why}")
    with ledger_of(settings) as connection:
        found = (
            mailboxes.of_address(connection, settings, asked, check=check)
            if asked
            else mailboxes.of_moved(connection, settings)
        )
    if nagios:
        is_well = all(verdict.is_ready for verdict in found)
        text = "; ".join(f"{v.subject} {v.summary}" for v in found) or "nobody has moved"
        out.line(f"SMTP-DUP {'OK' if is_well else 'CRITICAL'} - {text}".replace("|", "/"))
        return WELL if is_well else 2
    return _tell_mailboxes(out, found, address)


def _tell_mailboxes(out: Output, found: Sequence[MailboxVerdict], address: str) -> int:
    if not found:
        raise Trouble(f"{address}: no other server gets copies of its mail" if address else "nobody has moved")
    for number, verdict in enumerate(found):
        if out.as_json:
            out.object(verdict.as_object())
            continue
        if number:
            out.line("")
        out.line(f"{verdict.subject}: {verdict.summary} (else {verdict.former} answers)")
        out.line("")
        out.rows(verdict.judged, _OF_MAILBOX, nothing="")
    return WELL if all(verdict.is_ready for verdict in found) else NO


def _show(verdict: Verdict, rows: Sequence[extensions.Extension], out: Output, *, explain: bool) -> None:
    out.line(f"{verdict.name}: {verdict.summary} (the primary is {verdict.old or 'not known'})")
    out.line("")
    out.rows(verdict.judged, _EXPLAINED if explain else _CRITERIA, nothing="")
    if rows:
        out.line("")
        out.rows(rows, EXTENSIONS, nothing="")


def _nagios(verdicts: Sequence[Verdict], out: Output) -> int:
    """Write one line, and return a plug-in's status: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN."""
    worst = [v.having(result) for result in (Result.FAIL, Result.UNKNOWN, Result.WARN) for v in verdicts]
    first: list[Judged] = next((judged for judged in worst if judged), [])
    status, word = {
        None: (WELL, "OK"),
        Result.WARN: (1, "WARNING"),
        Result.FAIL: (2, "CRITICAL"),
        Result.UNKNOWN: (CANNOT_SAY, "UNKNOWN"),
    }[first[0].finding.result if first else None]
    text = "; ".join(f"{v.name} {v.summary}" for v in verdicts)
    why = f": {first[0].criterion.name}: {first[0].finding.text}" if first else ""
    # A bar begins what a plug-in says of its performance.
    out.line(f"SMTP-DUP {word} - {text}{why}".replace("|", "/"))
    return status
