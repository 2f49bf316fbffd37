"""A look-up of the trace as people ask for it: times in their words, where a copy stands, and what was not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from relay.cockpit.formatting import moment
from relay.config.model import Settings
from relay.config.types import duration
from relay.trace import files, life, lookup
from relay.trace.life import CopyLife, MessageLife
from relay.trace.lookup import Query, Unseen
from relay.trace.remote_lookup import OtherHosts


def when(text: str, now: float) -> float:
    """Read a length of time before now, or a local time, as seconds since the epoch. Raises ValueError."""
    try:
        return now - float(duration().read(text))
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).astimezone().timestamp()
    except (ValueError, OverflowError):
        raise ValueError("expected a length of time (90s, 5m, 1h, 5d) or a time (2026-11-27T10:00)") from None


def search(
    settings: Settings, connection: Any, query: Query, report: Unseen, progress: Callable[[int, int], object] | None
) -> Iterator[MessageLife]:
    """Yield the messages that a query is about, of all hosts where Redis is there; see relay.trace.lookup.find."""
    return lookup.find(
        query,
        files.folder_of(settings.state_dir),
        connection=connection,
        others=OtherHosts.of_settings(settings, connection, report) if connection is not None else None,
        unseen=report,
        progress=progress,
    )


def life_of(settings: Settings, connection: Any, message_id: str) -> MessageLife | None:
    """Return the life of one message, None where nobody has kept a step of it."""
    others = OtherHosts.of_settings(settings, connection, Unseen())
    folder = files.folder_of(settings.state_dir)
    found: Sequence[MessageLife] = lookup.lives([message_id], folder, connection=connection, others=others)
    return next((each for each in found if each.events), None)


def stands(copy: CopyLife) -> str:
    """Return where a copy stands now, in words."""
    tries = f"after {copy.attempts} attempt{'s' * (copy.attempts != 1)}" if copy.attempts else "not tried yet"
    said = f": {copy.reply}" if copy.reply else ""
    if copy.held_until is not None:
        until = moment(copy.held_until)
        return f"held, since the primary may not have it; goes out {until} unless the client sends it again"
    if copy.status == life.WAITING:
        return f"{'on its way' if copy.is_busy else 'waiting'}, {tries}{said}"
    if copy.status == life.FAILED:
        return f"on the failed list since {moment(copy.at)}, {tries}{said}"
    if copy.status == life.LOST:
        return "lost"
    if copy.status == life.DELIVERED:
        return f"delivered, {tries}{said}"
    return f"in no list any more: dropped or moved by an operator, or the last step was not kept; {tries}{said}"


def unseen(report: Unseen) -> list[str]:
    """Return what a look-up could not see."""
    notes = [f"{name} did not answer: what it knows is missing" for name in dict.fromkeys(report.silent)]
    notes += [f"trace file {text}" for text in report.damaged]
    if report.no_ledger:
        notes.append(f"where copies stand now, and other hosts, could not be asked: {report.no_ledger}")
    return notes


def nothing(settings: Settings, report: Unseen) -> str:
    """Return why there may be nothing."""
    if not settings.trace.max_bytes:
        return "No trace is kept: trace.max_bytes is 0."
    if report.oldest is None:
        return "No trace is kept on this host so far."
    return f"Nothing found. The trace of this host begins {moment(report.oldest)}."
