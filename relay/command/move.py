"""`move`: mailboxes to another server, one by one or by the thousand, and back, while mail goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from redis import Redis

from relay.cockpit import formatting, moves, probed_moves
from relay.cockpit.mailbox_probe import Probed
from relay.cockpit.moves import Kept, MovePlan, Wish
from relay.command import address_file, prompt
from relay.command.connection import ledger_of
from relay.command.decision import seconds_of
from relay.command.exit_status import NO, WELL, Misuse, Trouble
from relay.command.move_all import move_all, put_back, repair_map, show_loss
from relay.command.move_steps import MoveFlags, carry_out, plan_of, show_kept
from relay.command.output import Output
from relay.command.progress import Progress
from relay.config.loader import Settings
from relay.mail.text import printable
from relay.topology.moved import MOVE, MOVE_BACK

_SHOWN = 20  # addresses of a batch


def move(
    settings: Settings,
    out: Output,
    addresses: Sequence[str],
    file: str | None,
    domains: Sequence[str],
    to: str | None,
    back: bool,
    everything: bool,
    repair: bool,
    check: bool,
    note: str,
    force: bool,
    dry_run: bool,
    wait: str,
    yes: bool,
) -> int:
    """Move mailboxes, in one generation. Says no where some were not moved, or somebody who lives does not follow."""
    is_batch = bool(addresses or file or domains)
    if repair + everything + is_batch != 1:
        raise Misuse("whom? smtp-dup move ADDRESS..., --file FILE or --domain DOMAIN; or --all, or --repair, alone")
    if force and not note:
        raise Misuse("--force needs --note TEXT: it is kept with the move")
    if check and (back or everything or repair):
        raise Misuse("--check asks the server that mailboxes move to: with addresses, --file or --domain, and --to")
    flags = MoveFlags(note, seconds_of(wait), force, dry_run, yes)
    name = _server(settings, to, needed=is_batch and not back)
    if repair:
        with ledger_of(settings) as connection:
            return repair_map(connection, settings, out, flags)
    if everything:
        return move_all(settings, out, name, flags, wait)
    asked = list(_asked(settings, addresses, file, domains))
    with ledger_of(settings) as connection:
        made = plan_of(connection, settings, asked, name, flags, back=back)
        probed = _checked(settings, made, name, force=force) if check else []
        return _batch(connection, out, made, probed, flags, back=back)


def _batch(
    connection: Redis, out: Output, made: MovePlan, probed: Sequence[Probed], flags: MoveFlags, *, back: bool
) -> int:
    if made.lost:
        show_loss(out, made)
    _show(out, made, probed, back=back)
    if flags.dry_run:
        return NO if made.kept or made.objections or made.lost else WELL
    if made.objections and not flags.force:
        raise Trouble(f"nobody was moved: {made.objections[0]}")
    if not made.wanted:
        return NO if made.kept else WELL
    if not flags.yes and not prompt.ask_for(len(made.wanted), _action(made, back=back), ()):
        return NO
    if made.lost:
        put_back(connection, out, made, flags.note)
    return carry_out(connection, out, made, flags, MOVE_BACK if back else MOVE)


def _server(settings: Settings, to: str | None, *, needed: bool) -> str:
    names = {server.name.lower(): server.name for server in settings.named}
    if to is None:
        if needed:
            raise Misuse("to which server? --to NAME")
        return ""
    if to.lower() not in names:
        raise Misuse(
            f"--to: these settings have no server named {printable(to)}; they name: {', '.join(names.values())}"
        )
    return names[to.lower()]


def _asked(
    settings: Settings, addresses: Sequence[str], file: str | None, domains: Sequence[str]
) -> Iterator[Wish | Kept]:
    fold = settings.routes.fold_local
    for text in addresses:
        yield moves.wish(text, fold=fold)
    for text in domains:
        yield moves.wish(text, fold=fold, is_domain=True)
    if file is not None:
        yield from moves.wishes_of_file(address_file.read(file), fold=fold)


# A batch --------------------------------------------------------------------------------------------------------------


def _checked(settings: Settings, made: MovePlan, name: str, *, force: bool) -> list[Probed]:
    """Ask the new server whether those to be moved exist there."""
    server = next(one for one in settings.named if one.name == name)
    if made.objections or not made.wanted:
        return []
    report = Progress()
    report(f"asking {name} about {formatting.count(len(made.wanted), 'address', 'addresses')} ...")
    found = probed_moves.probe(settings, server, list(made.wanted))
    report.clear()
    probed_moves.apply(made, found, force=force)
    return found


def _action(made: MovePlan, *, back: bool) -> str:
    mailboxes = formatting.count(len(made.wanted), "address", "addresses")
    return f"Move {mailboxes} back" if back else f"Move {mailboxes} to {made.to}"


# What is shown --------------------------------------------------------------------------------------------------------


def _show(out: Output, made: MovePlan, probed: Sequence[Probed], *, back: bool) -> None:
    if out.as_json:
        out.object(
            {
                "kind": "plan",
                "to": made.to,
                "back": back,
                "generation": made.generation,
                "addresses": list(made.wanted),
                "already": made.already,
                "objections": made.objections,
                "remarks": made.remarks,
                "processes": [beat.label for beat in made.seen.living],
                "probed": [{"address": one.address, "result": one.result.value, "text": one.text} for one in probed],
            }
        )
        show_kept(out, made.kept)
        return
    out.pairs(_pairs(made, probed, back=back))
    show_kept(out, made.kept)


def _pairs(made: MovePlan, probed: Sequence[Probed], *, back: bool) -> Iterator[tuple[str, str]]:
    before = made.generation - 1
    where = "back" if back else f"to {made.to}"
    mailboxes = formatting.count(len(made.wanted), "address", "addresses")
    yield "move", f"{mailboxes} {where}, generation {before} -> {made.generation}" if made.wanted else "nobody"
    for key in list(made.wanted)[:_SHOWN]:
        yield "", f"{key}, now at {made.formers[key]}"
    if len(made.wanted) > _SHOWN:
        yield "", f"and {len(made.wanted) - _SHOWN} more"
    if made.already:
        how = "not moved" if back else f"at {made.to}"
        yield "already", f"{how}: {formatting.some(made.already)}"
    if probed:
        yield "mailboxes", ", ".join(f"{number} {what}" for what, number in probed_moves.counts(probed))
    yield "processes", ", ".join(beat.label for beat in made.seen.living) or "none lives"
    for text in made.objections:
        yield "trouble", text
    for text in made.remarks[:_SHOWN]:
        yield "note", text
    if len(made.remarks) > _SHOWN:
        yield "", f"and {len(made.remarks) - _SHOWN} more"
