"""`flow`: what came in and what became of it, hour by hour or minute by minute, over all hosts."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from relay.cockpit.formatting import count as count_of
from relay.cockpit.formatting import duration
from relay.cockpit.roles_now import by_default
from relay.cockpit.sparkline import sparkline
from relay.command.connection import ledger_of
from relay.command.exit_status import WELL, Misuse
from relay.command.output import Column, Output
from relay.config.loader import Settings
from relay.config.routes import DEFAULT_ROUTE
from relay.ledger import changes, flow
from relay.ledger.flow import Buckets, Flow, RouteFlow
from relay.mail.text import printable

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


def _quantile(share: float, counted: Any) -> str:
    return duration(counted.seconds.quantile(share), "")


def _results(name: str, found: Flow) -> str:
    """Return "delivered/deferred/failed" of a backup."""
    copies = found.of(name)
    return f"{copies.delivered}/{copies.deferred}/{copies.failed}"


def _slow(name: str, found: Flow) -> str:
    return _quantile(0.95, found.of(name))


_SERVERS = [
    Column("server", lambda r: r.name),
    Column("accepted", lambda r: str(r.taken), numbers=True),
    Column("put off", lambda r: str(r.deferred), numbers=True),
    Column("refused", lambda r: str(r.refused), numbers=True),
    *(Column(name, partial(_quantile, share), numbers=True) for name, share in _SHARES),
    Column("", lambda r: r.trend, detail=True),
]


def show(settings: Settings, out: Output, hours: int | None, minutes: int | None, route: str) -> int:
    """Show the flow of the last hours, or minutes: one line for each server, then one for each stretch of time.

    With a ``route`` only what its servers have taken and refused.
    """
    if hours is not None and minutes is not None:
        raise Misuse("--hours or --minutes, not both")
    unit, count = (flow.MINUTE, minutes) if minutes is not None else (flow.HOUR, hours or _HOURS)
    with ledger_of(settings) as connection:
        flows = flow.read(connection, unit, count, changes.now(connection))
        primary, backups = by_default(connection, settings)
    if route:
        return _show_route(settings, out, flows, unit, route)
    if out.as_json:
        for found in flows:
            out.object(as_object(found))
        return WELL
    whole = flow.total(flows)
    backups += sorted(whole.destinations.keys() - set(backups))  # former ones, too
    out.rows(_servers(flows, whole, primary, backups), _SERVERS, nothing="")
    if whole.routes:
        out.line("")
        out.rows(sorted(whole.routes), _route_columns(flows, whole), nothing="")
    if put_off := whole.split.get("defer"):
        out.line(f"Put off, as they need another primary than their message's first: {count_of(put_off, 'recipient')}.")
    if whole.lost:
        out.line(f"Accepted without a copy: {whole.lost} (copy lost in the log).")
    rows = [found for found in flows if found.accepted or found.refused or found.uncertain or found.destinations]
    if rows:
        out.line("")
    out.rows(rows, _columns(unit, backups), nothing="Nothing has been counted in this time.")
    return WELL


def _show_route(settings: Settings, out: Output, flows: Sequence[Flow], unit: flow.Unit, route: str) -> int:
    """Show what each server of a route has taken and refused. Raises Misuse."""
    whole = flow.total(flows)
    known = {DEFAULT_ROUTE, *(r.name for r in settings.route_table), *(name for name, _ in whole.routes)}
    if route not in known:
        raise Misuse(f"no route {printable(route)}; there is: {', '.join(sorted(known))}")
    if out.as_json:
        for found in flows:
            for (name, server), counts in found.routes.items():
                if name == route:
                    out.object({"start": found.start, "length": found.length, "route": route, "server": server,
                                **asdict(counts)})  # fmt: skip
        return WELL
    out.rows([row for row in sorted(whole.routes) if row[0] == route], _route_columns(flows, whole)[1:],
             nothing=f"Nothing has been counted on {route} in this time.")  # fmt: skip
    servers = [server for name, server in whole.routes if name == route]
    rows = [found for found in flows if any(name == route for name, _ in found.routes)]
    if rows:
        out.line("")
        columns = (Column(server, partial(_taken, route, server), numbers=True) for server in servers)
        out.rows(rows, [_time_column(unit), *columns], nothing="")
    return WELL


def _taken(route: str, server: str, found: Flow) -> str:
    """Return "accepted/refused" of a server on a route."""
    counts = found.routes.get((route, server), RouteFlow())
    return f"{counts.accepted}/{counts.refused}"


def _route_columns(flows: Sequence[Flow], whole: Flow) -> list[Column]:
    """Return the columns of what servers have taken and refused of routes; a row is the names of both."""
    return [
        Column("route", lambda row: row[0]),
        Column("server", lambda row: row[1]),
        Column("accepted", lambda row: str(whole.routes[row].accepted), numbers=True),
        Column("refused", lambda row: str(whole.routes[row].refused), numbers=True),
        Column("failovers", lambda row: str(whole.failovers.get(row[1], 0)), numbers=True),
        Column("", lambda row: _trend([f.routes.get(row, RouteFlow()).accepted for f in flows]), detail=True),
    ]


def _trend(counts: Sequence[int]) -> str:
    step = -(-len(counts) // _BARS)
    first = len(counts) % step
    groups = [counts[:first]] * bool(first) + [counts[n : n + step] for n in range(first, len(counts), step)]
    return sparkline([sum(group) for group in groups], encoding=sys.stdout.encoding or "ascii")


def _servers(flows: Sequence[Flow], whole: Flow, primary: str, backups: Sequence[str]) -> list[_Server]:
    rows = [
        _Server(
            "primaries" if whole.routes else f"{primary} (primary)" if primary else "primary",
            whole.accepted,
            whole.refused_4xx + whole.uncertain,
            whole.refused_5xx + whole.own,
            whole.seconds,
            _trend([f.accepted for f in flows]),
        )
    ]
    for name in backups:
        found = whole.of(name)
        counts = [f.of(name).delivered for f in flows]
        rows.append(_Server(name, found.delivered, found.deferred, found.failed, found.seconds, _trend(counts)))
    return rows


def _columns(unit: flow.Unit, backups: Sequence[str]) -> list[Column]:
    columns = [
        _time_column(unit),
        Column("accepted", lambda f: str(f.accepted), numbers=True),
        Column("refused", lambda f: str(f.refused), numbers=True),
        Column("p95", partial(_quantile, 0.95), numbers=True),
    ]
    for name in backups:
        columns += [Column(name, partial(_results, name)), Column("p95", partial(_slow, name), numbers=True)]
    return columns


def _time_column(unit: flow.Unit) -> Column:
    form = "%H:%M" if unit is flow.MINUTE else "%a %m-%d %H:00"
    return Column("from", lambda f: time.strftime(form, time.localtime(f.start)))


def as_object(found: Flow) -> dict[str, Any]:
    """Return a stretch of time for a program: quantiles in seconds beside the buckets that they are from."""
    content = asdict(replace(found, routes={}))
    content["refused"] = found.refused
    content["routes"] = [{"route": r, "server": s, **asdict(counts)} for (r, s), counts in found.routes.items()]
    _put_times(content, found.seconds, "seconds")
    for name, times in found.answered.items():
        _put_times(content["answered"], times, name)
    for name, copies in found.destinations.items():
        _put_times(content["destinations"][name], copies.seconds, "seconds")
        _put_times(content["destinations"][name], copies.age, "age")
    return content


def _put_times(content: dict[str, Any], times: Buckets, name: str) -> None:
    content[name] = {
        "buckets": {f"{bound:g}": count for bound, count in sorted(times.counts.items())},
        **{share: times.quantile(wanted) for share, wanted in _SHARES},
    }
