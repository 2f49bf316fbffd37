"""`flow`: what came in and what became of it, hour by hour or minute by minute, over all hosts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from relay.cockpit.readiness import backups_now, primary_now
from relay.cockpit.sparkline import sparkline
from relay.command.connection import ledger_of
from relay.command.exit_status import WELL, Misuse
from relay.command.output import Column, Output
from relay.config.loader import Settings
from relay.ledger import changes, flow
from relay.ledger.flow import Buckets, Flow

_HOURS = 24
_BARS = 24
_SHARES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


@dataclass(frozen=True, slots=True)
class _Server:
    """One line of the overview: a server, and how many messages it took, put off and refused."""

    name: str
    taken: int
    deferred: int
    refused: int
    seconds: Buckets
    trend: str


def _quantile(share: float) -> Callable[[Any], str]:
    return lambda row: duration(row.seconds.quantile(share))


def _results(name: str) -> Callable[[Any], str]:
    """Return what shows "delivered/deferred/failed" of a backup."""

    def show_results(found: Flow) -> str:
        copies = found.of(name)
        return f"{copies.delivered}/{copies.deferred}/{copies.failed}"

    return show_results


def _slow(name: str) -> Callable[[Any], str]:
    return lambda found: duration(found.of(name).seconds.quantile(0.95))


_SERVERS = [
    Column("server", lambda r: r.name),
    Column("accepted", lambda r: str(r.taken), numbers=True),
    Column("put off", lambda r: str(r.deferred), numbers=True),
    Column("refused", lambda r: str(r.refused), numbers=True),
    *(Column(name, _quantile(share), numbers=True) for name, share in _SHARES),
    Column("", lambda r: r.trend, detail=True),
]


def show(settings: Settings, out: Output, hours: int | None, minutes: int | None) -> int:
    """Show the flow of the last hours, or minutes: one line for each server, then one for each stretch of time."""
    if hours is not None and minutes is not None:
        raise Misuse("--hours or --minutes, not both")
    unit, count = (flow.MINUTE, minutes) if minutes is not None else (flow.HOUR, hours or _HOURS)
    with ledger_of(settings) as connection:
        flows = flow.read(connection, unit, count, changes.now(connection))
        primary, backups = primary_now(connection, settings), backups_now(connection, settings)
    if out.as_json:
        for found in flows:
            out.object(as_object(found))
        return WELL
    whole = flow.total(flows)
    backups += sorted(whole.destinations.keys() - set(backups))  # former ones, too
    out.rows(_servers(flows, whole, primary, backups), _SERVERS, nothing="")
    if whole.lost:
        out.line(f"Accepted without a copy: {whole.lost} (copy lost in the log).")
    rows = [found for found in flows if found.accepted or found.refused or found.uncertain or found.destinations]
    if rows:
        out.line("")
    out.rows(rows, _columns(unit, backups), nothing="Nothing has been counted in this time.")
    return WELL


def _servers(flows: Sequence[Flow], whole: Flow, primary: str, backups: Sequence[str]) -> list[_Server]:
    def trend(counts: Sequence[int]) -> str:
        step = -(-len(counts) // _BARS)
        first = len(counts) % step
        groups = [counts[:first]] * bool(first) + [counts[n : n + step] for n in range(first, len(counts), step)]
        return sparkline([sum(group) for group in groups], encoding=sys.stdout.encoding or "ascii")

    rows = [
        _Server(
            f"{primary} (primary)" if primary else "primary",
            whole.accepted,
            whole.refused_4xx + whole.uncertain,
            whole.refused_5xx + whole.own,
            whole.seconds,
            trend([f.accepted for f in flows]),
        )
    ]
    for name in backups:
        found = whole.of(name)
        counts = [f.of(name).delivered for f in flows]
        rows.append(_Server(name, found.delivered, found.deferred, found.failed, found.seconds, trend(counts)))
    return rows


def _columns(unit: flow.Unit, backups: Sequence[str]) -> list[Column]:
    form = "%H:%M" if unit is flow.MINUTE else "%a %m-%d %H:00"
    columns = [
        Column("from", lambda f: time.strftime(form, time.localtime(f.start))),
        Column("accepted", lambda f: str(f.accepted), numbers=True),
        Column("refused", lambda f: str(f.refused), numbers=True),
        Column("p95", lambda f: duration(f.seconds.quantile(0.95)), numbers=True),
    ]
    for name in backups:
        columns += [Column(name, _results(name)), Column("p95", _slow(name), numbers=True)]
    return columns


def duration(seconds: float | None) -> str:
    """Return a short time for a column."""
    if seconds is None:
        return "-"
    if seconds < 0.0095:
        return f"{seconds * 1000:.1f}ms"
    return f"{seconds * 1000:.0f}ms" if seconds < 0.9995 else f"{seconds:.1f}s"


def as_object(found: Flow) -> dict[str, Any]:
    """Return a stretch of time for a program: quantiles in seconds beside the buckets that they are from."""
    content = asdict(found)
    content["refused"] = found.refused
    _put_times(content, found.seconds, "seconds")
    for name, copies in found.destinations.items():
        _put_times(content["destinations"][name], copies.seconds, "seconds")
        _put_times(content["destinations"][name], copies.age, "age")
    return content


def _put_times(content: dict[str, Any], times: Buckets, name: str) -> None:
    content[name] = {
        "buckets": {f"{bound:g}": count for bound, count in sorted(times.counts.items())},
        **{share: times.quantile(wanted) for share, wanted in _SHARES},
    }
