"""One backup: how it stands, and what an operator does to it: hold, release, bound its speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import quote

from redis import Redis
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from relay.cockpit import headroom, hold_and_throttle
from relay.config.model import Settings
from relay.config.types import duration
from relay.ledger import changes, overview, queries
from relay.ledger.divergence_groups import Outage, outages
from relay.ledger.health import MOST_CONNECTIONS, Health
from relay.ledger.overview import Summary
from relay.page.access import operator, viewer
from relay.page.views.shell import act, context_of, field, form_page, value_of

_OUTAGES = 20
_DONE = {
    "held": "Held: what is under way ends, everything else waits and does not age. The workers follow within a second.",
    "released": "Released: it gets its copies again.",
    "none": "It was not held.",
    "throttled": "The bounds are set, over all workers together.",
}


@dataclass(frozen=True, slots=True)
class BackupState:
    """All that is shown of one backup."""

    name: str
    address: str
    health: Health
    is_held: bool
    now: float
    summary: Summary | None
    outages: list[Outage]
    room: str
    bounds: str


def backup(connection: Redis, settings: Settings, name: str) -> BackupState:
    """Return how a backup stands. Raises UnknownDestination, RedisError."""
    (target,) = queries.destinations(connection, name)
    now = changes.now(connection)
    health = Health.read(connection, name)
    found = headroom.estimate(connection, now, settings.spool.dir, settings.spool.min_free)
    return BackupState(
        name,
        target.address,
        health,
        health.is_held(now),
        now,
        next((row for row in overview.summary(connection) if row.destination == name), None),
        outages(connection, name)[:_OUTAGES],
        hold_and_throttle.room_words(found),
        hold_and_throttle.bounds_words(health),
    )


@viewer
async def show(request: Request) -> Response:
    """Show a backup."""
    return await _show(request)


async def _show(request: Request, wrong: dict[str, str] | None = None) -> Response:
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
        return await _show(request, wrong)
    settings, name = context_of(request).settings, request.path_params["name"]

    def change(redis: Redis) -> str:
        hold_and_throttle.hold(redis, settings, name, seconds, reason)
        return "held"

    return await _done(request, change)


@operator
async def release(request: Request) -> Response:
    """End a hold."""
    name = request.path_params["name"]
    return await _done(request, lambda redis: "released" if hold_and_throttle.release(redis, name) else "none")


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
        return await _show(request, wrong)
    name = request.path_params["name"]

    def change(redis: Redis) -> str:
        hold_and_throttle.throttle(redis, name, rate, connections)
        return "throttled"

    return await _done(request, change)


async def _done(request: Request, change: Callable[[Redis], str]) -> Response:
    done = await act(request, change)
    return RedirectResponse(f"/server/{quote(request.path_params['name'], safe='')}?done={done}", 303)


ROUTES = [
    Route("/server/{name}", show, methods=["GET"]),
    Route("/server/{name}/hold", hold, methods=["POST"]),
    Route("/server/{name}/release", release, methods=["POST"]),
    Route("/server/{name}/throttle", throttle, methods=["POST"]),
]
