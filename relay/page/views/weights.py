"""The weights of a route: how much of its mail each server answers for, as `smtp-dup route weight` changes them.

First it is asked what they would change, which is a GET and changes nothing; then it is agreed to, as a promotion is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from redis import Redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.config import routes
from relay.config.model import Settings
from relay.page.access import operator, viewer
from relay.page.rendering import environment
from relay.page.runs import NotBegun
from relay.page.views import cutover
from relay.page.views.cutover import Proposal, path_asked
from relay.page.views.shell import context_of, field, not_found, page
from relay.topology import promotion, route_roles
from relay.topology.promotion import Impossible

_FIELD = "weight."  # in front of a server's name


@dataclass(frozen=True, slots=True)
class WeightField:
    """The field of a server's weight: what stands in it, and what is wrong with that."""

    name: str
    server: str
    text: str
    wrong: str
    answers: bool


@dataclass(frozen=True, slots=True)
class WeightsAsked:
    """What is asked for a route: its fields, why that cannot be, or else what it would change."""

    route: str
    now: str
    shares: Sequence[WeightField]
    wrong: str
    proposal: Proposal | None


def ask(connection: Redis, settings: Settings, name: str, given: Mapping[str, str] | None) -> WeightsAsked | None:
    """Return what weights would change, None where there is no such route. Raises RedisError.

    ``given`` is a text for each server, None where nobody has asked; one that is empty gives its server no weight.
    """
    known = route_roles.table(settings, promotion.standing(connection, settings))
    route = next((found for found in known if found.name == name), None)
    if route is None:
        return None
    weights, faults = _read(given or {})
    shares = _shares(route, given, faults)
    fields = {share.server for share in shares}
    wrong = next((f"{server}: {text}" for server, text in faults.items() if server not in fields), "")
    proposal = None
    if given is not None and not faults:
        try:
            proposal = cutover.judged(connection, settings, promotion.plan_weights(connection, settings, name, weights))
        except Impossible as error:
            wrong = f"{error}."
    return WeightsAsked(name, route_roles.of(route).in_words(), shares, wrong, proposal)


def _read(given: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the weights, and what is wrong with a text, by server."""
    weights: dict[str, float] = {}
    faults: dict[str, str] = {}
    for server, text in given.items():
        try:
            if text:
                weights[server] = route_roles.weight(text)
        except ValueError as error:
            faults[server] = str(error)
    return weights, faults


def _shares(route: routes.Route, given: Mapping[str, str] | None, faults: Mapping[str, str]) -> list[WeightField]:
    if given is None:
        given = {name: f"{weight:.15g}" for name, weight in zip(route.servers, route.weights, strict=False)}
    return [
        WeightField(_FIELD + name, name, given.get(name, ""), faults.get(name, ""), name in route.servers)
        for name in dict.fromkeys((*route.servers, *route.backups))
    ]


def _given(fields: Mapping[str, str]) -> dict[str, str]:
    """Return the text of each server's field."""
    return {name.removeprefix(_FIELD): text.strip() for name, text in fields.items() if name.startswith(_FIELD)}


async def _asked(request: Request, given: Mapping[str, str] | None) -> WeightsAsked:
    context, name = context_of(request), request.path_params["route"]
    found = await context.ask(ask, context.settings, name, given)
    if found is None:
        raise not_found(f"There is no route {name}")
    return found


async def _shown(request: Request, found: WeightsAsked, wrong: dict[str, str] | None = None) -> Response:
    is_wrong = bool(wrong or found.wrong or any(share.wrong for share in found.shares))
    return await page(
        request,
        "weights.html",
        asked=found,
        found=found.proposal,
        action=path_asked(request),
        hidden={share.name: share.text for share in found.shares},
        back="/routes",
        wrong=wrong or {},
        given=getattr(request.state, "form", {}),
        wait=cutover.WAIT,
        status=400 if is_wrong else 200,
    )


@viewer
async def show(request: Request) -> Response:
    """Show the weights of a route, and what those that are asked for would change."""
    return await _shown(request, await _asked(request, _given(request.query_params) or None))


@operator
async def change(request: Request) -> Response:
    """Begin to share a route's mail by other weights, once its name was typed."""
    found = await _asked(request, _given({name: field(request, name) for name in request.state.form}))
    if found.proposal is None:
        return await _shown(request, found)
    order, wrong = cutover.read_order(request, found.proposal)
    if not wrong:
        try:
            title = f"Weights: {found.proposal.target}"
            return cutover.begin(request, found.proposal.plan, title, order, "/routes")
        except NotBegun as error:
            wrong = {"typed": str(error)}
    return await _shown(request, found, wrong)


def path_of(route: str) -> str:
    """Return where the weights of a route are."""
    return f"/routes/{quote(route, safe='')}"


environment().filters["weights_of"] = path_of

ROUTES = [
    Route("/routes/{route}", show, methods=["GET"]),
    Route("/routes/{route}", change, methods=["POST"]),
]
