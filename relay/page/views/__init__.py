"""What the page shows: a module for each view, each with its ROUTES."""

from __future__ import annotations

from relay.page.views import (
    audit,
    copies,
    cutover,
    divergence,
    export,
    hold_and_throttle,
    message,
    overview,
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
        hold_and_throttle,
        audit,
    )
    for route in view.ROUTES
]
