"""`promote` and `undo`: the switch to another server without a restart."""

from __future__ import annotations

from redis import Redis

from relay.command.connection import ledger_of
from relay.command.decision import carry_out, confirmed, decide, seconds_of, show_plan
from relay.command.exit_status import NO, WELL, Misuse, Trouble
from relay.command.output import Output
from relay.config.loader import Settings
from relay.topology import decisions, promotion
from relay.topology.promotion import Impossible, Plan


def promote(
    settings: Settings,
    out: Output,
    name: str | None,
    route: str,
    dry_run: bool,
    wait: str,
    cancel: bool,
    now: bool,
    force: bool,
    reason: str,
    yes: bool,
) -> int:
    """Make a backup the primary, and the primary a backup, while mail goes on: by default, or on one route."""
    if cancel:
        if name or route:
            raise Misuse("--cancel ends whatever is being prepared: without a name")
        return _cancel(settings, out)
    if not name:
        raise Misuse("which server? smtp-dup promote NAME")
    if force and not reason:
        raise Misuse("--force needs --reason TEXT: it is kept with the change")

    def plan(connection: Redis) -> Plan:
        if route:
            return promotion.plan_on_route(connection, settings, name, route)
        return promotion.plan(connection, settings, name)

    return decide(
        settings,
        out,
        plan,
        dry_run=dry_run,
        wait=wait,
        now=now,
        reason=reason,
        yes=yes,
        must_be_ready=True,
        force=force,
    )


def undo(settings: Settings, out: Output, dry_run: bool, wait: str, now: bool, reason: str, yes: bool) -> int:
    """Make the primary before the last change the primary again."""
    seconds = seconds_of(wait)
    with ledger_of(settings) as connection:
        try:
            made = promotion.plan_undo(connection, settings)
        except Impossible as error:
            raise Trouble(str(error)) from error
        show_plan(out, made, None)
        if dry_run:
            return WELL
        if not yes and not confirmed(made):
            return NO
        return carry_out(connection, out, made, reason, {}, seconds, at_once=now)


def _cancel(settings: Settings, out: Output) -> int:
    with ledger_of(settings) as connection:
        ended = decisions.withdraw(connection)
    if out.as_json:
        out.object({"cancelled": ended.primary if ended else None})
    elif ended:
        out.line(f"{ended.by}'s preparation of {ended.primary} has ended; nothing has changed.")
    else:
        out.line("Nothing is being prepared.")
    return WELL if ended else NO
