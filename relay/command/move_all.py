"""`move --repair` and `move --all`: what Redis has lost of the map is put back, and at the end it is cleared."""

from __future__ import annotations

from dataclasses import replace

from redis import Redis

from relay.cockpit import formatting, moves
from relay.cockpit.moves import MovePlan
from relay.command import promote as promoting
from relay.command import prompt
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, Misuse, Trouble
from relay.command.move_steps import MoveFlags, carry_out, plan_of, told
from relay.command.output import Output
from relay.config.loader import Settings
from relay.ledger.audit import Act
from relay.routing import moved_copy
from relay.topology import decisions, moving, promotion
from relay.topology.moved import MOVE_ALL, REPAIR, MapState
from relay.topology.moving import Lost

# A map that Redis has lost --------------------------------------------------------------------------------------------


def show_loss(out: Output, made: MovePlan) -> None:
    """Say what Redis has lost, and whether this host's copy can make up for it. Raises Trouble where it cannot."""
    held = made.held.state
    if not held.generation or held.generation < made.known:
        having = [beat.label for beat in made.seen.living if (beat.moved or 0) == made.known]
        where = f"run this on the host of {having[0]}" if having else "no process that lives has it either"
        raise Trouble(
            f"{made.lost}; this host has no copy of generation {made.known}: {where}, or begin anew with "
            "`smtp-dup move --repair --force`"
        )
    text = f"{made.lost}. This host's copy of generation {held.generation} is put back first."
    out.say(text, {"kind": "lost", "text": made.lost, "copy": held.generation})


def put_back(connection: Redis, out: Output, made: MovePlan, reason: str) -> MapState:
    """Put back what this host has. Raises Trouble."""
    held = made.held
    act = Act(
        REPAIR,
        before=made.lost,
        after=f"generation {held.state.generation} of {len(held)} entries, by this host's copy",
        reason=reason,
    )
    try:
        state = moving.repair(connection, held.state, held.everything(), made.known, act)
    except Lost as error:
        raise Trouble(str(error)) from error
    out.say(
        f"Put back {formatting.count(state.count, 'entry', 'entries')}, generation {state.generation}.",
        {"kind": "repaired", "generation": state.generation, "count": state.count},
    )
    made.state, made.held, made.lost = state, moved_copy.NOBODY, ""
    made.before = moving.entries(connection, list(made.wanted))[0]
    return state


def repair_map(connection: Redis, settings: Settings, out: Output, flags: MoveFlags) -> int:
    """Put back what Redis has lost, or with --force, where nobody has it, begin anew. Says no while it is lost."""
    made = plan_of(connection, settings, [], "", flags, back=True)
    troubled = [beat for beat in made.seen.living if beat.moved_trouble]
    if not made.lost and troubled:
        made.lost = f"{troubled[0].label}: {troubled[0].moved_trouble}"
    if not made.lost:
        out.say("Nothing is lost.", {"kind": "repaired", "generation": None, "count": None})
        return WELL
    if not flags.force:
        show_loss(out, made)
    elif made.held.state.generation < made.known:
        out.say(f"{made.lost}. It begins anew: nobody has moved.", {"kind": "lost", "text": made.lost, "copy": None})
        made.held = moved_copy.NOBODY
    if flags.dry_run:
        return NO
    if not flags.yes and not prompt.ask("Put it back?"):
        return NO
    state = put_back(connection, out, made, flags.note)
    return told(connection, out, made, state, flags.seconds)


# All of them ----------------------------------------------------------------------------------------------------------


def move_all(settings: Settings, out: Output, to: str, flags: MoveFlags, wait: str) -> int:
    """Promote the server that mailboxes have moved to, then take their entries away: they are superfluous."""
    with ledger_of(settings) as connection:
        made = moves.begin(connection, settings, to)
        servers = made.state.servers if made.state else {}
        if made.lost:
            raise Trouble(f"{made.lost}; `smtp-dup move --repair` puts it back")
        is_primary = promotion.current(made.seen, settings)
    if not to:
        if len(servers) != 1:
            there = ", ".join(f"{name} ({number})" for name, number in sorted(servers.items())) or "nobody has moved"
            raise Misuse(f"to which server? --to NAME; moved: {there}")
        to = next(iter(servers))
    if is_primary != to:
        status = promoting.promote(
            settings, out, to, route="", dry_run=flags.dry_run, wait=wait, cancel=False, now=False, force=flags.force,
            reason=flags.note, yes=flags.yes,
        )  # fmt: skip
        if status != WELL or flags.dry_run:
            return status
    with ledger_of(settings) as connection:
        made = moves.begin(connection, settings, to)
        made.before = {key: entry for key, entry in moving.everything(connection) if entry.server == to}
        made.wanted = dict.fromkeys(made.before)
        made.formers = dict.fromkeys(made.before, to)
        mailboxes = formatting.count(len(made.wanted), "address", "addresses")
        text = f"{to} answers by default: {mailboxes} need no entry of their own any more."
        out.say(text, {"kind": "superfluous", "count": len(made.wanted), "to": to})
        if flags.dry_run or not made.wanted:
            return WELL
        if not flags.yes and not prompt.ask_for(len(made.wanted), f"Take {mailboxes} out of the map", ()):
            return NO
        if promotion.current(decisions.view(connection), settings) != to:
            raise Trouble(f"nobody was taken out of the map: {to} answers by default no more")
        return carry_out(connection, out, made, replace(flags, note=flags.note or "all have moved"), MOVE_ALL)
