"""`route list`: every route with its servers, who of them answers for how much, and who cannot be used.

Who has moved comes first, where somebody has: as a route of that name.
"""

from __future__ import annotations

from relay.cockpit import routes
from relay.cockpit.formatting import count, moment
from relay.cockpit.routes import RouteNow, ServerOnRoute
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL
from relay.command.output import GREEN, RED, Column, Output
from relay.config.loader import Settings


def _answers(server: ServerOnRoute) -> str:
    if server.share is not None:
        return f"{100 * server.share:.3g} %"
    return "yes" if server.answers else "no"


_SERVERS = [
    Column("server", lambda s: s.name),
    Column("answers", _answers),
    Column("copies", lambda s: "yes" if s.copied else "no"),
    Column("accepted", lambda s: str(s.accepted), numbers=True),
    Column("refused", lambda s: str(s.refused), numbers=True),
    Column("failovers", lambda s: str(s.failovers), numbers=True),
    Column("state", lambda s: f"away: {', '.join(s.away)}" if s.away else "ok", detail=True,
           colour=lambda s: RED if s.away else GREEN),
]  # fmt: skip


def show(settings: Settings, out: Output) -> int:
    """Show the routes; numbers are those of a day. Says no where a server that answers cannot be used."""
    with ledger_of(settings) as connection:
        found = routes.look(connection, settings)
    standing = [*([found.moved.route] if found.moved else ()), *found.routes]
    for route in standing:
        if out.as_json:
            out.object(route.as_object())
            continue
        _show(route, out)
    if not out.as_json:
        if found.put_off:
            out.line(f"Put off in a day, as they need another primary: {count(found.put_off, 'recipient')}.")
        for text in (*found.disagreements, *found.hosts):
            out.line(f"{text}.")
    is_away = any(server.away and server.answers for route in standing for server in route.servers)
    return NO if is_away or any(table.fault for route in standing for table in route.tables) else WELL


def _show(route: RouteNow, out: Output) -> None:
    decided = ", as it was decided" if route.is_decided else ""
    out.line(f"{route.name}: {route.what}; {route.answering}{decided}")
    for table in route.tables:
        since = f"{count(table.keys, 'key')} of {moment(table.changed)}" if table.changed else ""
        out.line(
            "  ".join(
                part for part in (f"  {table.file}", since, f"REFUSED: {table.fault}" * bool(table.fault)) if part
            )
        )
    out.rows(route.servers, _SERVERS, nothing="No server.")
    out.line("")
