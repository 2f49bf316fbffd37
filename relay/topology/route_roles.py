"""The roles of routes: how a decision about one changes it, and what it means beside this host's settings.

A route says what mail it is for; only who answers and who gets copies can be decided about. A server that answers no
more gets copies, where the mail is for it at all: so that a decision never takes mail from anybody who had it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from relay.config.model import Settings
from relay.config.routes import Route
from relay.mail.text import printable
from relay.topology.state import Intent, RouteRoles, Topology, is_weight


class Unsuitable(ValueError):
    """The route cannot be so; the text says why."""


def of(route: Route) -> RouteRoles:
    """Return the roles that a route has."""
    return RouteRoles(route.servers, route.weights, route.backups, route.copies)


def applied(route: Route, roles: RouteRoles) -> Route:
    """Return a route with these roles."""
    return replace(route, servers=roles.servers, weights=roles.weights, backups=roles.backups, copies=roles.copies)


def as_set(settings: Settings, name: str) -> tuple[str, ...]:
    """Return who answers on a route as these settings say; none where they have no such route."""
    return next((route.answering for route in settings.route_table if route.name == name), ())


def table(settings: Settings, topology: Topology | None) -> tuple[Route, ...]:
    """Return the routes with what was decided; one whose servers these settings do not name is as they say."""
    if topology is None or not topology.now.routes:
        return settings.route_table
    return tuple(
        applied(route, roles)
        if (roles := topology.now.routes.get(route.name)) and not _missing(settings, roles)
        else route
        for route in settings.route_table
    )


def followed(settings: Settings, topology: Topology | None) -> list[str]:
    """Return the routes whose decided roles these settings can have, and those that are none here."""
    if topology is None:
        return []
    here = {route.name for route in settings.route_table}
    return sorted(n for n, roles in topology.now.routes.items() if n not in here or not _missing(settings, roles))


def troubles(settings: Settings, topology: Topology) -> Iterator[str]:
    """Yield why what was decided for a route is not followed here."""
    here = {route.name for route in settings.route_table}
    for name, roles in sorted(topology.now.routes.items()):
        if name in here and (missing := _missing(settings, roles)):
            lacking = " and ".join(missing)
            yield f"its settings do not name {lacking}, of the route {name} as it was decided: add it, and reload"


def disagreements(settings: Settings, topology: Topology) -> Iterator[str]:
    """Yield where the settings of a route say otherwise than what was decided."""
    here = {route.name: route for route in settings.route_table}
    for name, roles in sorted(topology.now.routes.items()):
        decided = f"the route {name} was decided to be {roles.in_words()}"
        route = here.get(name)
        if route is None:
            yield f"{decided}, but these settings have no such route; `smtp-dup route reset {name}` forgets that"
        elif missing := _missing(settings, roles):
            lacking = " and ".join(missing)
            answers = of(route).in_words()
            yield f"{decided}, but these settings do not name {lacking}: {answers} answers; add it, and reload"
        elif of(route) != roles:
            yield (
                f"{decided}, although the settings say {of(route).in_words()}: edit them to agree, or let them hold "
                f"again by `smtp-dup route reset {name}`"
            )


def objection(settings: Settings, intent: Intent) -> str:
    """Say why these settings do not let a route have these servers; "" where they do.

    An intent without servers is to have it as each host's settings say.
    """
    if not intent.servers:
        return ""
    if not any(route.name == intent.route for route in settings.route_table):
        return f"its settings have no route {intent.route}"
    known = {server.name for server in settings.named}
    missing = [name for name in dict.fromkeys((*intent.servers, intent.old)) if name and name not in known]
    return f"its settings do not name {' and '.join(missing)}" if missing else ""


def _missing(settings: Settings, roles: RouteRoles) -> list[str]:
    return sorted(roles.named - {server.name for server in settings.named})


# Changes --------------------------------------------------------------------------------------------------------


def promoted(route: Route, name: str) -> RouteRoles:
    """Return the roles with this server as the first to answer, who answered before behind it. Raises Unsuitable.

    A backup takes the place of those that answered, and they get copies. One of several that answer comes first.
    """
    if name in route.servers:
        others = tuple(server for server in route.servers if server != name)
        return RouteRoles((name, *others), (), route.backups, route.copies)
    if name not in route.backups:
        servers = ", ".join(dict.fromkeys((*route.servers, *route.backups)))
        raise Unsuitable(f"{name} is no server of the route {route.name}; it has {servers}")
    if route.weights and route.copies != "others":
        raise Unsuitable(
            f"{route.name} shares its mail among {', '.join(route.servers)}, none of which has all of it: promote one "
            'of these, or set copies = "others"'
        )
    former = route.servers if route.copies == "others" else route.servers[:1]
    others = tuple(backup for backup in route.backups if backup != name and backup not in former)
    return RouteRoles((name,), (), (*former, *others))


def weight(text: str) -> float:
    """Read a weight. Raises ValueError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not is_weight(value):
        raise ValueError(f"expected a weight of 0 or more, not {printable(text)}")
    return value


def weighed(route: Route, weights: Mapping[str, float]) -> RouteRoles:
    """Return the roles with these weights; who is not named keeps none. Raises Unsuitable.

    A backup may get a share of what one server has answered, or several who all get copies: each of them goes on to
    get copies of what another answers.
    """
    known = dict.fromkeys((*route.servers, *route.backups))
    if strangers := [name for name in weights if name not in known]:
        raise Unsuitable(f"{' and '.join(strangers)}: no server of the route {route.name}; it has {', '.join(known)}")
    if unnamed := [name for name in route.servers if name not in weights]:
        raise Unsuitable(f"give {' and '.join(unnamed)} a weight too: 0 takes none")
    if not any(weights.values()):
        raise Unsuitable("somebody has to answer: give one a weight above 0")
    servers = (*route.servers, *(name for name in route.backups if weights.get(name)))
    copies = route.copies
    if set(servers) != set(route.servers):
        if len(route.servers) > 1 and copies != "others":
            raise Unsuitable(
                f"only a server that all mail of {route.name} goes to can share it with a backup: it has "
                f'{", ".join(route.servers)}, without copies = "others"'
            )
        copies = "others"
    backups = tuple(name for name in route.backups if name not in servers)
    return RouteRoles(servers, tuple(weights.get(name, 0.0) for name in servers), backups, copies)
