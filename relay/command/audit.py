"""`audit`: who changed what, when and why."""

from __future__ import annotations

from relay.cockpit.formatting import moment
from relay.command.connection import ledger_of
from relay.command.exit_status import WELL, read_flag
from relay.command.output import Column, Output
from relay.config.loader import Settings
from relay.config.types import duration
from relay.ledger import audit, changes

_ACTS = [
    Column("when", lambda act: moment(act.at)),
    Column("who", lambda act: f"{act.who}@{act.host}"),
    Column("command", lambda act: act.command),
    Column("before", lambda act: act.before or "-", detail=True),
    Column("after", lambda act: act.after or "-", detail=True),
    Column("why", lambda act: act.reason or "-", detail=True),
    Column("details", lambda act: ", ".join(f"{n}={v}" for n, v in act.details.items()) or "-", detail=True),
]


def listing(settings: Settings, out: Output, since: str | None) -> int:
    """Show the acts, newest first."""
    age = read_flag("--since", duration().read, since) if since else None
    with ledger_of(settings) as connection:
        begin = changes.now(connection) - age if age else 0.0
        out.rows(audit.acts(connection, begin), _ACTS, nothing="Nothing was changed by a command.")
    return WELL
