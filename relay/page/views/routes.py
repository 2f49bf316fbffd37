"""The routes: who answers on each and for how much, whose server cannot be used, their tables, and what was put off."""

from __future__ import annotations

from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.cockpit import routes
from relay.cockpit.routes import RoutesNow
from relay.page.access import viewer
from relay.page.live import Parts, live_of
from relay.page.rendering import environment
from relay.page.views.shell import context_of, page, part, shared

_EVERY = 2.0


async def _now(request: Request) -> RoutesNow:
    context = context_of(request)
    return await shared(request, "routes", _EVERY / 2, lambda: context.ask(routes.look, context.settings))


@viewer
async def show(request: Request) -> Response:
    """Show the routes."""
    return await page(request, "routes.html", found=await _now(request))


@viewer
async def live(request: Request) -> Response:
    """Send what changes of them."""

    async def parts() -> Parts:
        return {"routes": part(request, "routes/cards.html", found=await _now(request))}

    return live_of(request).stream(request, _EVERY, parts)


def path_of(route: str, server: str) -> str:
    """Return where it is planned that a server answers on a route."""
    return f"/routes/{quote(route, safe='')}/{quote(server, safe='')}"


environment().filters["on_route"] = path_of

ROUTES = [
    Route("/routes", show, methods=["GET"]),
    Route("/routes-live", live, methods=["GET"]),
]
