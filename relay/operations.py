"""What the operator's commands do: `check`, `queue ...`, `failed ...`. Each prints and returns its exit status.

They talk to the Redis that the settings name, or to the embedded one of a running `smtp-dup up` with the same
state folder. Trouble that an operator can mend is a Trouble with one line that says how. Message content is
shown by `failed export` only.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from redis import Redis
from redis.exceptions import AuthenticationError, BusyLoadingError
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import TimeoutError as NoAnswer

from relay import embedded, ledger, spool, tables
from relay.envelope import printable
from relay.redis_clients import sync_client
from relay.settings import Settings, describe
from relay.tables import Column

if TYPE_CHECKING:
    from relay.check import Finding


class Trouble(Exception):
    """What keeps a command from doing its work; the text is one line for the operator."""


@contextmanager
def ledger_of(settings: Settings) -> Iterator[Redis]:
    """Connect to the Redis with the ledger. Raises Trouble when there is none, also in the middle."""
    server = settings.redis if settings.redis.url else settings.redis.at(embedded.url(settings.state_dir))
    seconds = max(30.0, server.timeout_seconds)  # an operator can wait for a busy one
    with sync_client(server, seconds, retries=0) as connection:
        try:
            yield connection
        except (AuthenticationError, BusyLoadingError, NoAnswer) as error:
            raise Trouble(f"Redis at {server.shown}: {printable(str(error))}") from error
        except NoConnection as error:
            if settings.redis.url:
                option = "redis.sentinels" if server.sentinels else "redis.url"
                raise Trouble(f"no Redis at {server.shown}: {printable(str(error))}; see {option}") from error
            raise Trouble(
                f"no Redis: set redis.url, or start `smtp-dup up` with this --state-dir ({settings.state_dir})"
            ) from error


# check ---------------------------------------------------------------------------------------------------------


def check(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show the settings, probe what they name. Status 1 when a probe finds trouble."""
    from relay.check import probe_all  # noqa: PLC0415  (SMTP and TLS)

    shown = describe(settings)
    if not settings.redis.url and embedded.socket_path(settings.state_dir).exists():
        # `up` runs with this state folder: its Redis is the one that counts.
        settings = replace(settings, redis=settings.redis.at(embedded.url(settings.state_dir)))
    if arguments.json:
        for row in shown:
            tables.write_object({"kind": "setting", **row._asdict()})
    else:
        columns = [
            Column("option", lambda r: r.key),
            Column("value", lambda r: r.value or "-"),
            Column("from", lambda r: r.origin),
        ]
        tables.write(shown, columns, as_json=False, nothing="")
    findings = [*asyncio.run(probe_all(settings)), *_left_behind(settings)]
    columns = [
        Column("", lambda f: "ok" if f.ok else "TROUBLE"),
        Column("what", lambda f: f.subject),
        Column("found", lambda f: f.text),
    ]
    if arguments.json:
        for finding in findings:
            tables.write_object({"kind": "finding", **tables.as_object(finding)})
    else:
        tables.write_line("")
        tables.write(findings, columns, as_json=False, nothing="")
    return int(not all(finding.ok for finding in findings))


def _left_behind(settings: Settings) -> Iterator[Finding]:
    """Say which destinations are no backup any more but have copies left: they are served until they have none."""
    from relay.check import Finding  # noqa: PLC0415

    if not settings.redis.url:
        return
    configured = {backup.name for backup in settings.backups}
    try:
        with ledger_of(settings) as connection:
            rows = ledger.summary(connection)
    except Trouble:
        return  # the probe of Redis says so
    for row in rows:
        if row.destination not in configured and (row.pending or row.failed):
            left = f"no backup any more, but {row.pending} copies wait and {row.failed} have failed"
            yield Finding(f"destination {row.destination}", True, f"{left}; see queue list, queue move, failed list")


# queue ---------------------------------------------------------------------------------------------------------


def queue_summary(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show one line for each destination, and this host's spool, also while Redis is away."""
    try:
        with ledger_of(settings) as connection:
            rows = ledger.summary(connection)
    except Trouble:
        _spool_summary(settings, as_json=arguments.json)
        raise
    columns = [
        Column("destination", lambda r: r.destination),
        Column("pending", lambda r: str(r.pending), numbers=True),
        Column("oldest", lambda r: tables.span(r.oldest_age_s) if r.pending else "-", numbers=True),
        Column("retrying", lambda r: str(r.retrying), numbers=True),
        Column("failed", lambda r: str(r.failed), numbers=True),
        Column("delivered", lambda r: str(r.delivered), numbers=True),
        Column("state", lambda r: f"{r.state}: {r.reason}" if r.reason else r.state),
    ]
    found = _spool(settings)
    if arguments.json:
        # Each line is a destination, as ever; the spool, which is this host's and no destination's, stands in all.
        for row in rows:
            waiting = found.backlogs.get(row.destination, 0)
            tables.write_object({**tables.as_object(row), "spooled": waiting, "spool": tables.as_object(found)})
        return 0
    tables.write(rows, columns, as_json=False, nothing="No destination has been used yet.")
    _spool_summary(settings, as_json=False)
    return 0


def _spool(settings: Settings) -> spool.Summary:
    try:
        return spool.summary(settings.spool.dir)
    except OSError as error:
        raise Trouble(f"the spool cannot be read: {error}") from error


def _spool_summary(settings: Settings, *, as_json: bool) -> None:
    found = _spool(settings)
    if as_json:
        tables.write_object({"spool": tables.as_object(found)})
        return
    if found.messages:
        age = tables.span(found.oldest_age_s)
        tables.write_line(f"This host's spool: {found.messages} messages, {found.bytes} bytes, the oldest {age} old.")
    for name, count in found.backlogs.items():
        tables.write_line(f"  {count} of them wait for {name} alone.")
    if found.corrupt:
        tables.write_line(f"Set aside as unreadable: {found.corrupt} files in {settings.spool.dir}/corrupt.")
    if found.unfinished:
        where = f"{settings.spool.dir}/unfinished"
        tables.write_line(f"Half written at a crash, never acknowledged: {found.unfinished} files in {where}.")


def queue_list(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show the copies that wait."""
    from workers import backlog  # noqa: PLC0415

    columns = [
        Column("id", lambda r: r.id),
        Column("destination", lambda r: r.destination),
        Column("sender", lambda r: tables.address(r.sender)),
        Column("recipients", lambda r: ", ".join(r.recipients)),
        Column("size", lambda r: str(r.size), numbers=True),
        Column("received", lambda r: tables.moment(r.received_at)),
        Column("tries", lambda r: str(r.attempts), numbers=True),
        Column("next try", lambda r: tables.moment(r.next_attempt_at)),
        Column("last reply", lambda r: r.last_reply or "-"),
    ]
    with ledger_of(settings) as connection:
        rows = backlog.listing(connection, arguments.destination)
        tables.write(rows, columns, as_json=arguments.json, nothing="Nothing waits.")
    return 0


def queue_flush(settings: Settings, arguments: argparse.Namespace) -> int:
    """Have all that waits tried now."""
    from workers import backlog  # noqa: PLC0415

    with ledger_of(settings) as connection:
        count = backlog.flush(connection, arguments.destination)
    _count(arguments, "flushed", count, "Everything that waits is due now: {}.")
    return 0


def queue_move(settings: Settings, arguments: argparse.Namespace) -> int:
    """Give what waits for one destination, and what failed there, to another."""
    from workers import backlog  # noqa: PLC0415

    source, target = arguments.source, arguments.target
    if source == target:
        raise Trouble("the two destinations are the same")
    with ledger_of(settings) as connection:
        moved = backlog.move(connection, source, target)
    if arguments.json:
        tables.write_object(tables.as_object(moved))
    else:
        tables.write_line(
            f"From {source} to {target}: {moved.pending} that waited, {moved.failed} that had failed; "
            f"{moved.covered} dropped, as {target} has copies for the same recipients; {moved.left} left."
        )
    return 0


def queue_verify(settings: Settings, arguments: argparse.Namespace) -> int:
    """Compare the ledger with RQ, repair what disagrees, and show it."""
    from workers import reconcile  # noqa: PLC0415

    with ledger_of(settings) as connection:
        report = reconcile.verify(connection, settings, repair=not arguments.dry_run)
    columns = [
        Column("finding", lambda f: f.finding),
        Column("id", lambda f: f.id or "-"),
        Column("destination", lambda f: f.destination or "-"),
        Column("action", lambda f: f.action),
    ]
    tables.write(report.findings, columns, as_json=arguments.json, nothing="Everything is as it should be.")
    return 0


# failed --------------------------------------------------------------------------------------------------------

_FAILED = [
    Column("id", lambda r: r.id),
    Column("destination", lambda r: r.destination),
    Column("sender", lambda r: tables.address(r.sender)),
    Column("recipients", lambda r: ", ".join(r.recipients)),
    Column("size", lambda r: str(r.size), numbers=True),
    Column("tries", lambda r: str(r.attempts), numbers=True),
    Column("failed", lambda r: tables.moment(r.failed_at)),
    Column("reply", lambda r: r.reply),
]


def failed_list(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show the failed copies."""
    from workers import failed  # noqa: PLC0415

    with ledger_of(settings) as connection:
        rows = failed.listing(connection, arguments.destination)
        tables.write(rows, _FAILED, as_json=arguments.json, nothing="Nothing has failed.")
    return 0


def failed_show(settings: Settings, arguments: argparse.Namespace) -> int:
    """Show a failed message: each of its failed copies and what was said at each attempt."""
    from workers import failed  # noqa: PLC0415

    with ledger_of(settings) as connection:
        details = failed.show(connection, arguments.id)
    for number, detail in enumerate(details):
        if arguments.json:
            history = [{"at": at, "reply": reply} for at, reply in detail.history]
            tables.write_object({**tables.as_object(detail), "history": history})
            continue
        if number:
            tables.write_line("")
        for name, value in (
            ("id", detail.id),
            ("destination", detail.destination),
            ("sender", tables.address(detail.sender)),
            ("recipients", ", ".join(detail.recipients)),
            ("size", f"{detail.size} bytes"),
            ("received", f"{tables.moment(detail.received_at)} from {detail.client_address or 'unknown'}"),
            ("failed", tables.moment(detail.failed_at)),
            ("attempts", str(detail.attempts)),
        ):
            tables.write_line(f"{name:<12} {value}")
        for at, reply in detail.history:
            tables.write_line(f"{'':<12} {tables.moment(at)}  {reply}")
    return 0


def failed_retry(settings: Settings, arguments: argparse.Namespace) -> int:
    """Have failed copies tried again."""
    from workers import failed  # noqa: PLC0415

    ids = _ids(arguments)
    with ledger_of(settings) as connection:
        count = failed.retry(connection, ids, arguments.destination)
    _count(arguments, "retried", count, "{} will be tried again now.")
    return 0


def failed_drop(settings: Settings, arguments: argparse.Namespace) -> int:
    """Forget failed copies, after a question."""
    from workers import failed  # noqa: PLC0415

    ids = _ids(arguments)
    with ledger_of(settings) as connection:
        if not arguments.yes and not _is_sure(connection, ids, arguments.destination):
            return 1
        count = failed.drop(connection, ids, arguments.destination)
    _count(arguments, "dropped", count, "{} dropped.")
    return 0


def failed_export(settings: Settings, arguments: argparse.Namespace) -> int:
    """Write a failed message to standard output, byte for byte."""
    from workers import failed  # noqa: PLC0415

    with ledger_of(settings) as connection:
        failed.show(connection, arguments.id)  # or it is not failed
        content = failed.export(connection, arguments.id)
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
    return 0


def _ids(arguments: argparse.Namespace) -> list[str] | None:
    """Return the ids on the command line, None for all. Raises Trouble unless it is one of the two."""
    ids: list[str] = arguments.ids
    if bool(ids) == arguments.all:
        raise Trouble("give the ids of failed messages, or --all" + (", not both" if ids else ""))
    return None if arguments.all else ids


def _is_sure(connection: Redis, ids: list[str] | None, destination: str | None) -> bool:
    if not sys.stdin.isatty():
        raise Trouble("nobody to ask: say --yes")
    rows = [r for r in ledger.summary(connection) if destination in {None, r.destination}]
    what = f"{len(ids)} failed message(s)" if ids else f"{sum(r.failed for r in rows)} failed copies, all there are"
    of = f" of {destination}" if destination else ""
    sys.stderr.write(f"Drop {what}{of} for good? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _count(arguments: argparse.Namespace, key: str, count: int, text: str) -> None:
    if arguments.json:
        tables.write_object({key: count})
    else:
        tables.write_line(text.format("1 copy" if count == 1 else f"{count} copies"))
