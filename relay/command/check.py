"""`check`: shows every setting with its origin, and probes Redis and each server that the settings name."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

from relay import maillog
from relay.command.connection import ledger_of
from relay.command.exit_status import CANNOT_SAY, NO, WELL, CannotSay, Trouble
from relay.command.output import GREEN, RED, Column, Output, as_object
from relay.config.loader import Settings, describe
from relay.ledger import changes
from relay.monitoring.probes import ProbeResult, probe_all
from relay.monitoring.topology import about_topology
from relay.redisio import embedded
from relay.topology import decisions
from relay.topology.roles import backups_now

_SETTINGS = [
    Column("option", lambda r: r.key),
    Column("value", lambda r: r.value or "-"),
    Column("from", lambda r: r.origin),
]
_FINDINGS = [
    Column("", lambda f: "ok" if f.ok else "TROUBLE", colour=lambda f: GREEN if f.ok else RED),
    Column("what", lambda f: f.subject),
    Column("found", lambda f: f.text, detail=True),
]


def check(settings: Settings, out: Output) -> int:
    """Show the settings and probe what they name. Says no when a probe finds trouble.

    Where the only trouble is that Redis does not answer, nothing can be said of the copies.
    """
    maillog.configure("warning")  # the findings are the output
    shown = describe(settings)
    if not settings.redis.url and embedded.socket_path(settings.state_dir).exists():
        # `up` runs with this state folder: its Redis is the one that counts.
        settings = replace(settings, redis=settings.redis.at(embedded.url(settings.state_dir)))
    if out.as_json:
        for row in shown:
            out.object({"kind": "setting", **row._asdict()})
    else:
        out.rows(shown, _SETTINGS, nothing="")
    findings = asyncio.run(probe_all(settings))
    answers = True
    try:
        findings += _left_behind(settings)
        findings += _roles(settings)
    except CannotSay:  # the probe of Redis says so
        answers = False
    except Trouble:
        pass  # a key file: its probe says so
    if out.as_json:
        for finding in findings:
            out.object({"kind": "finding", **as_object(finding)})
    else:
        out.line("")
        out.rows(findings, _FINDINGS, nothing="")
    troubles = [finding for finding in findings if not finding.ok]
    if answers or any(finding.subject != "redis" for finding in troubles):
        return NO if troubles else WELL
    return CANNOT_SAY


def _left_behind(settings: Settings) -> Iterator[ProbeResult]:
    """Say which destinations are no backup any more but have copies left: they are served until they have none."""
    if not settings.redis.url:
        return
    with ledger_of(settings) as connection:
        topology, _ = decisions.topology(connection)
        rows = changes.summary(connection)
    configured = {backup.name for backup in (*settings.backups, *backups_now(settings, topology))}
    for row in rows:
        if row.destination not in configured and (row.pending or row.failed):
            left = f"no backup any more, but {row.pending} copies wait and {row.failed} have failed"
            yield ProbeResult(
                f"destination {row.destination}", True, f"{left}; see queue list, queue move, failed list"
            )


def _roles(settings: Settings) -> Iterator[ProbeResult]:
    """Say whether the settings name the primary that was promoted, and which relay process does not follow."""
    if not settings.redis.url:
        return
    with ledger_of(settings) as connection:
        seen = decisions.view(connection)
    yield from about_topology(settings, seen)
