"""`trace`: what became of a message, step by step and in the words of both servers."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from redis import Redis

from relay.cockpit import tracing
from relay.cockpit.formatting import address, moment
from relay.cockpit.formatting import duration as short
from relay.command.command_line import tell
from relay.command.connection import ledger_of
from relay.command.exit_status import CANNOT_SAY, NO, WELL, CannotSay, Misuse, read_flag
from relay.command.long_runs import slow_progress
from relay.command.output import (
    BOLD,
    DIM,
    GREEN,
    RED,
    YELLOW,
    Output,
    cells_of,
    fold,
    terminal_width,
)
from relay.config.loader import Settings
from relay.mail.text import count, printable
from relay.trace import life
from relay.trace.life import MessageLife, Step
from relay.trace.lookup import Query, Unseen
from relay.trace.privacy import shown
from relay.trace.search_terms import NoWord

_COLOURS = {life.GOOD: GREEN, life.LATER: YELLOW, life.BAD: RED, life.PLAIN: ""}
_OF_STATUS = {life.DELIVERED: GREEN, life.WAITING: YELLOW, life.GONE: YELLOW}
_WHO = 18  # columns of a server's name; a longer one has a line of its own
_SHOWN = 5  # recipients in the head


def show(
    settings: Settings,
    out: Output,
    what: tuple[str, ...],
    since: str | None,
    until: str | None,
    status: str | None,
    limit: int,
) -> int:
    """Show the messages that are meant; says no where there is none."""
    now = time.time()
    when = partial(tracing.when, now=now)
    begin = read_flag("--since", when, since) if since else 0.0
    end = read_flag("--until", when, until) if until else float("inf")
    try:
        query = Query.of(what, since=begin, until=end, status=status, limit=limit)
    except NoWord as error:
        raise Misuse(str(error)) from None
    report = Unseen()
    count = 0
    with _ledger(settings, report) as connection, slow_progress("looking through the trace") as progress:
        found = tracing.search(settings, connection, query, report, progress)
        for message in found:
            if out.as_json:
                out.object(as_object(message))
            else:
                _show(out, message, is_first=not count)
            count += 1
    _tell(settings, out, report, query, count)
    if count:
        return WELL
    return CANNOT_SAY if report.damaged or report.silent or (report.no_ledger and not report.files) else NO


@contextlib.contextmanager
def _ledger(settings: Settings, report: Unseen) -> Iterator[Redis | None]:
    """Connect to the ledger; without it the files are answered from all the same."""
    with contextlib.ExitStack() as ends:
        connection = None
        try:
            connection = ends.enter_context(ledger_of(settings))
        except CannotSay as error:
            report.no_ledger = str(error)
        yield connection


def _tell(settings: Settings, out: Output, report: Unseen, query: Query, count: int) -> None:
    """Say what could not be seen, and where nothing was found, why that may be."""
    for note in tracing.unseen(report):
        tell(note)
    if out.as_json:
        return
    if count >= query.limit:
        out.line(f"The newest {count} are shown; --limit shows more, --since and --until other ones.")
    if count:
        return
    out.line(tracing.nothing(settings, report))


# One message -----------------------------------------------------------------------------------------------------


def as_object(message: MessageLife) -> dict[str, Any]:
    """Return a message as its JSON object."""
    heard = message.received
    return {
        "id": message.id,
        "at": message.at,
        "status": message.status,
        "sender": message.sender,
        "recipients": list(message.recipients),
        "refused": [
            {"recipient": shown(one.recipient), "reply": one.reply, "own": one.is_own} for one in heard.refused
        ] if heard else [],
        "message_id": message.message_id,
        "client": heard.client if heard else "",
        "helo": heard.helo if heard else "",
        "size": heard.size if heard else None,
        "primary": heard.primary if heard else "",
        "route": heard.route if heard else "",
        "outcome": heard.outcome if heard else "",
        "reply": heard.reply if heard else "",
        "seconds": heard.seconds if heard else None,
        "staged": heard.stage if heard else "",
        "copies": [
            {"destination": copy.destination, "status": copy.status, "attempts": copy.attempts, "reply": copy.reply,
             "at": copy.at}
            for copy in message.copies
        ],
        "timeline": [
            {"at": step.at, "who": step.who, "text": step.text, "seconds": step.seconds, "result": step.result}
            for step in message.timeline()
        ],
    }  # fmt: skip


def _show(out: Output, message: MessageLife, *, is_first: bool) -> None:
    if not is_first:
        out.line("")
    paint = out.painter()
    width = 0 if out.wide or not sys.stdout.isatty() else terminal_width()
    status = paint(message.status, _OF_STATUS.get(message.status, RED))
    sys.stdout.write(f"{paint(message.id, BOLD)}  {moment(message.at)}  {status}\n")
    _fold(out, "  ", message.message_id, width, "")
    heard = message.received
    if heard:
        some = [address(one) for one in message.recipients[:_SHOWN]]
        more = heard.count - len(some)
        to = ", ".join([*some, *([f"{more} more" if some else count(more, "recipient")] if more > 0 else [])])
        _fold(out, "  ", f"from {address(message.sender)} to {to or '-'}", width, "")
        _fold(out, "  ", f"route {heard.route}" if heard.route else "", width, "")
    else:
        _fold(out, "  ", "what the client heard is not kept on a host that answers", width, DIM)
    steps = message.timeline()
    who = min(_WHO, max((cells_of(step.who) for step in steps), default=0))
    days = {time.strftime("%F", time.localtime(step.at)) for step in steps}
    for step in steps:
        _show_step(out, step, who, width, with_day=len(days) > 1)
    for copy in message.copies:
        if copy.status != life.DELIVERED:
            colour = _OF_STATUS.get(copy.status, RED)
            _fold(out, "  ", f"{copy.destination} now: {tracing.stands(copy)}", width, colour)


def _show_step(out: Output, step: Step, who: int, width: int, *, with_day: bool) -> None:
    at = time.strftime("%F %T" if with_day else "%T", time.localtime(step.at)) + f".{int(step.at % 1 * 1000):03d}"
    took = short(step.seconds) if step.seconds is not None else ""
    name = printable(step.who)
    front = f"  {at}  {took:>7}  {name}{' ' * (who - cells_of(name))}  "
    if cells_of(name) > who:
        sys.stdout.write(front.rstrip() + "\n")
        front = " " * (len(at) + who + 15)
    _fold(out, front, step.text, width, _COLOURS[step.result])


def _fold(out: Output, front: str, text: str, width: int, colour: str) -> None:
    """Write a text behind its front, folded below itself where the terminal is narrow."""
    if not text:
        return
    paint = out.painter()
    room = width - cells_of(front)
    lines = fold(printable(text), room) if width and room >= 20 else [printable(text)]
    for n, line in enumerate(lines):
        sys.stdout.write((front if not n else " " * cells_of(front)) + paint(line, colour) + "\n")
