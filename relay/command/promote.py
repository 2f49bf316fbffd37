"""`promote`: the switch to another server without a restart."""

from __future__ import annotations

from typing import Unpack

from redis import Redis

from relay.command.connection import ledger_of
from relay.command.decision import How, decide
from relay.command.exit_status import NO, WELL, Misuse
from relay.command.output import Output
from relay.config.loader import Settings
from relay.topology import decisions, promotion
from relay.topology.promotion import Plan


def promote(
    settings: Settings,
    out: Output,
    name: str | None,
    route: str,
    cancel: bool,
    force: bool,
    **how: Unpack[How],
) -> int:
    """Make a backup the primary, and the primary a backup, while mail goes on: by default, or on one route."""
    if cancel:
        if name or route:
            raise Misuse("--cancel ends whatever is being prepared: without a name")
        return _cancel(settings, out)
    if not name:
        raise Misuse("which server? smtp-dup promote NAME")
    if force and not how["reason"]:
        raise Misuse("--force needs --reason TEXT: it is kept with the change")

    def plan(connection: Redis) -> Plan:
        if route:
            return promotion.plan_on_route(connection, settings, name, route)
        return promotion.plan(connection, settings, name)

    return decide(settings, out, plan, must_be_ready=True, force=force, **how)


def _cancel(settings: Settings, out: Output) -> int:
    with ledger_of(settings) as connection:
        ended = decisions.withdraw(connection)
    text = "Nothing is being prepared."
    if ended:
        text = f"{ended.by}'s preparation of {ended.primary} has ended; nothing has changed."
    out.say(text, {"cancelled": ended.primary if ended else None})
    return WELL if ended else NO
