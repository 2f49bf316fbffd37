"""One moment of the mail that goes through: what `top` shows, as values and as lines of text.

Everything comes from the flow and the ledger's own counts, never from a scan of copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from relay.cockpit.formatting import count, duration, span, time_of_day
from relay.cockpit.readiness import Verdict, verdicts
from relay.cockpit.roles_now import by_default
from relay.cockpit.sparkline import sparkline
from relay.config.model import Settings
from relay.config.routes import Route
from relay.ledger import changes, events, flow, hosts, overview
from relay.ledger.events import Event
from relay.ledger.flow import Flow, RouteFlow
from relay.ledger.hosts import LATE, Host
from relay.topology import heartbeats, promotion, route_roles
from relay.topology.heartbeats import Heartbeat

_TREND = 30  # tens of seconds: five minutes
_RATE = 3  # of them: what a rate is the mean of, since each host tells once in ten seconds
_MINUTES = 15  # that percentiles are of
_WIDE = 112  # columns that a row takes with everything on one line
_NAME = 16
ALL_PRIMARIES = "primaries"


@dataclass(frozen=True, slots=True)
class ServerNow:
    """One server: messages a second in and out, what waits, p95 of its replies in seconds, and how it is.

    With routes all primaries are one row, ALL_PRIMARIES: the flow counts what came in, whoever has answered.
    """

    name: str
    is_primary: bool
    in_rate: float
    out_rate: float
    pending: int
    oldest_s: float
    p95_s: float | None
    deferred: int
    failed: int
    state: str
    reason: str
    trend: tuple[int, ...]

    @property
    def is_all_primaries(self) -> bool:
        """Whether this counts what all who answer took."""
        return self.is_primary and self.name == ALL_PRIMARIES


@dataclass(frozen=True, slots=True)
class RouteRate:
    """What a server takes of a route, in messages a second; ``away`` are the relay processes that cannot use it."""

    route: str
    server: str
    rate: float
    away: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """All of one moment."""

    at: float
    epoch: int
    primary: str
    verdicts: Sequence[Verdict]
    rows: Sequence[ServerNow]
    events: Sequence[Event]
    hosts: Sequence[Host]
    relays: Sequence[Heartbeat]
    routes: Sequence[RouteRate] = ()

    def as_object(self) -> dict[str, Any]:
        """Return it for a program."""
        return {
            "at": self.at,
            "epoch": self.epoch,
            "primary": self.primary,
            "verdicts": [{"destination": v.name, "ready": v.is_ready, "summary": v.summary} for v in self.verdicts],
            "destinations": [asdict(row) for row in self.rows],
            "routes": [asdict(route) for route in self.routes],
            "events": [asdict(event) for event in self.events],
            "hosts": [asdict(host) for host in self.hosts],
            "relays": [{"label": r.label, "alive": r.is_alive, "age_s": r.age, "epoch": r.epoch} for r in self.relays],
        }


def look(connection: Any, settings: Settings, known: Sequence[Verdict] | None = None) -> Frame:
    """Look at this moment; the verdicts are those that are ``known``, where some are given. Raises RedisError."""
    now = changes.now(connection)
    decided = promotion.standing(connection, settings)
    primary, backups = by_default(connection, settings)
    table = route_roles.table(settings, decided)
    moments = flow.read(connection, flow.MOMENT, _TREND + 1, now)[:-1]  # the last one is not over
    recent = flow.total(flow.read(connection, flow.MINUTE, _MINUTES, now))
    relays = heartbeats.read(connection)
    return Frame(
        at=now,
        epoch=decided.epoch if decided else 0,
        primary=primary,
        verdicts=verdicts(connection, settings) if known is None else known,
        rows=list(_rows(connection, primary, backups, moments, recent, has_routes=bool(table))),
        events=events.read(connection, 10),
        hosts=hosts.read(connection),
        relays=relays,
        routes=list(_routes(table, moments, recent, heartbeats.living(relays))),
    )


def _routes(
    routes: Sequence[Route], moments: Sequence[Flow], recent: Flow, living: Sequence[Heartbeat]
) -> Iterator[RouteRate]:
    """Yield every server that answers on a route, or has answered within minutes."""
    rates = flow.total(moments[-_RATE:])
    seconds = _RATE * flow.MOMENT.seconds
    answering = [(route.name, name) for route in routes for name in route.answering]
    for route, server in dict.fromkeys([*answering, *recent.routes]):
        counted = rates.routes.get((route, server), RouteFlow())
        away = tuple(beat.label for beat in living if server in beat.down)
        yield RouteRate(route, server, (counted.accepted + counted.refused) / seconds, away)


def _rows(
    connection: Any, primary: str, backups: Sequence[str], moments: Sequence[Flow], recent: Flow, *, has_routes: bool
) -> Iterator[ServerNow]:
    rates = flow.total(moments[-_RATE:])
    seconds = _RATE * flow.MOMENT.seconds
    accepted = rates.accepted / seconds
    trend = tuple(moment.accepted for moment in moments)
    put_off, refused = recent.refused_4xx + recent.uncertain, recent.refused_5xx + recent.own
    name = ALL_PRIMARIES if has_routes or recent.routes else primary or "primary"
    yield ServerNow(
        name, True, (rates.accepted + rates.refused + rates.uncertain) / seconds, accepted,
        0, 0.0, recent.seconds.quantile(0.95), put_off, refused, "primary", "", trend,
    )  # fmt: skip
    for row in overview.summary(connection):
        if row.destination == primary or (row.destination not in backups and not row.pending):
            continue  # a former backup without anything that waits
        copies = rates.of(row.destination)
        yield ServerNow(
            name=row.destination,
            is_primary=False,
            in_rate=copies.copied / seconds,
            out_rate=copies.delivered / seconds,
            pending=row.pending,
            oldest_s=row.oldest_age_s,
            p95_s=recent.of(row.destination).seconds.quantile(0.95),
            deferred=row.retrying,
            failed=row.failed,
            state=row.state,
            reason=row.reason,
            trend=tuple(moment.of(row.destination).delivered for moment in moments),
        )


# As text ----------------------------------------------------------------------------------------------------------


SORTS: dict[str, Callable[[ServerNow], Any]] = {
    "name": lambda row: row.name,
    "pending": lambda row: -row.pending,
    "out/s": lambda row: -row.out_rate,
    "failed": lambda row: -row.failed,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a frame is to be shown; ``only`` names one backup, ``note`` stands at the head.

    On a ``screen`` there are so many lines of so many columns, and no more.
    """

    width: int = 80
    height: int = 24
    sort: str = "name"
    only: str = ""
    note: str = ""
    encoding: str = "utf-8"
    screen: bool = True


_TITLES = (
    f"{'server':<{_NAME}} {'in/s':>7} {'out/s':>7} {'pending':>8} {'oldest':>7} {'p95':>7} {'put off':>8} {'failed':>7}"
)


def lines(frame: Frame, how: Look) -> list[str]:
    """Return the lines of a frame. On a screen without room for all the events give way, the oldest first."""
    shown = [_head(frame, how), *(f"{v.name}: {v.summary}" for v in frame.verdicts if how.only in {"", v.name}), ""]
    shown.append(_TITLES + ("  five minutes" if how.width >= _WIDE else ""))
    for row in sorted(frame.rows, key=lambda r: (not r.is_primary, SORTS[how.sort](r))):
        if row.is_primary or how.only in {"", row.name}:
            shown += _row(row, how)
    shown += ["", *_of_routes(frame)] if frame.routes else []
    shown += ["", *_hosts(frame)]
    room = how.height - len(shown) - 1 if how.screen else len(frame.events)
    if frame.events and room > 0:
        shown += ["", *(_event(event) for event in frame.events[:room])]
    return [_cut(line, how.width) for line in shown[: how.height]] if how.screen else shown


def _head(frame: Frame, how: Look) -> str:
    parts = [f"smtp-dup {time_of_day(frame.at)}", f"primary {frame.primary or 'not known'}"]
    parts += [f"epoch {frame.epoch}"] if frame.epoch else []
    parts += [f"by {how.sort}"] if how.sort != "name" else []
    return "   ".join([*parts, *([how.note] if how.note else [])])


def _row(row: ServerNow, how: Look) -> Iterator[str]:
    trend = sparkline(row.trend, encoding=how.encoding)
    pending = "-" if row.is_primary else str(row.pending)
    oldest = span(row.oldest_s, "") if row.pending and not row.is_primary else "-"
    numbers = (
        f"{_cut(row.name, _NAME):<{_NAME}} {_rate(row.in_rate):>7} {_rate(row.out_rate):>7} {pending:>8} {oldest:>7} "
        f"{duration(row.p95_s, ''):>7} {row.deferred:>8} {row.failed:>7}"
    )
    state = f"{row.state}: {row.reason}" if row.reason else row.state
    if how.width >= _WIDE:
        yield f"{numbers}  {trend}  {state}"
    else:
        yield numbers
        yield f"  {trend}  {state}"


def _of_routes(frame: Frame) -> Iterator[str]:
    """Yield a line for each route: "shop: a 3.2/s, b 0.4/s"."""
    by_route: dict[str, list[str]] = {}
    for found in frame.routes:
        away = " AWAY" if found.away else ""
        by_route.setdefault(found.route, []).append(f"{found.server} {_rate(found.rate)}/s{away}")
    for route, servers in by_route.items():
        yield f"{route}: {', '.join(servers)}"


def _hosts(frame: Frame) -> Iterator[str]:
    living = [relay for relay in frame.relays if relay.is_alive]
    dead = [relay.label for relay in frame.relays if not relay.is_alive]
    yield f"{count(len(living), 'relay process', 'relay processes')}" + (f", silent: {', '.join(dead)}" if dead else "")
    for host in frame.hosts:
        spool = f"spool {host.spool_messages}" if host.relays else ""
        silent = f"silent for {span(host.age)}" if host.age > LATE else ""
        what = f"{host.role}, {count(host.processes, 'process', 'processes')}"
        yield "  ".join(part for part in (host.host, what, spool, silent) if part)


def _event(event: Event) -> str:
    return f"{time_of_day(event.at)} {event.event}: {event.text}"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: max(0, width - 1)] + "~"


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate < 99.95 else f"{rate:.0f}"
