"""The trace: any message by its id, Message-ID, sender, recipient, domain, or the queue id that a server gave."""

from __future__ import annotations

import asyncio
import math
import shlex
import time
from functools import partial

from redis import Redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.cockpit import tracing
from relay.config.model import Settings
from relay.page.access import viewer
from relay.page.views.shell import context_of, form_page, value_of
from relay.trace.life import STATUSES, MessageLife
from relay.trace.lookup import Query, Unseen
from relay.trace.search_terms import NoWord

_ROWS = 50
_SECONDS = 5.0  # for one look-up
_AT_ONCE = 2  # look-ups: each takes a thread, and other views need theirs
_LONGEST = 1000  # characters of what is looked for
_looking = asyncio.Semaphore(_AT_ONCE)


class _TooLong(Exception):
    """A look-up takes longer than anybody waits for a page."""


def sheet(connection: Redis, settings: Settings, query: Query) -> dict[str, object]:
    """Look up a sheet of messages, the newest first; what has been found when the time is over, for its template."""
    report, end = Unseen(), time.monotonic() + _SECONDS
    found: list[MessageLife] = []

    def progress(_done: int, _total: int) -> None:
        if time.monotonic() > end:
            raise _TooLong

    notes: list[str] = []
    try:
        for life in tracing.search(settings, connection, query, report, progress):
            found.append(life)
            progress(0, 0)
    except _TooLong:
        notes.append("It takes too long to look through all: say more, or give a time. `smtp-dup trace` goes on.")
    return {
        "lives": found,
        "notes": [*notes, *tracing.unseen(report)],
        "nothing": tracing.nothing(settings, report) if not found else "",
        "is_full": len(found) >= query.limit,
    }


@viewer
async def show(request: Request) -> Response:
    """Show the messages that are meant: without words the last ones."""
    asked = request.query_params
    what, since, until, status = (asked.get(name, "").strip() for name in ("what", "since", "until", "status"))
    wrong: dict[str, str] = {}
    when, query = partial(tracing.when, now=time.time()), Query(limit=_ROWS)
    begin = value_of(since, when, 0.0, wrong, "since") if since else 0.0
    end = value_of(until, when, math.inf, wrong, "until") if until else math.inf
    try:
        query = Query.of(
            _words(what[:_LONGEST]),
            since=begin,
            until=end,
            status=status if status in STATUSES else None,
            limit=_ROWS,
        )
    except NoWord as error:
        wrong["what"] = str(error)
    found = None
    if not wrong:
        context = context_of(request)
        async with _looking:
            found = await context.ask(sheet, context.settings, query)
    return await form_page(
        request,
        "trace.html",
        wrong,
        found=found,
        what=what,
        since=since,
        until=until,
        chosen=status,
        statuses=STATUSES,
    )


def _words(text: str) -> list[str]:
    """Return what is looked for, word by word, as a shell would read it."""
    try:
        return shlex.split(text)
    except ValueError:  # a quote without an end
        return text.split()


ROUTES = [Route("/trace", show, methods=["GET"])]
