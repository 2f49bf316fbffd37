"""What waits and what failed: a sheet of rows behind the one filter, and what can be done to those that are chosen.

Nothing is done from here at once: a dry run looks first, as a run of its own, and what it has found is agreed to there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote, urlencode

from redis import Redis
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from relay.cockpit import bulk_actions, conditions, formatting, listing
from relay.cockpit.bulk_actions import BulkAction
from relay.cockpit.bulk_preview import BulkPreview
from relay.cockpit.conditions import BadCondition
from relay.config.model import Settings
from relay.ledger import queries
from relay.ledger.queries import Unknown
from relay.mail.ids import is_destination_name, is_id
from relay.page.access import operator, viewer
from relay.page.runs import NotBegun, Run, Stopped, who_acts
from relay.page.views.shell import context_of, field, form_page, not_found
from workers.queues import selection
from workers.queues.selection import FAILED, WAITING, Filter, ListPlace, Which

_SIMPLE = ("destination", "recipient", "sender", "code", "reply")
_FURTHER = ("domain", "client", "group", "attempts", "older", "newer", "larger", "limit")
_FIELDS = (*_SIMPLE, *_FURTHER)
_HINTS = {
    "recipient": "address or @domain",
    "sender": "address, @domain or <>",
    "code": "550, 5xx or 5.1.1",
    "reply": "part of the reply",
    "domain": "example.com",
    "client": "192.0.2.0/24",
    "group": "key of a reason",
    "attempts": ">3",
    "older": "1h",
    "newer": "1d",
    "larger": "10M",
    "limit": "no more than",
}


@dataclass(frozen=True, slots=True)
class ListOfCopies:
    """One of the two lists: where it is, what it is called, and what can be done to its copies."""

    path: str
    title: str
    which: Which
    # name -> what its button says, and itself
    actions: Mapping[str, tuple[str, Callable[[Redis, Settings, str], BulkAction]]]


KINDS = {
    "waiting": ListOfCopies(
        "/waiting",
        "Waiting",
        WAITING,
        {
            "flush": ("Try now", bulk_actions.flush),
            "drop": ("Drop", lambda connection, _, words: bulk_actions.drop_waiting(connection, words)),
        },
    ),
    "failed": ListOfCopies(
        "/failed",
        "Failed",
        FAILED,
        {
            "retry": ("Try again", bulk_actions.retry),
            "drop": ("Drop", lambda connection, _, words: bulk_actions.drop_failed(connection, words)),
        },
    ),
}


def given_by(fields: QueryParams | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the conditions that a form has; a field that is left empty is none."""
    found: dict[str, list[str]] = {}
    for name in _FIELDS:
        values = fields.getlist(name) if isinstance(fields, QueryParams) else list(fields.get(name, []))
        if values := [value for value in values if value.strip()]:
            found[name] = values
    return found


def place_of(text: str) -> ListPlace | None:
    """Read where a sheet begins; what makes no sense is the beginning."""
    name, _, rest = text.partition(":")
    score, _, message_id = rest.partition(":")
    try:
        value = float(score)
    except ValueError:
        return None
    return ListPlace(name, value, message_id) if math.isfinite(value) and is_destination_name(name) else None


def words_of(place: ListPlace) -> str:
    """Return a place for the address of the next sheet."""
    return f"{place.destination}:{place.score!r}:{place.id}"


@viewer
async def show(request: Request, name: str, trouble: Mapping[str, str] | None = None) -> Response:
    """Show what waits, or what failed, with what was wrong about a form."""
    kind, settings = KINDS[name], context_of(request).settings
    asked = getattr(request.state, "form", None) or request.query_params
    given, wrong = given_by(asked), dict(trouble or {})
    chosen = Filter()
    try:
        chosen = conditions.read(given)
    except BadCondition as error:
        wrong[error.name] = str(error)
    after = place_of(request.query_params.get("after", ""))

    def look(connection: Redis) -> tuple[listing.Sheet, list[str]]:
        names = [found.name for found in queries.destinations(connection)]
        if wrong.keys() & set(_FIELDS):
            return listing.Sheet(), names
        try:
            return listing.sheet(connection, kind.which, chosen, after), names
        except Unknown as error:
            wrong["destination"] = str(error)
            return listing.Sheet(), names

    sheet, destinations = await context_of(request).ask(look)
    shown = {field_name: values[0] for field_name, values in given.items()}
    return await form_page(
        request,
        "copies/list.html",
        wrong,
        kind=kind,
        name=name,
        sheet=sheet,
        destinations=destinations,
        simple=_SIMPLE,
        further=_FURTHER,
        hints=_HINTS,
        shown=shown,
        is_bare=not given,
        next=f"{kind.path}?{urlencode({**shown, 'after': words_of(sheet.next)})}" if sheet.next else "",
        is_first=after is None,
        job_size=settings.workers.job_size,
    )


# A dry run, and what is done with it ------------------------------------------------------------------------------


@dataclass(slots=True)
class DryRun:
    """What a dry run has found: the action that it is for, and in whose words."""

    kind: ListOfCopies
    bulk: BulkAction
    preview: BulkPreview
    unread: dict[str, str]
    button: str

    @property
    def needs_number(self) -> bool:
        """Whether the number must be typed, as at the terminal."""
        return self.preview.count > MANY


MANY = 100


@operator
async def look(request: Request) -> Response:
    """Begin a dry run of what is to be done to the copies that are ticked, or to all that meet the conditions."""
    name = request.path_params["kind"]
    kind = KINDS.get(name)
    action = field(request, "action")
    if kind is None or action not in kind.actions:
        raise not_found("There is no such thing to do")
    try:
        filters, words = chosen_by(request)
    except BadCondition as error:
        return await show(request, name, {error.name: str(error)})
    if not filters:
        return await show(request, name, {"ticks": "Tick the copies that you mean, or take all that meet the filter."})
    button, make = kind.actions[action]
    context, runs = context_of(request), request.app.state.runs

    def work(connection: Redis, run: Run) -> None:
        bulk = make(connection, context.settings, words)
        found = DryRun(kind, bulk, BulkPreview(connection, kind.which), {}, button)
        run.total = sum(selection.size(connection, kind.which, chosen) for chosen in filters)
        for chosen in filters:
            steps = bulk_actions.look(connection, bulk, chosen, found.preview, found.unread)
            for count in runs.until_stopped(run, steps):
                run.steps += count
        if runs.is_to_stop(run):
            raise Stopped
        run.found = found

    return _begun(
        request, Run("look", f"{button}: a look first", who_acts(request.state.visitor.name), kind.path), work
    )


def chosen_by(request: Request) -> tuple[list[Filter], str]:
    """Return the copies that a form is about, as filters, none where none is ticked, and in words.

    Raises BadCondition.
    """
    form = request.state.form
    parts = [(given_by(form), list[str]())] if field(request, "scope") == "all" else _ticked(form.get("copy", []))
    words = "; ".join(conditions.words(given, ids) for given, ids in parts)
    return [conditions.read(given, ids) for given, ids in parts], words


def _ticked(values: Sequence[str]) -> list[tuple[dict[str, list[str]], list[str]]]:
    """Return the ids that are ticked, by destination."""
    found: dict[str, list[str]] = {}
    for value in values:
        name, _, message_id = value.partition(":")
        if is_destination_name(name) and is_id(message_id):
            found.setdefault(name, []).append(message_id)
    return [({"destination": [name]}, ids) for name, ids in found.items()]


@operator
async def go(request: Request) -> Response:
    """Do what a dry run has looked at, once its number is typed where it is large."""
    runs, who = request.app.state.runs, who_acts(request.state.visitor.name)
    looked = runs.find(request.path_params["id"], who)
    found = looked.found if looked and looked.state == "done" else None
    if not isinstance(found, DryRun):
        raise not_found("This look is not known any more: look again")
    if found.needs_number and field(request, "number").replace(",", "").strip() != str(found.preview.count):
        return RedirectResponse(f"/runs/{looked.id}?wrong=number", 303)
    looked.found = None  # once
    bulk, preview = found.bulk, found.preview

    def work(connection: Redis, run: Run) -> None:
        tally = bulk_actions.Tally(total=preview.count)
        run.total, run.found = preview.count, tally
        try:
            for count in bulk_actions.carry_out(bulk, runs.until_stopped(run, bulk_actions.agreed(preview)), tally):
                run.steps += count
        finally:
            tally.left = tally.total - run.steps
            bulk_actions.record(connection, bulk, tally)
            _tell(run, bulk, tally)
        if tally.left:
            raise Stopped

    return _begun(request, Run("do", found.button, who, found.kind.path), work)


def _tell(run: Run, bulk: BulkAction, tally: bulk_actions.Tally) -> None:
    done, skipped, left = (formatting.count(n, "copy", "copies") for n in (tally.done, tally.skipped, tally.left))
    run.say(bulk.said.format(done, bulk.done))
    if tally.skipped:
        run.say(bulk.skipped.format(skipped))
    if tally.left:
        run.say(f"{left} not come to.")


def _begun(request: Request, run: Run, work: Callable[[Redis, Run], None]) -> Response:
    try:
        begun = request.app.state.runs.begin(run, work)
    except NotBegun as error:
        going = request.app.state.runs.going(run.who)
        return RedirectResponse(f"/runs/{going.id}?busy=1" if going else f"{run.back}?busy={quote(str(error))}", 303)
    return RedirectResponse(f"/runs/{begun.id}", 303)


ROUTES = [
    *(Route(kind.path, partial(show, name=name), methods=["GET"]) for name, kind in KINDS.items()),
    Route("/look/{kind}", look, methods=["POST"]),
    Route("/runs/{id}/go", go, methods=["POST"]),
]
