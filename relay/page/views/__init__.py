"""What the page shows: a module for each view, each with its ROUTES."""

from __future__ import annotations

from relay.page.views import (
    audit,
    copies,
    cutover,
    divergence,
    export,
    message,
    overview,
    restraint,
    routes,
    runs,
    trace,
    weights,
)

ROUTES = [
    route
    for view in (
        overview,
        divergence,
        export,
        copies,
        runs,
        message,
        trace,
        cutover,
        routes,
        weights,
        restraint,
        audit,
    )
    for route in view.ROUTES
]
