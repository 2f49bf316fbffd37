"""`failed`: the copies that a backup refused or that were given up, and what an operator can do about them.

Message content is written by ``export`` only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from redis import Redis

from relay.command import prompt
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, Misuse
from relay.command.output import GREEN, RED, YELLOW, Column, Output, address, as_object, moment
from relay.config.loader import Settings
from relay.ledger import archive, changes
from workers.queues import failed

_FAILED = [
    Column("id", lambda r: r.id),
    Column("destination", lambda r: r.destination),
    Column("sender", lambda r: address(r.sender), detail=True),
    Column("recipients", lambda r: ", ".join(r.recipients), detail=True),
    Column("size", lambda r: str(r.size), numbers=True),
    Column("tries", lambda r: str(r.attempts), numbers=True),
    Column("failed", lambda r: moment(r.failed_at)),
    Column("reply", lambda r: r.reply, detail=True),
]


def listing(settings: Settings, out: Output, destination: str | None) -> int:
    """Show the failed copies."""
    with ledger_of(settings) as connection:
        out.rows(failed.listing(connection, destination), _FAILED, nothing="Nothing has failed.")
    return WELL


def show(settings: Settings, out: Output, id: str) -> int:  # noqa: A002 - as the argument is called
    """Show a failed message: each of its failed copies and what was said at each attempt."""
    with ledger_of(settings) as connection:
        details = failed.show(connection, id)
    for number, detail in enumerate(details):
        if out.as_json:
            history = [{"at": at, "reply": reply} for at, reply in detail.history]
            out.object({**as_object(detail), "history": history})
            continue
        if number:
            out.line("")
        out.pairs(
            (
                ("id", detail.id),
                ("destination", detail.destination),
                ("sender", address(detail.sender)),
                ("recipients", ", ".join(detail.recipients)),
                ("size", f"{detail.size} bytes"),
                ("received", f"{moment(detail.received_at)} from {detail.client_address or 'unknown'}"),
                ("failed", moment(detail.failed_at)),
                ("attempts", str(detail.attempts)),
                *(("", f"{moment(at)}  {reply}") for at, reply in detail.history),
            )
        )
    return WELL


def retry(
    settings: Settings, out: Output, ids: tuple[str, ...], everything: bool, destination: str | None, wait: bool
) -> int:
    """Have failed copies tried again; with ``wait`` say what became of each, and no unless all are delivered."""
    wanted = _wanted(ids, everything)
    with ledger_of(settings) as connection:
        before = failed.attempts(connection, wanted, destination) if wait else {}
        count = failed.retry(
            connection, wanted, destination, archive.folder(settings.state_dir), settings.workers.job_size
        )
        out.count("retried", count, "{} will be tried again now.")
        if not wait:
            return WELL
        sys.stdout.flush()
        found: list[Outcome] = []
        out.rows(_keep(found, _outcomes(connection, before)), _OUTCOMES, nothing="")
    return WELL if all(outcome.outcome == "delivered" for outcome in found) else NO


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a copy that was tried again."""

    id: str
    destination: str
    outcome: str
    reply: str


_COLOURS = {"delivered": GREEN, "failed": RED}
_OUTCOMES = [
    Column("id", lambda r: r.id),
    Column("destination", lambda r: r.destination),
    Column("outcome", lambda r: r.outcome, colour=lambda r: _COLOURS.get(r.outcome, YELLOW)),
    Column("reply", lambda r: r.reply or "-", detail=True),
]
_WAIT_SECONDS = 60.0
_LOOK_EVERY = 0.2
_BATCH = 500  # copies asked about at once


def _keep(found: list[Outcome], outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
    for outcome in outcomes:
        found.append(outcome)
        yield outcome


def _outcomes(connection: Redis, before: dict[tuple[str, str], int]) -> Iterator[Outcome]:
    """Yield what became of copies, each once its attempt has ended, or when the patience has."""
    end = time.monotonic() + _WAIT_SECONDS
    rest = dict(before)
    while rest:
        keys = list(rest)
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            for key, (outcome, reply) in zip(batch, failed.fates(connection, batch, rest), strict=True):
                is_over = time.monotonic() > end
                if outcome or is_over:
                    del rest[key]
                    yield Outcome(key[1], key[0], outcome or "not tried yet", reply)
        if rest:
            time.sleep(_LOOK_EVERY)


def drop(
    settings: Settings, out: Output, ids: tuple[str, ...], everything: bool, destination: str | None, yes: bool
) -> int:
    """Forget failed copies, after a question."""
    wanted = _wanted(ids, everything)
    with ledger_of(settings) as connection:
        if not yes and not _is_sure(connection, wanted, destination):
            return NO
        count = failed.drop(connection, wanted, destination)
    out.count("dropped", count, "{} dropped.")
    return WELL


def export(settings: Settings, id: str) -> int:  # noqa: A002 - as the argument is called
    """Write a failed message to standard output, byte for byte."""
    with ledger_of(settings) as connection:
        failed.show(connection, id)  # or it is not failed
        content = failed.export(connection, id, archive.folder(settings.state_dir))
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
    return WELL


def _wanted(ids: tuple[str, ...], everything: bool) -> list[str] | None:
    """Return the ids on the command line, None for all. Raises Misuse unless it is one of the two."""
    if bool(ids) == everything:
        raise Misuse("give the ids of failed messages, or --all" + (", not both" if ids else ""))
    return None if everything else list(ids)


def _is_sure(connection: Redis, ids: list[str] | None, destination: str | None) -> bool:
    rows = [r for r in changes.summary(connection) if destination in {None, r.destination}]
    what = f"{len(ids)} failed message(s)" if ids else f"{sum(r.failed for r in rows)} failed copies, all there are"
    of = f" of {destination}" if destination else ""
    return prompt.ask(f"Drop {what}{of} for good?")
