"""`moved`: whose mailboxes have moved, to which server, since when and by whom; and that map for other programs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from redis import Redis

from relay.cockpit import moved_exports, moves
from relay.cockpit.formatting import moment
from relay.command.command_line import tell
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, Misuse, Trouble
from relay.command.output import Column, Output
from relay.config.loader import Settings
from relay.mail.text import printable
from relay.topology import moving
from relay.topology.moved import MovedEntry

_COLUMNS = [
    Column("address", lambda row: row["address"]),
    Column("server", lambda row: row["server"]),
    Column("moved", lambda row: moment(row["at"])),
    Column("by", lambda row: row["by"] or "-", detail=True),
    Column("note", lambda row: row["note"] or "-", detail=True),
]


def listing(settings: Settings, out: Output, server: str | None) -> int:
    """List who has moved. Says no where Redis does not have the map as the relays go by it."""
    with ledger_of(settings) as connection:
        out.rows(_rows(connection, server), _COLUMNS, nothing="Nobody has moved.")
        return _well_kept(connection, settings)


def _rows(connection: Redis, server: str | None) -> Iterator[dict[str, object]]:
    for key, entry in sorted(moving.everything(connection)):
        if server is None or entry.server == server:
            yield {"address": key, **entry._asdict()}


def _well_kept(connection: Redis, settings: Settings) -> int:
    """Tell of a map that Redis has lost, or that holds what makes no sense."""
    lost = moves.begin(connection, settings).lost
    troubles = [lost] if lost else []
    for _, damaged in moving.pages(connection):
        troubles += [f"the entry of {printable(key)[:80]} makes no sense: {why}" for key, why in damaged.items()]
    for text in troubles:
        tell(text)
    return NO if troubles else WELL


def show(settings: Settings, out: Output, address: str) -> int:
    """Show who answers for an address. Says no where it has not moved."""
    asked = moves.wish(address, fold=settings.routes.fold_local)
    if isinstance(asked, moves.Kept):
        raise Misuse(f"{asked.address}: {asked.why}")
    with ledger_of(settings) as connection:
        answering = moves.Answering(connection, settings)
        looked_up = answering.keys(asked.key)
        found, damaged = moving.entries(connection, looked_up)
        key = next((key for key in looked_up if key in found), "")
        former = answering.former(asked.key)
    entry = found.get(key, MovedEntry(former.servers[0]))
    is_known = not key or any(server.name == entry.server for server in settings.named)
    row = {
        "address": asked.key,
        "moved": bool(key),
        "entry": key,
        "server": entry.server,
        "known": is_known,
        "former": former.servers[0],
        "route": former.route.name,
        "at": entry.at or None,
        "by": entry.by,
        "note": entry.note,
    }
    if out.as_json:
        out.object(row)
    else:
        out.pairs(_pairs(asked.key, key, entry, former.servers[0], former.route.name, is_known=is_known))
    for name, why in damaged.items():
        tell(f"the entry of {printable(name)[:80]} makes no sense: {why}")
    return WELL if key else NO


def _pairs(
    address: str, key: str, entry: MovedEntry, former: str, route: str, *, is_known: bool
) -> Iterator[tuple[str, str]]:
    if not key:
        yield "server", f"{entry.server}: {address} has not moved (route {route})"
        return
    yield "server", entry.server if is_known else f"{former}: no server of these settings is called {entry.server}"
    yield "entry", key
    yield "moved", f"{moment(entry.at)} by {entry.by or 'somebody'}{f': {entry.note}' if entry.note else ''}"
    if is_known:
        yield "else", f"{former} (route {route}); it gets copies"


def export(settings: Settings, form: str, hosts: Sequence[str], server: str | None) -> int:
    """Write the map in a format of another program."""
    servers = {one.name: one for one in settings.named}
    named: dict[str, str] = {}
    for text in hosts:
        name, equals, host = text.partition("=")
        if not equals or name not in servers or not host or not host.isprintable() or " " in host:
            there = ", ".join(servers) or "none"
            raise Misuse(f"--host: expected NAME=HOST with one of {there}, not {printable(text)}")
        named[name] = host
    with ledger_of(settings) as connection:
        entries = [row for row in sorted(moving.everything(connection)) if server is None or row[1].server == server]
        status = _well_kept(connection, settings)
    if status != WELL:
        raise Trouble("nothing is written: whoever would read it would send mail where it does not belong")
    sys.stdout.writelines(f"{line}\n" for line in moved_exports.lines(form, entries, servers, named))
    return WELL
