"""The audit: who changed what, when and why, newest first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from redis import Redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.config.types import duration
from relay.ledger import audit, changes
from relay.ledger.audit import Act
from relay.page.access import viewer
from relay.page.views.shell import context_of, form_page, value_of

_ROWS = 200


def sheet(connection: Redis, age: float, before: float) -> tuple[Sequence[Act], bool]:
    """Return the acts of a sheet, and whether there are more. Raises RedisError."""
    since = changes.now(connection) - age if age else 0.0
    acts = (done for done in audit.acts(connection, since) if done.at < before)
    found = list(islice(acts, _ROWS + 1))
    return found[:_ROWS], len(found) > _ROWS


@viewer
async def show(request: Request) -> Response:
    """Show what was done."""
    since, wrong = request.query_params.get("since", "").strip(), dict[str, str]()
    age = value_of(since, duration().read, 0.0, wrong, "since") if since else 0.0
    before = value_of(request.query_params.get("before", "inf"), float, math.inf, {}, "before")
    acts, is_more = await context_of(request).ask(sheet, age, before)
    more = f"{acts[-1].at!r}" if is_more else ""
    return await form_page(request, "audit.html", wrong, acts=acts, since=since, more=more)


ROUTES = [Route("/audit", show, methods=["GET"])]
