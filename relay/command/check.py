"""`check`: shows every setting with its origin, and probes Redis and each server that the settings name."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from redis import Redis

from relay import log_lines
from relay.cockpit import evidence_from_redis, extensions, roles_now
from relay.cockpit.extensions import Extension
from relay.command.connection import ledger_of
from relay.command.exit_status import CANNOT_SAY, NO, WELL, CannotSay, Trouble
from relay.command.output import GREEN, RED, Column, Output
from relay.command.ready import EXTENSIONS
from relay.config.differences import Difference, differences
from relay.config.loader import Settings, SettingsError
from relay.config.model import StatusSettings
from relay.config.shown import Shown, describe
from relay.daemon import running
from relay.ledger import changes, flow, greetings, overview
from relay.mail.text import count
from relay.monitoring.findings import spool as spool_findings
from relay.monitoring.probe_result import ProbeResult
from relay.monitoring.probes import probe_all
from relay.monitoring.routes import refused_tables
from relay.monitoring.topology import about_topology
from relay.page import hosts, users
from relay.redisio import embedded
from relay.topology import decisions, promotion
from relay.topology.roles import copied_now

_Compared = list[tuple[str, list[Extension]]]  # backups, and their EHLO beside the primary's
_SETTINGS = [
    Column("option", lambda r: r.key),
    Column("value", lambda r: r.value or "-"),
    Column("from", lambda r: r.origin),
]
_DRIFT = [
    Column("option", lambda r: r.key),
    Column("what runs has", lambda r: r.before or "-", detail=True),
    Column("these are", lambda r: r.after or "-", detail=True),
    Column("takes", lambda r: "a restart" if r.takes_restart else "smtp-dup reload"),
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
    log_lines.configure("warning")  # the findings are the output
    _tell_settings(describe(settings), _drift(settings), out)
    if not settings.redis.url and embedded.socket_path(settings.state_dir).exists():
        # `up` runs with this state folder: its Redis is the one that counts.
        settings = replace(settings, redis=settings.redis.at(embedded.url(settings.state_dir)))
    probed, (told, said, answers) = asyncio.run(_look(settings))
    refused = list(refused_tables(settings)) if running.read(settings.state_dir) else []
    subjects = {finding.subject for finding in refused}  # whose file can be read, but what runs has not taken it
    probed = [finding for finding in probed if finding.subject not in subjects]
    findings = [*_page(settings.status), *_spool(settings), *probed, *refused, *told]
    if out.as_json:
        for finding in findings:
            out.object({"kind": "finding", **asdict(finding)})
    else:
        out.line("")
        out.rows(findings, _FINDINGS, nothing="")
    _show_extensions(said, out)
    troubles = [finding for finding in findings if not finding.ok]
    if answers or any(finding.subject != "redis" for finding in troubles):
        return NO if troubles else WELL
    return CANNOT_SAY


def _spool(settings: Settings) -> list[ProbeResult]:
    """Say what keeps this host's spool from taking files, where we may do what its owner may."""
    folder = settings.spool.dir
    if folder is None:
        return []
    try:
        place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if os.geteuid() not in {0, place.stat().st_uid}:
            return []
    except OSError:
        return []
    return [finding for finding in spool_findings(settings, writes=False) if not finding.ok]


async def _look(settings: Settings) -> tuple[list[ProbeResult], tuple[list[ProbeResult], _Compared, bool]]:
    """Probe what the settings name and ask the ledger at once: a Redis that hangs is waited for by both."""
    return await asyncio.gather(probe_all(settings), asyncio.to_thread(_ledger, settings))


def _ledger(settings: Settings) -> tuple[list[ProbeResult], _Compared, bool]:
    """Return what the ledger tells, up to where it stops answering, and whether it answered to the end."""
    findings: list[ProbeResult] = []
    said: _Compared = []
    if not settings.redis.url:
        return findings, said, True
    try:
        with ledger_of(settings) as connection:
            findings += _left_behind(connection, settings)
            findings += about_topology(settings, decisions.view(connection))
            said += _extensions(connection, settings)
    except CannotSay:  # the probe of Redis says so
        return findings, said, False
    except Trouble:
        pass  # a key file: its probe says so
    return findings, said, True


def _page(status: StatusSettings) -> Iterator[ProbeResult]:
    """Say who may see the page, where that is not just this host."""
    try:
        known = users.check(status)
    except OSError as error:
        subject, _, text = str(error).partition(": ")
        yield ProbeResult(subject, False, text)
        return
    if known is not None:
        yield ProbeResult("page", True, f"{hosts.address(status)}; {count(known, 'user')} may log in")
    elif status.listen and hosts.is_off(status):
        yield ProbeResult("page", True, "off: others can reach it, and status.users_file names nobody")


def _show_extensions(said: _Compared, out: Output) -> None:
    for name, compared in said:
        if out.as_json:
            for extension in compared:
                out.object({"kind": "extension", "destination": name, **asdict(extension)})
        else:
            out.line("")
            out.line(f"EHLO of the primary (old) and of {name} (new), as mail has met them:")
            out.rows(compared, EXTENSIONS, nothing="")


def _tell_settings(shown: Sequence[Shown], drift: Sequence[Difference], out: Output) -> None:
    if out.as_json:
        for row in shown:
            out.object({"kind": "setting", **row._asdict()})
        for change in drift:
            out.object({"kind": "drift", **change._asdict()})
        return
    out.rows(shown, _SETTINGS, nothing="")
    if drift:
        out.line("")
        out.rows(drift, _DRIFT, nothing="")


def _drift(settings: Settings) -> list[Difference]:
    """Return where a smtp-dup that runs with this state folder has other settings than these."""
    found = running.read(settings.state_dir)
    if found is None:
        return []
    try:
        return differences(found.settings(os.environ, require_primary=False), settings)
    except SettingsError:  # a file with a password that we may not read
        return []


def _left_behind(connection: Redis, settings: Settings) -> Iterator[ProbeResult]:
    """Say which destinations are no backup any more but have copies left: they are served until they have none."""
    topology = promotion.standing(connection, settings)
    configured = {backup.name for backup in (*settings.copied, *copied_now(settings, topology))}
    for row in overview.summary(connection):
        if row.destination not in configured and (row.pending or row.failed):
            waiting, failed = count(row.pending, "copy waits", "copies wait"), count(row.failed, "has", "have")
            left = f"no backup any more, but {waiting} and {failed} failed"
            yield ProbeResult(
                f"destination {row.destination}", True, f"{left}; see queue list, queue move, failed list"
            )


def _extensions(connection: Redis, settings: Settings) -> _Compared:
    """Return for each backup that has been talked to its EHLO beside the primary's."""
    old, backups = roles_now.by_default(connection, settings)
    said = greetings.read(connection, [old, *backups])
    seen = flow.total(flow.read(connection, flow.HOUR, evidence_from_redis.HOURS, changes.now(connection)))
    return [(name, extensions.compare(said.get(old), said[name], seen)) for name in backups if name in said]
