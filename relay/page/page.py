"""The page as one application: its routes behind the checks of access."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from relay.cockpit.evidence_from_redis import UnknownBackup
from relay.ledger.queries import Unknown
from relay.page import login, rendering, views
from relay.page.access import Access, on_http_error, on_not_there
from relay.page.context import PageContext
from relay.page.live import LiveParts
from relay.page.runs import Runs
from relay.topology.promotion import Impossible

_NOT_THERE = (Unknown, UnknownBackup, Impossible)  # what a path, or a field of a form, names


def make(context: PageContext) -> Starlette:
    """Return the page for a context; a template that cannot be compiled is an exception here, not at a request."""
    app = Starlette(
        routes=[*rendering.ROUTES, *login.ROUTES, *views.ROUTES],
        middleware=[Middleware(Access, context=context)],
        exception_handlers={HTTPException: on_http_error, **dict.fromkeys(_NOT_THERE, on_not_there)},
    )
    app.router.redirect_slashes = False
    app.state.context = context
    app.state.live = LiveParts(context)
    app.state.runs = Runs(context)
    environment = rendering.environment()
    for name in environment.list_templates():
        environment.get_template(name)
    return app
