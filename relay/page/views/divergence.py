"""Divergence: what a backup answers otherwise than the primary, by reason; each reason with examples and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote

from redis import Redis
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from relay.cockpit import conditions, divergence_filter
from relay.cockpit import divergence as seen
from relay.cockpit.conditions import BadCondition
from relay.cockpit.divergence_details import GroupDetails, details
from relay.config.model import Settings
from relay.config.types import duration
from relay.ledger import changes, queries
from relay.ledger.divergence import KINDS
from relay.ledger.divergence_groups import Group
from relay.mail.text import printable
from relay.page.access import operator, viewer
from relay.page.views.shell import act, context_of, field, form_page, not_found, value_of
from relay.routing.table_file import BadTable
from workers.queues.selection import Filter

T = TypeVar("T")

_MOST_ROWS = 500  # of a table
_HOURS = 24
_CONDITIONS = ("code", "reply", "domain", "recipient")  # of the one filter, those that a reason can meet
_BY = ("reason", "domain", "recipient", "day")
_DONE = {
    "ack": "Acknowledged: it does not count until its time is over, or until there is more of it than now.",
    "unack": "It counts again.",
    "nothing": "Nothing was to be done: it is as it was.",
}


@dataclass(frozen=True, slots=True)
class GroupRow:
    """A reason as a line of the table."""

    group: Group
    state: str
    reply: str
    trend: Sequence[int]

    @classmethod
    def of(cls, group: Group, now: float) -> GroupRow:
        return cls(group, seen.state(group, now), seen.reply(group), group.trend(now, _HOURS))

    @property
    def path(self) -> str:
        return path_of(self.group)

    @property
    def kind(self) -> str:
        """The class that its state is shown in."""
        word = self.state.partition(" ")[0]
        return {"open": "fail", "acknowledged": "warn", "noise": "unknown"}.get(word, "ok")

    @property
    def domains(self) -> str:
        return f"{len(self.group.domains):,}" + ("+" if self.group.more_domains else "")


def path_of(group: Group) -> str:
    """Return where a reason is shown."""
    return f"/divergence/{quote(group.destination, safe='')}/{group.key}"


@viewer
async def show(request: Request) -> Response:
    """Show what is open, or all."""
    asked = request.query_params
    destination, kind, since = (asked.get(name, "").strip() for name in ("destination", "kind", "since"))
    by = asked.get("by", "reason")
    context, route = context_of(request), asked.get("route", "").strip()
    wrong, seconds, conditioned = dict[str, str](), 0.0, Filter()
    if since:
        seconds = value_of(since, duration().read, 0.0, wrong, "since")
    given = {name: [value] for name in _CONDITIONS if (value := asked.get(name, "").strip())}
    try:
        conditioned = conditions.read(given)
    except BadCondition as error:
        wrong[error.name] = str(error)
    by, kind = by if by in _BY else _BY[0], kind if kind in KINDS else ""
    everything = asked.get("all") == "1"

    def look(connection: Redis) -> dict[str, object]:
        now = changes.now(connection)
        names = [found.name for found in queries.destinations(connection)]
        begin = now - seconds if seconds else 0.0
        groups = seen.chosen(connection, destination or None, since=begin, kind=kind or None, everything=everything)
        groups = _narrowed(connection, context.settings, groups, conditioned, route, wrong)
        sums = seen.summed(connection, groups, by)
        rows = [GroupRow.of(group, now) for group in groups[:_MOST_ROWS]] if by == _BY[0] else []
        more = max(0, len(sums or groups) - _MOST_ROWS)
        return {"rows": rows, "sums": sums[:_MOST_ROWS], "destinations": names, "more": more}

    found = await context.ask(look)
    chosen = {"destination": destination, "kind": kind, "since": since, "by": by, "all": "1" if everything else ""}
    chosen |= {"route": route, **{name: asked.get(name, "").strip() for name in _CONDITIONS}}
    return await form_page(
        request,
        "divergence/list.html",
        wrong,
        found=found,
        chosen=chosen,
        routes=[found.name for found in context.settings.route_table],
        kinds=KINDS,
        ways=_BY,
    )


def _narrowed(
    connection: Redis, settings: Settings, groups: list[Group], chosen: Filter, route: str, wrong: dict[str, str]
) -> list[Group]:
    """Return those that meet the conditions, none where one makes no sense; the route's fault goes into ``wrong``."""
    if wrong:
        return []
    groups = divergence_filter.narrowed(connection, groups, chosen)
    if not route:
        return groups
    try:
        return divergence_filter.on_route(connection, settings, groups, route, lambda _: None)
    except (divergence_filter.NoRoute, BadTable, OSError) as error:
        wrong["route"] = printable(str(error))
        return []


def _find(connection: Redis, request: Request) -> Group:
    """Return the reason that a path names. Raises HTTPException, UnknownDestination."""
    found = seen.find(connection, request.path_params["key"], request.path_params["destination"])
    if not found:
        raise not_found("There is no such reason any more")
    return found[0]


def _details(connection: Redis, settings: Settings, request: Request) -> tuple[Group, GroupDetails]:
    group = _find(connection, request)
    return group, details(connection, settings, group)


@viewer
async def one(request: Request, wrong: dict[str, str] | None = None) -> Response:
    """Show one reason."""
    context = context_of(request)
    group, found = await context.ask(_details, context.settings, request)
    done = request.query_params.get("done", "")
    retried = request.query_params.get("retried", "")
    said = f"{int(retried):,} will be tried again now." if retried.isdecimal() and len(retried) < 12 else ""
    return await form_page(
        request,
        "divergence/one.html",
        wrong,
        found=found,
        row=GroupRow.of(group, found.now),
        group=group,
        done=_DONE.get(done, "") or said,
    )


@operator
async def acknowledge(request: Request) -> Response:
    """Let a reason not count for a time."""
    note, length = field(request, "note").strip(), field(request, "for").strip()
    wrong: dict[str, str] = {}
    if not note:
        wrong["note"] = "Say why, for whoever reads it in a week."
    seconds = value_of(length, duration().read, 0.0, wrong, "for")
    if wrong:
        return await one(request, wrong)
    await _act(request, lambda connection, group: seen.acknowledge(connection, group, note, seconds))
    return _back(request, "done=ack")


@operator
async def unacknowledge(request: Request) -> Response:
    """Let a reason count again."""
    note = field(request, "note").strip()
    was = await _act(request, lambda connection, group: seen.unacknowledge(connection, group, note))
    return _back(request, "done=unack" if was else "done=nothing")


@operator
async def retry(request: Request) -> Response:
    """Have the failed copies of a reason tried again now."""
    settings = context_of(request).settings
    count = await _act(request, lambda connection, group: seen.retry(connection, settings, group))
    return _back(request, f"retried={count}")


async def _act(request: Request, change: Callable[[Redis, Group], T]) -> T:
    return await act(request, lambda connection: change(connection, _find(connection, request)))


def _back(request: Request, query: str) -> Response:
    destination, key = request.path_params["destination"], request.path_params["key"]
    return RedirectResponse(f"/divergence/{quote(destination, safe='')}/{quote(key, safe='')}?{query}", 303)


_ONE = "/divergence/{destination}/{key}"
ROUTES = [
    Route("/divergence", show, methods=["GET"]),
    Route(_ONE, one, methods=["GET"]),
    Route(_ONE + "/ack", acknowledge, methods=["POST"]),
    Route(_ONE + "/unack", unacknowledge, methods=["POST"]),
    Route(_ONE + "/retry", retry, methods=["POST"]),
]
