"""One backup: how it stands, and what an operator does to it: hold, release, bound its speed."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote

from redis import Redis
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from relay.cockpit import headroom, hold_and_throttle
from relay.config.model import Settings
from relay.config.types import duration
from relay.ledger import changes, overview, queries
from relay.ledger.divergence_groups import outages
from relay.ledger.health import MOST_CONNECTIONS, Health
from relay.page.access import operator, viewer
from relay.page.views.shell import act, context_of, field, form_page, value_of

_OUTAGES = 20
_DONE = {
    "held": "Held: what is under way ends, everything else waits and does not age. The workers follow within a second.",
    "released": "Released: it gets its copies again.",
    "none": "It was not held.",
    "throttled": "The bounds are set, over all workers together.",
}


def backup(connection: Redis, settings: Settings, name: str) -> dict[str, object]:
    """Return how a backup stands, for its template. Raises UnknownDestination, RedisError."""
    (target,) = queries.destinations(connection, name)
    now = changes.now(connection)
    health = Health.read(connection, name)
    found = headroom.estimate(connection, now, settings.spool.dir, settings.spool.min_free)
    return {
        "name": name,
        "address": target.address,
        "health": health,
        "is_held": health.is_held(now),
        "now": now,
        "summary": next((row for row in overview.summary(connection) if row.destination == name), None),
        "outages": outages(connection, name)[:_OUTAGES],
        "room": hold_and_throttle.room_words(found),
        "bounds": hold_and_throttle.bounds_words(health),
    }


@viewer
async def show(request: Request, wrong: dict[str, str] | None = None) -> Response:
    """Show a backup."""
    context = context_of(request)
    found = await context.ask(backup, context.settings, request.path_params["name"])
    done = _DONE.get(request.query_params.get("done", ""), "")
    return await form_page(request, "server.html", wrong, found=found, done=done)


@operator
async def hold(request: Request) -> Response:
    """Begin no more copies for it."""
    reason, length = field(request, "reason").strip(), field(request, "for").strip()
    wrong: dict[str, str] = {}
    seconds = 0.0
    if not reason:
        wrong["reason"] = "Say why, for whoever wonders."
    if field(request, "how") != "until-released":
        seconds = value_of(length, duration().read, 0.0, wrong, "for")
    if wrong:
        return await show(request, wrong)
    settings, name = context_of(request).settings, request.path_params["name"]
    return await _done(
        request, lambda redis: hold_and_throttle.hold(redis, settings, name, seconds, reason), done="held"
    )


@operator
async def release(request: Request) -> Response:
    """End a hold."""
    name = request.path_params["name"]
    return await _done(request, lambda redis: hold_and_throttle.release(redis, name), done="released")


@operator
async def throttle(request: Request) -> Response:
    """Bound how fast it gets its copies."""
    rate_text, connections_text = field(request, "rate").strip(), field(request, "connections").strip()
    wrong: dict[str, str] = {}
    rate, connections = 0.0, 0
    if rate_text not in {"", "0"}:
        rate = value_of(rate_text, hold_and_throttle.rate, 0.0, wrong, "rate")
    if connections_text.isdecimal() and int(connections_text[:9]) <= MOST_CONNECTIONS:
        connections = int(connections_text)
    elif connections_text:
        wrong["connections"] = f"expected a number up to {MOST_CONNECTIONS:,}, or nothing"
    if wrong:
        return await show(request, wrong)
    name = request.path_params["name"]
    return await _done(
        request, lambda redis: hold_and_throttle.throttle(redis, name, rate, connections), done="throttled"
    )


async def _done(request: Request, change: Callable[[Redis], object], done: str) -> Response:
    """Do it, and show the backup with what was done; a change that returns False found nothing to do."""
    done = done if await act(request, change) else "none"
    return RedirectResponse(f"/server/{quote(request.path_params['name'], safe='')}?done={done}", 303)


ROUTES = [
    Route("/server/{name}", show, methods=["GET"]),
    Route("/server/{name}/hold", hold, methods=["POST"]),
    Route("/server/{name}/release", release, methods=["POST"]),
    Route("/server/{name}/throttle", throttle, methods=["POST"]),
]
