"""A promotion in words: what it would do, what to know before, and what has become of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from relay.cockpit import evidence_from_redis, formatting, readiness
from relay.cockpit.finding import Result
from relay.cockpit.readiness import Verdict
from relay.config.model import Settings
from relay.config.routes import Route
from relay.topology import promotion
from relay.topology.followers import Followed
from relay.topology.promotion import PROMOTE, UNDO, Plan, RouteChange
from relay.topology.state import Topology


def verdict(connection: Any, settings: Settings, made: Plan) -> Verdict | None:
    """Return whether the server is ready; None for who answers already, in the eyes of some, or has had no copies."""
    change = made.change
    name, old = made.new.name, ""
    answering: tuple[str, ...] = ()
    if change is not None:
        joining = [name for name in change.after.answering if name not in change.route.answering]
        name = made.new.name if made.new.name in joining or not joining else joining[0]
        old, answering = made.old, change.route.answering
        if name == old or name not in change.route.copied:
            return None
    try:
        return readiness.verdict(connection, settings, name, old, answering, change.route.name if change else "")
    except evidence_from_redis.UnknownBackup:
        return None


def plan(made: Plan, judged: Verdict | None) -> Iterator[tuple[str, str]]:
    """Yield what would change as names and values; an empty name goes on with the one before."""
    seen = made.seen
    yield from _on_route(made, made.change) if made.change else _by_default(made)
    yield "epoch", f"{seen.epoch} -> {made.epoch}"
    if judged is not None:
        yield from _readiness(judged)
    yield "processes", ", ".join(beat.label for beat in seen.living) or "none lives: each follows at its start"
    for beat in seen.dead:
        yield "dead", f"{beat.label}, last heard {formatting.span(beat.age)} ago: it follows at its start"
    for text in remarks(made):
        yield "note", text


def _by_default(made: Plan) -> Iterator[tuple[str, str]]:
    new, old, demoted = made.new, made.old, made.demoted
    how = [f"sender={demoted.sender}", *(["soft_bounce"] * demoted.soft_bounce)] if demoted else []
    yield "primary", f"{new.name} ({new.address}) answers, instead of {old}"
    yield "copies", f"{old} ({demoted.address}) gets them: {' '.join(how)}" if demoted else "as before"
    for other in made.backups:
        if other not in {old, new.name}:
            yield "", f"{other} gets them as before"


def _on_route(made: Plan, change: RouteChange) -> Iterator[tuple[str, str]]:
    before, after = change.route, change.after
    yield "route", after.name
    if change.is_forgotten:
        yield "forgotten", f"that it was decided to be {answering(before)}: these settings have no such route"
        return
    yield "primary", f"{answering(after)}, instead of {answering(before)}"
    copied = [name for name in after.copied if len(after.servers) > 1 or name not in after.servers]
    yield "copies", ", ".join(dict.fromkeys(copied)) or "none"
    if made.demoted is not None and made.old not in before.copied:
        yield "", f"{made.old} gets them: sender={made.demoted.sender}"


def answering(route: Route) -> str:
    """Return who answers on a route: "a, then b", "a 10 %, b 90 %"."""
    if not route.weights:
        return ", then ".join(route.servers)
    whole = sum(route.weights)
    shares = zip(route.servers, route.weights, strict=True)
    return ", ".join(f"{name} {100 * weight / whole:.3g} %" for name, weight in shares)


def _readiness(judged: Verdict) -> Iterator[tuple[str, str]]:
    """Yield the verdict, and what keeps it from being a better one."""
    yield "readiness", judged.summary
    for result in (Result.FAIL, Result.UNKNOWN, Result.WARN):
        for one in judged.having(result):
            yield "", f"{result.value}: {one.criterion.name}: {one.finding.text}"


def remarks(made: Plan) -> Iterator[str]:
    """Yield what to know before."""
    new, name = made.new, made.new.name
    if made.change:
        yield from _remarks_on_route(made, made.change)
    if made.pending:
        copies = "1 older copy is" if made.pending == 1 else f"{made.pending} older copies are"
        yield f"{copies} still on the way to {name}: users may see newer mail first"
    if new.scheme == "lmtp":
        yield f"{name} speaks LMTP: a message is taken for one recipient at a time"
    if made.demoted is None and made.old != name and made.change is None:
        yield f"these settings do not name {made.old}: it gets no copies from a host with these settings"
    yield from _remarks_on_moved(made)
    if made.seen.highest > made.seen.epoch:
        yield "Redis holds older data than the relay processes have seen: this decision holds over both"
    if made.seen.nonsense:
        yield f"what Redis holds as topology makes no sense and is replaced: {made.seen.nonsense}"


def _remarks_on_moved(made: Plan) -> Iterator[str]:
    moved = made.seen.moves.servers if made.seen.moves else {}
    name = made.new.name
    for server, number in moved.items():
        mailboxes = formatting.count(number, "address has", "addresses have")
        if server != name:
            yield f"{mailboxes} moved to {server}, and stay there"
        elif made.change is None:
            yield f"{mailboxes} moved to {name}: superfluous then, `smtp-dup move --all` clears that"


def _remarks_on_route(made: Plan, change: RouteChange) -> Iterator[str]:
    before, after = change.route, change.after
    for beat in promotion.other_defaults(made):
        yield f"{beat.label} has {beat.primary} as the primary by default: that is {made.default} from then on"
    if change.is_forgotten:
        return
    for name in after.answering:
        if name not in before.answering and name not in before.copied:
            yield f"{name} has got no copies of what others have answered for on this route"
    for name in before.answering:
        if name not in after.answering and name not in after.copied:
            yield f"{name} answers no more, and gets no copies: its mail is elsewhere from then on"
    if after.match.recipients.files:
        yield "an entry of a table that names a server of its own keeps it"
    if made.seen.topology is None and made.command != UNDO:
        yield f"{made.default} is the primary by default from then on, also if the settings change: promote does that"


def target(made: Plan) -> str:
    """Return what it leads to: "new", or "b on shop"."""
    if made.change is None:
        return made.new.name
    if made.change.is_forgotten:
        return f"what the settings say of {made.change.after.name}"
    who = made.new.name if made.command == PROMOTE else answering(made.change.after)
    return f"{who} on {made.change.after.name}"


def prepared(made: Plan) -> str:
    """Say that every process can do it."""
    if made.change and made.change.decided is None:
        return f"Prepared: {processes(len(made.seen.living))} can go by the settings."
    names = " and ".join(made.change.after.answering) if made.change else made.new.name
    return f"Prepared: {processes(len(made.seen.living))} can use {names}."


def done(made: Plan) -> str:
    """Say what has just been decided, to be followed by when."""
    return "Decided" if made.change and made.command != PROMOTE else "Promoted"


def nothing_to_do(made: Plan) -> str:
    """Say that it is so already."""
    if made.change:
        return f"{made.change.after.name} is so already, epoch {made.seen.epoch}: {answering(made.change.after)}."
    return f"{made.new.name} is the primary already, epoch {made.seen.epoch}."


def outcome(made: Plan, topology: Topology, found: Followed) -> Iterator[str]:
    """Yield who follows, and who does not."""
    since, count = formatting.time_of_day(topology.now.at), len(found.followed)
    if (later := found.overtaken) is not None:
        ago = formatting.span(later.now.at - topology.now.at)
        yield (
            f"Overtaken: {later.now.by or 'somebody'} {later.in_words()} {ago} later, and that holds "
            f"(epoch {later.epoch}); `smtp-dup topology` tells who follows."
        )
        return
    name, old = made.new.name, made.old
    who = f"On {made.change.after.name} {answering(made.change.after)} answers" if made.change else f"{name} answers"
    if made.change and made.change.is_forgotten:
        who = f"What was decided for {made.change.after.name} is forgotten"
    if count:
        yield f"{who} since {since} on {count} of {processes(count + len(found.late))}."
    else:
        yield f"{who} from the next start of a relay on."
    if found.finishing:
        begun = formatting.count(found.finishing, "message")
        yield (
            f"As it began until its end: {begun}."
            if made.change
            else f"At {old} until its end: {begun} that had begun there."
        )
    for beat in found.late:
        why = f" ({beat.trouble})" if beat.trouble else ""
        goes = (
            "its mail goes as before"
            if made.change
            else f"its mail still goes to {beat.primary or old}, copies to {name}"
        )
        yield f"{beat.label} has not followed{why}: {goes}; it follows when it reaches Redis."
    for beat in found.dead:
        yield f"{beat.label} is dead, last heard {formatting.span(beat.age)} ago: it follows at its start."


def processes(number: int) -> str:
    """Return a number of processes in words."""
    return formatting.count(number, "process", "processes")
