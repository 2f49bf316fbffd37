"""`promote` and `undo`: the switch to another server without a restart."""

from __future__ import annotations

import sys

from redis import Redis
from redis.exceptions import RedisError

from relay.cockpit import changeover
from relay.cockpit.readiness import Verdict
from relay.command import prompt
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, CannotSay, Misuse, Trouble
from relay.command.output import Output
from relay.config.loader import Settings
from relay.config.types import duration
from relay.mail.text import printable
from relay.topology import decisions, promotion
from relay.topology.decisions import Overtaken
from relay.topology.promotion import Followed, Impossible, Plan, Unprepared
from relay.topology.state import Intent, Topology


def promote(
    settings: Settings,
    out: Output,
    name: str | None,
    dry_run: bool,
    wait: str,
    cancel: bool,
    now: bool,
    force: bool,
    reason: str,
    yes: bool,
) -> int:
    """Make a backup the primary, and the primary a backup, while mail goes on."""
    if cancel:
        if name:
            raise Misuse("--cancel ends whatever is being prepared: without a name")
        return _cancel(settings, out)
    if not name:
        raise Misuse("which server? smtp-dup promote NAME")
    if force and not reason:
        raise Misuse("--force needs --reason TEXT: it is kept with the change")
    seconds = _seconds(wait)
    with ledger_of(settings) as connection:
        try:
            made = promotion.plan(connection, settings, name)
        except Impossible as error:
            raise Misuse(str(error)) from error
        if made.agree:
            return _nothing_to_do(out, made)
        verdict = changeover.verdict(connection, settings, made)
        _show_plan(out, made, verdict)
        if dry_run:
            return WELL if verdict is None or verdict.is_ready else NO
        is_forced = verdict is not None and not verdict.is_ready
        if is_forced and not force:
            raise Trouble(f"{name} is not ready: see `smtp-dup ready {name}`, or say --force --reason TEXT")
        if not yes and not _confirmed(made):
            return NO
        details = ({"readiness": verdict.summary} if verdict else {}) | ({"forced": "yes"} if is_forced else {})
        return _carry_out(connection, out, made, reason, details, seconds, at_once=now)


def undo(settings: Settings, out: Output, dry_run: bool, wait: str, now: bool, reason: str, yes: bool) -> int:
    """Make the primary before the last change the primary again."""
    seconds = _seconds(wait)
    with ledger_of(settings) as connection:
        try:
            made = promotion.plan_undo(connection, settings)
        except Impossible as error:
            raise Trouble(str(error)) from error
        _show_plan(out, made, None)
        if dry_run:
            return WELL
        if not yes and not _confirmed(made):
            return NO
        return _carry_out(connection, out, made, reason, {}, seconds, at_once=now)


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


def _seconds(wait: str) -> float:
    try:
        return float(duration().read(wait))
    except ValueError as error:
        raise Misuse(f"--wait: {error}") from None


# The steps ------------------------------------------------------------------------------------------------------


def _confirmed(made: Plan) -> bool:
    """Have the name typed. Raises Misuse where nobody is there."""
    return prompt.ask_for_word(made.new.name, f"Type the name of the server that shall answer ({made.new.name})")


def _carry_out(
    connection: Redis, out: Output, made: Plan, reason: str, details: dict[str, str], seconds: float, *, at_once: bool
) -> int:
    report = _Progress(out)
    intent = None
    try:
        if not at_once:
            intent = promotion.prepare(connection, made, seconds, report)
            report.end(f"Prepared: {changeover.processes(len(made.seen.living))} can use {made.new.name}.")
    except Unprepared as error:
        report.clear()
        for line in error.lines:
            _say(out, line, {"kind": "trouble", "text": line})
        raise Trouble(str(error)) from error
    except Overtaken as error:
        raise Trouble(f"nothing has changed: {error}") from error
    topology = _commit(connection, made, reason, details, intent)
    at = changeover.clock(topology.now.at)
    _say(
        out,
        f"Promoted at {at}, epoch {topology.epoch}: it holds whatever becomes of this command.",
        {"kind": "promoted", "epoch": topology.epoch, "primary": topology.primary, "at": topology.now.at},
    )
    try:
        return _told(out, made, topology, promotion.follow(connection, made, seconds, report), report)
    except RedisError as error:
        report.clear()
        raise CannotSay(
            f"promoted (epoch {topology.epoch}), but Redis does not answer any more: who follows cannot be said; each "
            f"process follows when it reaches Redis; `smtp-dup topology` tells ({printable(str(error))})"
        ) from error


def _commit(connection: Redis, made: Plan, reason: str, details: dict[str, str], intent: Intent | None) -> Topology:
    try:
        return promotion.commit(connection, made, reason, details, intent)
    except Overtaken as error:
        raise Trouble(f"nothing has changed: {error}") from error
    except RedisError as error:
        raise CannotSay(
            f"it is not known whether {made.new.name} was promoted: Redis has not answered; `smtp-dup topology` tells "
            f"({printable(str(error))})"
        ) from error


def _told(out: Output, made: Plan, topology: Topology, found: Followed, report: _Progress) -> int:
    """Say who follows. Says no when somebody who lives does not."""
    report.clear()
    if out.as_json:
        out.object(
            {
                "kind": "followed",
                "epoch": topology.epoch,
                "primary": topology.primary,
                "followed": [beat.label for beat in found.followed],
                "late": [beat.label for beat in found.late],
                "dead": [beat.label for beat in found.dead],
                "finishing": found.finishing,
            }
        )
    else:
        for line in changeover.outcome(made, topology, found):
            out.line(line)
    return NO if found.late else WELL


class _Progress:
    """One line on the terminal that changes; without a terminal nothing."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._shown = ""

    def __call__(self, text: str) -> None:
        if text != self._shown and sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{printable(text)}")
            sys.stderr.flush()
            self._shown = text

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = ""

    def end(self, text: str) -> None:
        """Say how a step has ended."""
        self.clear()
        _say(self._out, text, {"kind": "prepared"})


def _say(out: Output, text: str, value: dict[str, object]) -> None:
    if out.as_json:
        out.object(value)
    else:
        out.line(text)


# What is shown --------------------------------------------------------------------------------------------------


def _show_plan(out: Output, made: Plan, verdict: Verdict | None) -> None:
    if out.as_json:
        seen, new, old = made.seen, made.new, made.old
        out.object(
            {
                "kind": "plan",
                "primary": new.name,
                "former": old,
                "backups": made.backups,
                "epoch": made.epoch,
                "pending": made.pending,
                "readiness": verdict.summary if verdict else None,
                "processes": [beat.label for beat in seen.living],
                "dead": [beat.label for beat in seen.dead],
                "remarks": list(changeover.remarks(made)),
            }
        )
        return
    out.pairs(changeover.plan(made, verdict))


def _nothing_to_do(out: Output, made: Plan) -> int:
    name = made.new.name
    _say(out, f"{name} is the primary already, epoch {made.seen.epoch}.", {"kind": "nothing", "primary": name})
    return WELL
