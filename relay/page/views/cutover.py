"""The cut-over: who answers, what a promotion would change, the name that is typed, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from redis import Redis
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from relay.cockpit import changeover, formatting, readiness
from relay.cockpit.readiness import Verdict
from relay.config.model import Settings
from relay.config.types import duration
from relay.ledger import audit
from relay.page.access import operator, viewer
from relay.page.live import Parts, live_of
from relay.page.runs import NotBegun, Run, Runs, Stopped, who_acts
from relay.page.views.shell import act, context_of, field, form_page, page, part, shared, value_of
from relay.topology import decisions, promotion
from relay.topology.decisions import Overtaken
from relay.topology.followers import follow
from relay.topology.promotion import ROUTE_WEIGHT, Plan, Unprepared
from relay.topology.roles import disagreement
from relay.topology.state import Topology

_CHANGES = 5
WAIT = "10s"
_LONGEST_WAIT = 600.0
_EVERY = 1.0
UNDO = "undo"


def standing(connection: Redis, settings: Settings, verdicts: Sequence[Verdict]) -> dict[str, object]:
    """Return who is the primary, who could be, and how it came to be so, for its template. Raises RedisError."""
    seen = decisions.view(connection)
    last = promotion.latest(seen, settings)
    acts = islice((done for done in audit.acts(connection) if done.command in promotion.COMMANDS), _CHANGES)
    return {
        "view": seen,
        "primary": promotion.current(seen, settings),
        "backups": verdicts,
        "history": list(acts),
        "disagreement": disagreement(settings, last),
        "previous": last.undone if last else "",
    }


async def _standing(request: Request) -> dict[str, object]:
    context = context_of(request)
    verdicts = await shared(request, "verdicts", 15.0, lambda: context.ask(readiness.verdicts, context.settings))
    return await shared(request, "standing", _EVERY / 2, lambda: context.ask(standing, context.settings, verdicts))


@viewer
async def show(request: Request) -> Response:
    """Show who answers and who could."""
    done = request.query_params.get("done", "")
    return await page(
        request,
        "cutover/roles.html",
        found=await _standing(request),
        said={"cancelled": "The preparation has ended: nothing has changed.", "none": "Nothing is being prepared."}.get(
            done, ""
        ),
    )


@viewer
async def live(request: Request) -> Response:
    """Send who follows."""

    async def parts() -> Parts:
        return {"standing": part(request, "cutover/standing.html", found=await _standing(request))}

    return live_of(request).stream(request, _EVERY, parts)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a promotion would do, with the verdict on the server where there is one."""

    plan: Plan
    verdict: Verdict | None
    lines: Sequence[tuple[str, str]]

    @property
    def is_undo(self) -> bool:
        return self.plan.command == UNDO

    @property
    def verb(self) -> str:
        """What is done to get there."""
        return "Go back to" if self.is_undo else "Set" if self.plan.command == ROUTE_WEIGHT else "Promote"

    @property
    def target(self) -> str:
        """What it is for: "new", or "b on shop"."""
        return changeover.target(self.plan)

    @property
    def needs_force(self) -> bool:
        """Whether it takes more than to be agreed to; weights are a share, and ask for nobody's readiness."""
        return self.plan.command != ROUTE_WEIGHT and self.verdict is not None and not self.verdict.is_ready

    @property
    def prepared(self) -> str:
        """The names of those to whom every relay process connects first."""
        change = self.plan.change
        return " and ".join(change.after.answering if change else ()) or self.plan.new.name


def propose(connection: Redis, settings: Settings, name: str, route: str = "") -> Proposal:
    """Return what it would take, on a route where one is named. ``name`` "undo" goes back. Raises Impossible."""
    if name == UNDO and not route:
        made = promotion.plan_undo(connection, settings)
        return Proposal(made, None, list(changeover.plan(made, None)))
    return judged(
        connection,
        settings,
        promotion.plan_on_route(connection, settings, name, route)
        if route
        else promotion.plan(connection, settings, name),
    )


def judged(connection: Redis, settings: Settings, made: Plan) -> Proposal:
    """Return a plan with the verdict on the server that it is about. Raises RedisError."""
    verdict = None if made.agree else changeover.verdict(connection, settings, made)
    return Proposal(made, verdict, list(changeover.plan(made, None)))


@viewer
async def plan(request: Request, wrong: dict[str, str] | None = None) -> Response:
    """Show what would change."""
    context, (name, route) = context_of(request), _asked(request)
    found = await context.ask(propose, context.settings, name, route)
    return await form_page(
        request,
        "cutover/plan.html",
        wrong,
        found=found,
        action=path_asked(request),
        hidden={},
        back="/routes" if route else "/cutover",
        wait=WAIT,
    )


def path_asked(request: Request) -> str:
    """Return the path of a request as it was sent."""
    return str(request.scope["raw_path"].decode("ascii"))


def _asked(request: Request) -> tuple[str, str]:
    """Return whose promotion a request is about, and on which route, "" for none."""
    return request.path_params["name"], request.path_params.get("route", "")


@operator
async def promote(request: Request) -> Response:
    """Begin a promotion, or the way back, whose name was typed."""
    context, (name, route) = context_of(request), _asked(request)
    found = await context.ask(propose, context.settings, name, route)
    order, wrong = read_order(request, found)
    if not wrong:
        title = f"Back to {found.target}" if found.is_undo else f"Promote {found.target}"
        try:
            return begin(request, found.plan, title, order, "/routes" if route else "/cutover")
        except NotBegun as error:
            wrong = {"typed": str(error)}
    return await plan(request, wrong)


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for: why, how long each step may take, and whether it is to be done without preparing."""

    reason: str
    details: dict[str, str]
    seconds: float
    at_once: bool


def read_order(request: Request, found: Proposal) -> tuple[Order, dict[str, str]]:
    """Return what a form asks for, and what is wrong with it, by field."""
    made, reason = found.plan, field(request, "reason").strip()
    wrong: dict[str, str] = {}
    if field(request, "typed").strip() != made.title:
        wrong["typed"] = f"Type {made.title} to go on."
    if found.needs_force and not field(request, "force"):
        wrong["force"] = f"{made.new.name} is not ready: tick this to go on all the same."
    if found.needs_force and not reason:
        wrong["reason"] = "Say why: it is kept with the change."
    seconds = min(value_of(field(request, "wait") or WAIT, duration().read, 0.0, wrong, "wait"), _LONGEST_WAIT)
    if made.agree:
        wrong["typed"] = changeover.nothing_to_do(made)
    details = {"readiness": found.verdict.summary} if found.verdict else {}
    details |= {"forced": "yes"} if found.needs_force else {}
    return Order(reason, details, seconds, found.is_undo and bool(field(request, "now"))), wrong


def begin(request: Request, made: Plan, title: str, order: Order, back: str) -> Response:
    """Begin to carry out what was planned, in the name of the visitor. Raises NotBegun."""
    runs = request.app.state.runs
    run = Run("promotion", title, who_acts(request.state.visitor.name), back)
    begun = runs.begin(run, lambda redis, run: _carry_out(redis, run, runs, made, order))
    return RedirectResponse(f"/runs/{begun.id}", 303)


def _carry_out(connection: Redis, run: Run, runs: Runs, made: Plan, order: Order) -> None:
    """Prepare, decide, and see who follows, as `smtp-dup promote` does. Raises Stopped, NotBegun, RedisError."""
    topology = _decide(connection, run, runs, made, order)
    at = formatting.time_of_day(topology.now.at)
    run.say(f"{changeover.done(made)} at {at}, epoch {topology.epoch}: it holds whatever becomes of this page.")
    run.found = None  # from here on there is no way but another promotion

    def report(text: str) -> None:
        run.progress = text
        if runs.is_stopping:
            raise Stopped

    found = follow(connection, made, order.seconds, report)
    for line in changeover.outcome(made, topology, found):
        run.say(line)
    if not found.is_well:
        run.state = "failed"


def _decide(connection: Redis, run: Run, runs: Runs, made: Plan, order: Order) -> Topology:
    run.found = made

    def report(text: str) -> None:
        run.progress = text
        if runs.is_to_stop(run):
            raise Stopped

    try:
        intent = None
        if not order.at_once:
            intent = promotion.prepare(connection, made, order.seconds, report)
            run.say(changeover.prepared(made))
        return promotion.commit(connection, made, order.reason, order.details, intent)
    except Unprepared as error:
        for line in error.lines:
            run.say(line)
        text = str(error)
        raise NotBegun(f"{text[:1].upper()}{text[1:]}.") from error
    except Overtaken as error:
        raise NotBegun(f"Nothing has changed: {error}.") from error


@operator
async def cancel(request: Request) -> Response:
    """End what is being prepared, whoever has begun it."""
    ended = await act(request, decisions.withdraw)
    return RedirectResponse(f"/cutover?done={'cancelled' if ended else 'none'}", 303)


ROUTES = [
    Route("/cutover", show, methods=["GET"]),
    Route("/cutover", cancel, methods=["POST"]),
    Route("/cutover-live", live, methods=["GET"]),
    Route("/cutover/{name}", plan, methods=["GET"]),
    Route("/cutover/{name}", promote, methods=["POST"]),
    Route("/routes/{route}/{name}", plan, methods=["GET"]),
    Route("/routes/{route}/{name}", promote, methods=["POST"]),
]
