"""`topology`: which server answers since when, which relay process follows, and the last changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice

from relay.cockpit.formatting import moment, span
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL
from relay.command.output import GREEN, RED, YELLOW, Column, Output
from relay.config.loader import Settings
from relay.ledger import audit
from relay.topology import decisions, promotion, route_roles
from relay.topology.agreement import differences
from relay.topology.decisions import View
from relay.topology.heartbeats import Heartbeat
from relay.topology.roles import disagreement
from relay.topology.state import RouteRoles, Topology

_CHANGES = 5
_PROCESSES = [
    Column("process", lambda row: row[0].label),
    Column("follows", lambda row: "yes" if row[1] else "dead" if not row[0].is_alive else "NO",
           colour=lambda row: GREEN if row[1] else YELLOW if not row[0].is_alive else RED),
    Column("epoch", lambda row: str(row[0].epoch), numbers=True),
    Column("primary", lambda row: row[0].primary, detail=True),
    Column("in old", lambda row: str(row[0].in_old), numbers=True),
    Column("heard", lambda row: f"{span(row[0].age, '')} ago", numbers=True),
    Column("pid", lambda row: str(row[0].pid), numbers=True),
    Column("version", lambda row: row[0].version, detail=True),
    Column("trouble", lambda row: row[0].trouble or row[0].moved_trouble or "-", detail=True,
           colour=lambda row: RED if row[0].trouble or row[0].moved_trouble else ""),
    Column("moved", lambda row: str(row[0].moved or "-"), numbers=True, detail=True),
]  # fmt: skip
_HISTORY = [
    Column("when", lambda act: moment(act.at)),
    Column("who", lambda act: act.who),
    Column("what", lambda act: act.command),
    Column("route", lambda act: act.details.get("route", "-")),
    Column("before", lambda act: act.before or "-"),
    Column("after", lambda act: act.after or "-"),
    Column("why", lambda act: act.reason or "-", detail=True),
]


def show(settings: Settings, out: Output) -> int:
    """Show who is the primary since when, which process follows, and the last changes. Says no when one does not."""
    with ledger_of(settings) as connection:
        seen = decisions.view(connection)
        last = list(islice((act for act in audit.acts(connection) if act.command in promotion.COMMANDS), _CHANGES))
    late = [beat for beat in seen.living if not seen.follows(beat) or not seen.goes_by_moves(beat)]
    if out.as_json:
        out.object(_as_object(seen, settings))
        for beat in seen.beats:
            out.object(
                {
                    "kind": "process",
                    **asdict(beat),
                    "alive": beat.is_alive,
                    "follows": beat not in late and seen.follows(beat),
                }
            )
        for act in last:
            out.object({"kind": "change", **asdict(act)})
        return NO if late else WELL
    out.pairs(_head(seen, settings))
    out.line("")
    rows: list[tuple[Heartbeat, bool]] = [(beat, beat.is_alive and beat not in late) for beat in seen.beats]
    out.rows(rows, _PROCESSES, nothing="No relay process lives.")
    if last:
        out.line("")
        out.rows(last, _HISTORY, nothing="")
    return NO if late else WELL


def _as_object(seen: View, settings: Settings) -> dict[str, object]:
    last = promotion.latest(seen, settings)
    now = last.now if last else None
    intent = seen.intent
    return {
        "kind": "topology",
        "epoch": last.epoch if last else 0,
        "primary": promotion.current(seen, settings),
        "backups": list(now.backups if now else (b.name for b in settings.backups)),
        "by": now.by if now else "",
        "at": now.at if now else None,
        "reason": now.reason if now else "",
        "previous": last.previous.primary if last else None,
        "preparing": {"primary": intent.primary, "route": intent.route, "by": intent.by, "at": intent.at}
        if intent
        else None,
        "settings_agree": _agree(seen, settings),
        "routes": {name: asdict(roles) for name, roles in now.routes.items()} if now else {},
        "differences": list(differences(seen)),
        "disagreement": disagreement(settings, last),
        "moved": {
            "generation": seen.moves.generation if seen.moves else 0,
            "servers": dict(seen.moves.servers) if seen.moves else {},
            "trouble": seen.nonsense_of_moves,
        },
        "trouble": seen.nonsense or _lost(seen, last),
    }


def _agree(seen: View, settings: Settings) -> bool | None:
    """Say whether the settings name the same primary; None for settings without one."""
    if settings.primary is None:
        return None
    return promotion.current(seen, settings) == settings.primary.name and not disagreement(
        settings, promotion.latest(seen, settings)
    )


def _head(seen: View, settings: Settings) -> Iterator[tuple[str, str]]:
    primary = promotion.current(seen, settings) or "each host's settings say"
    yield "primary", primary
    last = promotion.latest(seen, settings)
    names = last.now.backups if last else tuple(b.name for b in settings.backups)
    yield "backups", ", ".join(names) or "none"
    if last is None:
        yield "epoch", "0: nobody has promoted a server, the settings hold"
    else:
        now = last.now
        why = f": {now.reason}" if now.reason else ""
        yield "epoch", f"{now.epoch}, by {now.by or 'somebody'} at {moment(now.at)}{why}"
        yield "before", f"{last.undone or last.previous.primary}; `smtp-dup undo` goes back to it"
    if last:
        for name, roles in last.now.routes.items():
            yield f"route {name}", f"{roles.in_words()}; copies: {', '.join(_copied(roles)) or 'none'}"
    yield from _moved(seen)
    if seen.intent:
        ago = max(0.0, seen.now - seen.intent.at)
        where = f" on {seen.intent.route}" if seen.intent.route else ""
        yield "preparing", f"{seen.intent.primary}{where}, by {seen.intent.by} for {ago:.0f} s"
    if seen.nonsense:
        yield "trouble", f"what Redis holds as topology makes no sense: {seen.nonsense}"
    if lost := _lost(seen, last):
        yield "trouble", lost
    yield from _about_settings(seen, settings, last)


def _about_settings(seen: View, settings: Settings, last: Topology | None) -> Iterator[tuple[str, str]]:
    primary_now = promotion.current(seen, settings)
    if settings.primary and settings.primary.name != primary_now:
        yield "settings", f"they name {settings.primary.name} as the primary: edit them to agree before long"
    for text in differences(seen):
        yield "settings", text
    if last:
        for text in route_roles.disagreements(settings, last):
            yield "settings", text


def _lost(seen: View, last: Topology | None) -> str:
    """Say that Redis has not the last decision any more, which relays or this host have seen; "" where it has."""
    highest = max(seen.highest, last.epoch if last else 0)
    if seen.epoch >= highest:
        return ""
    has = f"epoch {seen.epoch}" if seen.topology else "none"
    return f"Redis has {has}, and epoch {highest} was decided: it was emptied or restored; promote who is the primary"


def _moved(seen: View) -> Iterator[tuple[str, str]]:
    if seen.moves:
        moved = ", ".join(f"{number} at {name}" for name, number in sorted(seen.moves.servers.items())) or "nobody"
        yield "moved", f"{moved} (generation {seen.moves.generation}); `smtp-dup moved` lists them"
    if seen.nonsense_of_moves:
        yield "trouble", f"what Redis holds as the state of who has moved makes no sense: {seen.nonsense_of_moves}"


def _copied(roles: RouteRoles) -> list[str]:
    servers = roles.servers if roles.copies == "others" else ()
    return list(dict.fromkeys((*servers, *roles.backups)))
