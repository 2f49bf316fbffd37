"""A run as it goes on: how far it is, what it has found or done, a button to stop it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from relay.page.access import operator, viewer
from relay.page.live import Parts, live_of
from relay.page.runs import Run, who_acts
from relay.page.views.shell import context_of, not_found, page, part
from relay.topology import decisions

_EVERY = 0.3


def _find(request: Request) -> Run:
    run = request.app.state.runs.find(request.path_params["id"], who_acts(request.state.visitor.name))
    if run is None:
        raise not_found("This is not known any more: look again")
    found: Run = run
    return found


async def _values(request: Request, run: Run) -> dict[str, Any]:
    view = await context_of(request).ask(decisions.view) if run.kind == "promotion" else None
    return {"run": run, "view": view}


@viewer
async def show(request: Request) -> Response:
    """Show a run."""
    run = _find(request)
    values = await _values(request, run)
    asked = request.query_params
    return await page(
        request, "run.html", **values, is_wrong=asked.get("wrong") == "number", is_busy=asked.get("busy") == "1"
    )


@viewer
async def live(request: Request) -> Response:
    """Send how far a run is, until its end."""
    run = _find(request)

    async def parts() -> Parts:
        return {"run": part(request, f"run/{run.kind}.html", **await _values(request, run), is_wrong=False)}

    return live_of(request).stream(request, _EVERY, parts, lambda: run.is_over)


@operator
async def stop(request: Request) -> Response:
    """Have a run stop between two steps."""
    run = _find(request)
    run.is_stop_asked = True
    return RedirectResponse(f"/runs/{run.id}", 303)


ROUTES = [
    Route("/runs/{id}", show, methods=["GET"]),
    Route("/runs/{id}/live", live, methods=["GET"]),
    Route("/runs/{id}/stop", stop, methods=["POST"]),
]
