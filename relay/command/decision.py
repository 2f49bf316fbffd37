"""A decision about who answers, as promote, route weight and route reset show, ask for and carry it out; and `undo`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

from redis import Redis
from redis.exceptions import RedisError

from relay.cockpit import changeover, formatting
from relay.cockpit.readiness import Verdict
from relay.command import prompt
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, CannotSay, Misuse, Trouble, read_flag
from relay.command.output import Output
from relay.command.progress import Progress
from relay.config.model import Settings
from relay.config.types import duration
from relay.mail.text import printable
from relay.topology import promotion
from relay.topology.decisions import Overtaken
from relay.topology.followers import Followed, follow
from relay.topology.promotion import Impossible, Plan, Unprepared
from relay.topology.state import Intent, Topology


class How(TypedDict):
    """The flags that all decisions have."""

    dry_run: bool
    wait: str
    now: bool
    reason: str
    yes: bool


def decide(
    settings: Settings,
    out: Output,
    plan: Callable[[Redis], Plan],
    *,
    must_be_ready: bool = False,
    force: bool = False,
    **how: Unpack[How],
) -> int:
    """Show what a decision would do, ask, and carry it out; ``force`` passes over a server that is not ready."""
    seconds = seconds_of(how["wait"])
    with ledger_of(settings) as connection:
        try:
            made = plan(connection)
        except Impossible as error:
            raise Misuse(str(error)) from error
        if made.agree:
            return _nothing_to_do(out, made)
        verdict = changeover.verdict(connection, settings, made)
        _show_plan(out, made, verdict)
        details = {"readiness": verdict.summary} if verdict else {}
        if must_be_ready and verdict and not verdict.is_ready:
            if how["dry_run"]:
                return NO
            if not force:
                name = verdict.name
                raise Trouble(f"{name} is not ready: see `smtp-dup ready {name}`, or say --force --reason TEXT")
            details["forced"] = "yes"
        return _agreed(connection, out, made, details, seconds, how)


def undo(settings: Settings, out: Output, **how: Unpack[How]) -> int:
    """Make the primary before the last change the primary again."""
    seconds = seconds_of(how["wait"])
    with ledger_of(settings) as connection:
        try:
            made = promotion.plan_undo(connection, settings)
        except Impossible as error:
            raise Trouble(str(error)) from error
        _show_plan(out, made, None)
        return _agreed(connection, out, made, {}, seconds, how)


def seconds_of(wait: str) -> float:
    """Read ``--wait``. Raises Misuse."""
    seconds: float = read_flag("--wait", duration().read, wait)
    return seconds


# The steps ------------------------------------------------------------------------------------------------------


def _agreed(connection: Redis, out: Output, made: Plan, details: dict[str, str], seconds: float, how: How) -> int:
    """Carry it out, unless nobody wants that: the name must be typed. Raises Misuse where nobody is there."""
    if how["dry_run"]:
        return WELL
    what = "the server that shall answer" if made.title == made.new.name else "the route"
    if not how["yes"] and not prompt.ask_for_word(made.title, f"Type the name of {what} ({made.title})"):
        return NO
    return _carry_out(connection, out, made, how["reason"], details, seconds, at_once=how["now"])


def _carry_out(
    connection: Redis, out: Output, made: Plan, reason: str, details: dict[str, str], seconds: float, *, at_once: bool
) -> int:
    """Prepare, decide and see who follows. Says no when somebody who lives does not. Raises Trouble, CannotSay."""
    report = Progress()
    intent = None
    try:
        if not at_once:
            intent = promotion.prepare(connection, made, seconds, report)
            report.clear()
            out.say(changeover.prepared(made), {"kind": "prepared"})
    except Unprepared as error:
        report.clear()
        for line in error.lines:
            out.say(line, {"kind": "trouble", "text": line})
        raise Trouble(str(error)) from error
    except Overtaken as error:
        raise Trouble(f"nothing has changed: {error}") from error
    topology = _commit(connection, made, reason, details, intent)
    at = formatting.time_of_day(topology.now.at)
    out.say(
        f"{changeover.done(made)} at {at}, epoch {topology.epoch}: it holds whatever becomes of this command.",
        {
            "kind": "promoted",
            "epoch": topology.epoch,
            "primary": _answering(made, topology),
            "at": topology.now.at,
            **_route_of(made),
        },
    )
    try:
        return _told(out, made, topology, follow(connection, made, seconds, report), report)
    except RedisError as error:
        report.clear()
        raise CannotSay(
            f"{changeover.done(made).lower()} (epoch {topology.epoch}), but Redis does not answer any more: who "
            f"follows cannot be said; each process follows when it reaches Redis; `smtp-dup topology` tells "
            f"({printable(str(error))})"
        ) from error


def _commit(connection: Redis, made: Plan, reason: str, details: dict[str, str], intent: Intent | None) -> Topology:
    try:
        return promotion.commit(connection, made, reason, details, intent)
    except Overtaken as error:
        raise Trouble(f"nothing has changed: {error}") from error
    except RedisError as error:
        raise CannotSay(
            f"it is not known whether that was decided: Redis has not answered; `smtp-dup topology` tells "
            f"({printable(str(error))})"
        ) from error


def _told(out: Output, made: Plan, topology: Topology, found: Followed, report: Progress) -> int:
    """Say who follows. Says no when somebody who lives does not, or somebody has decided otherwise since."""
    report.clear()
    if out.as_json:
        out.object(
            {
                "kind": "followed",
                "epoch": topology.epoch,
                "primary": _answering(made, topology),
                **found.as_object(),
                "finishing": found.finishing,
                "overtaken": found.overtaken.epoch if found.overtaken else None,
                **_route_of(made),
            }
        )
    else:
        for line in changeover.outcome(made, topology, found):
            out.line(line)
    return WELL if found.is_well else NO


# What is shown --------------------------------------------------------------------------------------------------


def _show_plan(out: Output, made: Plan, verdict: Verdict | None) -> None:
    """Show what would change."""
    if out.as_json:
        seen, new, old = made.seen, made.new, made.old
        out.object(
            {
                "kind": "plan",
                "primary": new.name,
                "former": old,
                "backups": _copied(made),
                "epoch": made.epoch,
                "pending": made.pending,
                "readiness": verdict.summary if verdict else None,
                "processes": [beat.label for beat in seen.living],
                "dead": [beat.label for beat in seen.dead],
                "remarks": list(changeover.remarks(made)),
                **_route_of(made),
            }
        )
        return
    out.pairs(changeover.plan(made, verdict))


def _nothing_to_do(out: Output, made: Plan) -> int:
    """Say that it is so already."""
    name = made.new.name
    out.say(changeover.nothing_to_do(made), {"kind": "nothing", "primary": name, **_route_of(made)})
    return WELL


def _answering(made: Plan, topology: Topology) -> str:
    """Return the name of who answers first from now on, for all mail or on the route that it is about."""
    return made.new.name if made.change else topology.primary


def _copied(made: Plan) -> Sequence[str]:
    """Return the names of those that get copies beside that one."""
    if made.change is None or made.change.is_forgotten:
        return made.backups
    return [name for name in dict.fromkeys(made.change.after.copied) if name != made.new.name]


def _route_of(made: Plan) -> dict[str, object]:
    """Return, for a program, the route that it is about."""
    change = made.change
    if change is None:
        return {}
    after = change.after
    weights = dict(zip(after.servers, after.weights, strict=True)) if after.weights else None
    return {"route": after.name, "servers": after.servers, "weights": weights, "copied": after.copied}
