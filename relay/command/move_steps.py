"""The steps of a move that all forms of it share: the wait for the last one, the commit, and who follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from redis import Redis
from redis.exceptions import RedisError

from relay.cockpit import changeover, formatting, moves
from relay.cockpit.moves import Kept, MovePlan, Wish
from relay.command.exit_status import NO, WELL, CannotSay, Trouble
from relay.command.output import Output
from relay.command.progress import Progress
from relay.config.loader import Settings
from relay.ledger.audit import Act
from relay.mail.text import printable
from relay.topology import moving
from relay.topology.followers import follow_moves
from relay.topology.moved import MOVE, MOVE_BACK, NOTE, MapState
from relay.topology.moving import Lost, NotFollowed

_AGAIN = 20  # times that somebody else may be quicker


@dataclass(frozen=True, slots=True)
class MoveFlags:
    """The flags that all forms of a move have; ``seconds`` to wait for the relay processes."""

    note: str
    seconds: float
    force: bool
    dry_run: bool
    yes: bool


def plan_of(
    connection: Redis, settings: Settings, asked: Sequence[Wish | Kept], to: str, flags: MoveFlags, *, back: bool
) -> MovePlan:
    """Look what a move would change. Raises BadTable."""
    note = printable(flags.note)[:NOTE]
    return moves.plan(connection, settings, asked, to, back=back, note=note, force=flags.force)


def _await_the_last(connection: Redis, made: MovePlan, seconds: float) -> int:
    """Wait for who has not followed the last move yet, so that no two of them are ahead of anybody. Raises Trouble.

    Returns the generation that everybody follows.
    """
    state, _ = moving.state(connection)
    generation = state.generation if state else 0
    report = Progress()
    found = follow_moves(connection, generation, made.seen.living, seconds, report)
    report.clear()
    late = [beat for beat in found.late if beat.is_alive]
    if late:
        why = f" ({late[0].moved_trouble})" if late[0].moved_trouble else ""
        raise Trouble(f"nobody was moved: {late[0].label} does not follow the last move yet{why}")
    return generation


def carry_out(connection: Redis, out: Output, made: MovePlan, flags: MoveFlags, command: str) -> int:
    """Make it a generation, and see who follows. Says no where some were kept, or somebody does not follow."""
    act = Act(
        command,
        before=_summed(made.formers[key] for key in made.wanted),
        after=made.to if command == MOVE else "",
        reason=flags.note,
        details={"count": str(len(made.wanted)), "addresses": " ".join(made.wanted)},
    )
    try:
        state, taken = _commit(connection, made, act, flags.seconds)
    except Lost as error:
        raise Trouble(f"nobody was moved: {error}; try again") from error
    except RedisError as error:
        raise CannotSay(
            f"it is not known whether they were moved: Redis has not answered; `smtp-dup moved` tells "
            f"({printable(str(error))})"
        ) from error
    kept = [Kept(key, why) for key, why in taken.items() if why]
    show_kept(out, kept)
    if others := [key for key, why in taken.items() if not why]:
        out.say(
            f"Somebody else has done that meanwhile: {formatting.some(others)}.",
            {"kind": "already", "addresses": others},
        )
    count = len(made.wanted) - len(taken)
    if not count:
        return NO if kept else max(told(connection, out, made, state, flags.seconds), NO if made.kept else WELL)
    addresses = formatting.count(count, "address", "addresses")
    done = {MOVE: f"Moved {addresses} to {made.to}", MOVE_BACK: f"Moved {addresses} back"}
    out.say(
        f"{done.get(command, f'Took {addresses} out of the map')} at {formatting.time_of_day(state.at)}, "
        f"generation {state.generation}: it holds whatever becomes of this command.",
        {
            "kind": "moved",
            "generation": state.generation,
            "count": count,
            "to": made.to if command == MOVE else "",
            "at": state.at,
        },
    )
    return max(told(connection, out, made, state, flags.seconds), NO if kept or made.kept else WELL)


def _commit(connection: Redis, made: MovePlan, act: Act, seconds: float) -> tuple[MapState, dict[str, str]]:
    """Make it a generation once everybody follows the last one, also where others move mailboxes meanwhile."""
    for _ in range(_AGAIN):
        after = _await_the_last(connection, made, seconds)
        with suppress(NotFollowed):
            return moving.commit(connection, made.wanted, made.before, made.known, act, after)
    raise Lost("others move mailboxes all the time: nothing was moved")


def told(connection: Redis, out: Output, made: MovePlan, state: MapState, seconds: float) -> int:
    """Say who follows. Says no when somebody who lives does not."""
    report = Progress()
    try:
        found = follow_moves(connection, state.generation, made.seen.living, seconds, report)
    except RedisError as error:
        raise CannotSay(
            f"moved (generation {state.generation}), but Redis does not answer any more: who follows cannot be said; "
            f"each process follows when it reaches Redis; `smtp-dup topology` tells ({printable(str(error))})"
        ) from error
    report.clear()
    if out.as_json:
        out.object({"kind": "followed", "generation": state.generation, **found.as_object()})
        return NO if found.late else WELL
    many = changeover.processes(len(found.followed) + len(found.late))
    out.line(f"{len(found.followed)} of {many} follow{'s' * many.startswith('1 ')}.")
    for beat in found.late:
        why = f" ({beat.moved_trouble})" if beat.moved_trouble else f", last heard {formatting.span(beat.age)} ago"
        out.line(
            f"{beat.label} has not followed{why}: there the former server answers; it follows when it reaches Redis."
        )
    for beat in found.dead:
        out.line(f"{beat.label} is dead, last heard {formatting.span(beat.age)} ago: it follows at its start.")
    return NO if found.late else WELL


def show_kept(out: Output, kept: Sequence[Kept]) -> None:
    """Say who is not moved, and why."""
    for one in kept:
        out.say(f"not moved: {one.address}: {one.why}", {"kind": "not moved", "address": one.address, "why": one.why})


def _summed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
