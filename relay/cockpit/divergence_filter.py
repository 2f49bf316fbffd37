"""Which reasons of divergence meet the conditions of the one filter, and which concern the recipients of a route.

A reason has a reply, domains, and up to 200 of its recipients: of the filter's conditions it can meet those. What is
sealed, or a pseudonym, is met by what is known of it: the normalised reply, the domains. Which route a recipient takes
is asked of the routes as they are now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from relay.config.model import Settings
from relay.config.routes import DEFAULT_ROUTE, Route
from relay.ledger import divergence_groups
from relay.ledger.divergence import MOST_WHOM
from relay.ledger.divergence_groups import Group
from relay.routing import loading, moved_copy
from relay.topology import promotion, route_roles
from workers.queues.selection import Filter


class NoRoute(ValueError):
    """Reasons cannot be told apart by this route; the text says why."""


def narrowed(connection: Any, groups: Iterable[Group], chosen: Filter) -> list[Group]:
    """Return the groups that meet the conditions about the reply, a domain or a recipient. Raises RedisError."""
    return [group for group in groups if chosen.takes_words(_reply(group)) and _concerns(connection, group, chosen)]


def _reply(group: Group) -> str:
    return group.reply or " ".join(str(part) for part in (group.code or "", group.status, group.text) if part)


def _concerns(connection: Any, group: Group, chosen: Filter) -> bool:
    domains = [f"@{domain}" for domain in group.domains]
    if not chosen.takes_domains(domains):
        return False
    return chosen.recipient is None or chosen.takes_recipients([*domains, *_whom(connection, group)])


def _whom(connection: Any, group: Group) -> list[str]:
    return [name for name, _ in divergence_groups.whom(connection, group.destination, group.key, MOST_WHOM)]


def on_route(
    connection: Any, settings: Settings, groups: Iterable[Group], name: str, tell: Callable[[str], None]
) -> list[Group]:
    """Return the groups of the servers of a route that concern somebody whose mail takes it now.

    ``tell`` gets a line for each table that is refused as it is. Raises NoRoute, BadTable, OSError, RedisError.
    """
    topology = promotion.standing(connection, settings)
    routes = route_roles.table(settings, topology)
    route = next((found for found in routes if found.name == name), None)
    if route is None and name != DEFAULT_ROUTE:
        raise NoRoute(f"no route {name}; there is: {', '.join([*(r.name for r in routes), DEFAULT_ROUTE])}")
    if unknown := [other.name for other in routes if _needs_more(other)]:
        raise NoRoute(f"{', '.join(unknown)} goes by more than the recipient, which is all that a reason knows")
    tables = loading.tables_as_they_are(settings, tell)
    router = loading.router_of(settings, tables, moved_copy.load_or_tell(settings.state_dir)).with_routes(routes)
    plan = router.plan("", "", "127.0.0.1")
    servers = {*route.servers, *route.copied} if route is not None else None
    return [
        group
        for group in groups
        if (servers is None or group.destination in servers)
        and any(plan.decide(address).route.name == name for address in _whom(connection, group) if "@" in address)
    ]


def _needs_more(route: Route) -> bool:
    match = route.match
    return match.senders.are_given or bool(match.clients) or bool(match.listen)
