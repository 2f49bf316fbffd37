"""What waits and what failed, by backup."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.ledger import overview
from relay.page.rendering import render


async def show(request: Request) -> Response:
    """Show a line for each backup."""
    rows = await request.app.state.context.ask(overview.summary)
    return render(request, "overview.html", rows=rows)


ROUTES = [Route("/", show, methods=["GET"])]
