"""A promotion in words: what it would do, what to know before, and what has become of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from relay.cockpit import readiness, words
from relay.cockpit.finding import Result
from relay.cockpit.readiness import Verdict
from relay.config.model import Settings
from relay.topology.promotion import Followed, Plan
from relay.topology.state import Topology


def verdict(connection: Any, settings: Settings, made: Plan) -> Verdict | None:
    """Return whether the server is ready; None for the one that is the primary, in the eyes of some."""
    try:
        return readiness.verdict(connection, settings, made.new.name)
    except readiness.UnknownBackup:
        return None


def plan(made: Plan, judged: Verdict | None) -> Iterator[tuple[str, str]]:
    """Yield what would change as names and values; an empty name goes on with the one before."""
    seen, new, old, demoted = made.seen, made.new, made.old, made.demoted
    how = [f"sender={demoted.sender}", *(["soft_bounce"] * demoted.soft_bounce)] if demoted else []
    yield "primary", f"{new.name} ({new.address}) answers, instead of {old}"
    yield "copies", f"{old} ({demoted.address}) gets them: {' '.join(how)}" if demoted else "as before"
    for other in made.backups:
        if other not in {old, new.name}:
            yield "", f"{other} gets them as before"
    yield "epoch", f"{seen.epoch} -> {made.epoch}"
    if judged is not None:
        yield from _readiness(judged)
    yield "processes", ", ".join(beat.label for beat in seen.living) or "none lives: each follows at its start"
    for beat in seen.dead:
        yield "dead", f"{beat.label}, last heard {words.span(beat.age)} ago: it follows at its start"
    for text in remarks(made):
        yield "note", text


def _readiness(judged: Verdict) -> Iterator[tuple[str, str]]:
    """Yield the verdict, and what keeps it from being a better one."""
    yield "readiness", judged.summary
    for result in (Result.FAIL, Result.UNKNOWN, Result.WARN):
        for one in judged.having(result):
            yield "", f"{result.value}: {one.criterion.name}: {one.finding.text}"


def remarks(made: Plan) -> Iterator[str]:
    """Yield what to know before."""
    new, name = made.new, made.new.name
    if made.pending:
        copies = "1 older copy is" if made.pending == 1 else f"{made.pending} older copies are"
        yield f"{copies} still on the way to {name}: users may see newer mail first"
    if new.scheme == "lmtp":
        yield f"{name} speaks LMTP: a message is taken for one recipient at a time"
    if made.demoted is None and made.old != name:
        yield f"these settings do not name {made.old}: it gets no copies from a host with these settings"
    if made.seen.highest > made.seen.epoch:
        yield "Redis holds older data than the relay processes have seen: this decision holds over both"
    if made.seen.nonsense:
        yield f"what Redis holds as topology makes no sense and is replaced: {made.seen.nonsense}"


def outcome(made: Plan, topology: Topology, found: Followed) -> Iterator[str]:
    """Yield who follows, and who does not."""
    since, count = clock(topology.now.at), len(found.followed)
    name, old = made.new.name, made.old
    if count:
        yield f"{name} answers since {since} on {count} of {processes(count + len(found.late))}."
    else:
        yield f"{name} answers from the next start of a relay on."
    if found.finishing:
        yield f"At {old} until its end: {words.count(found.finishing, 'message')} that had begun there."
    for beat in found.late:
        why = f" ({beat.trouble})" if beat.trouble else ""
        yield (
            f"{beat.label} has not followed{why}: its mail still goes to {beat.primary or old}, copies to {name}; it "
            "follows when it reaches Redis."
        )
    for beat in found.dead:
        yield f"{beat.label} is dead, last heard {words.span(beat.age)} ago: it follows at its start."


def processes(number: int) -> str:
    """Return a number of processes in words."""
    return words.count(number, "process", "processes")


def clock(at: float) -> str:
    """Return a time of today."""
    return time.strftime("%H:%M:%S", time.localtime(at))
