"""Who is the primary and who gets copies now: by the last decision, else by the settings. Raises RedisError."""

from __future__ import annotations

from typing import Any

from relay.config.model import Settings
from relay.mail.text import printable
from relay.topology import promotion, route_roles
from relay.topology.roles import copied_now


class UnknownRoute(LookupError):
    """No route is called so; the text says which there are."""


def by_default(connection: Any, settings: Settings) -> tuple[str, list[str]]:
    """Return the names of the primary and of those that get copies, by the last decision and these settings."""
    decided = promotion.standing(connection, settings)
    primary = decided.primary if decided else settings.primary.name if settings.primary else ""
    former = [settings.primary] if settings.primary and decided else []
    servers = [*former, *settings.copied, *copied_now(settings, decided)]
    return primary, [name for name in dict.fromkeys(server.name for server in servers) if name != primary]


def on_route(connection: Any, settings: Settings, route: str) -> tuple[str, list[str], tuple[str, ...]]:
    """Return who answers first on a route now, who else has its mail, and all that answer. Raises UnknownRoute."""
    routes = {found.name: found for found in route_roles.table(settings, promotion.standing(connection, settings))}
    if route not in routes:
        raise UnknownRoute(f"no route {printable(route)!r}; there is: {', '.join(routes) or 'none'}")
    found = routes[route]
    first = found.first
    return first, [name for name in dict.fromkeys(found.copied) if name != first], found.answering
