"""What the page shows: a module for each view, each with its ROUTES."""

from __future__ import annotations

from relay.page.views import overview

ROUTES = [*overview.ROUTES]
