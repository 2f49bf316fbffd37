"""The overview: who answers, how each backup does, the flow of now and of a day, whether a backup is ready.

Whoever has not logged in sees the numbers, and nobody's words: no reply, no reason, no domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.cockpit import evidence_from_redis, extensions, readiness, roles_now, top
from relay.cockpit.extensions import Extension
from relay.cockpit.readiness import Verdict
from relay.cockpit.top import Frame
from relay.config.model import Settings
from relay.json_text import json_text
from relay.ledger import changes, flow
from relay.ledger.flow import Flow
from relay.page.access import viewer
from relay.page.live import Parts, live_of
from relay.page.views.shell import context_of, page, part, shared

_EVERY = 2.0  # seconds between two looks of a page that is open
_VERDICT_SECONDS = 15.0  # a verdict reads the flow of five weeks
_FLOW_SECONDS = 5.0
_MINUTES, _HOURS = 60, 25
_PARTS = ("roles", "servers", "verdicts", "flow", "events", "hosts")


@dataclass(frozen=True, slots=True)
class Plot:
    """What was counted in stretches of so many ``seconds``, from each time on: what came, what became of it."""

    name: str
    title: str
    seconds: int
    times: tuple[float, ...]
    lines: tuple[dict[str, Any], ...]  # the name of each, and its values, oldest first

    @property
    def as_json(self) -> str:
        """Return it for the plot in the browser."""
        return json_text({"name": self.name, "seconds": self.seconds, "times": self.times, "lines": self.lines})

    @property
    def total(self) -> int:
        """What was accepted in all of it."""
        return int(sum(self.lines[0]["values"])) if self.lines else 0


def plot(name: str, title: str, unit: flow.Unit, flows: Sequence[Flow], backups: Sequence[str]) -> Plot:
    """Return what was accepted, what was refused, and what each backup took, in each stretch of time."""
    lines = [
        {"name": "accepted", "values": [float(found.accepted) for found in flows]},
        *({"name": f"{who} took", "values": [float(f.of(who).delivered) for f in flows]} for who in backups),
        {"name": "refused", "values": [float(found.refused) for found in flows]},
    ]
    return Plot(name, title, unit.seconds, tuple(found.start for found in flows), tuple(lines))


def plots(connection: Redis, settings: Settings) -> list[Plot]:
    """Return the flow of the last hour by minutes, and of a day by hours; neither with what is not over."""
    now = changes.now(connection)
    backups = roles_now.by_default(connection, settings)[1][:6]
    minutes = flow.read(connection, flow.MINUTE, _MINUTES + 1, now)[:-1]
    hours = flow.read(connection, flow.HOUR, _HOURS, now)
    return [
        plot("now", "Last hour", flow.MINUTE, minutes, backups),
        plot("day", "Last 24 hours", flow.HOUR, hours, backups),
    ]


async def show(request: Request) -> Response:
    """Show the overview."""
    return await page(request, "overview.html", **await _found(request))


async def live(request: Request) -> Response:
    """Send what changes on the overview."""
    return live_of(request).stream(request, _EVERY, lambda: _parts(request))


async def _parts(request: Request) -> Parts:
    async def render() -> Parts:
        found = await _found(request)
        return {name: part(request, f"overview/{name}.html", **found) for name in _PARTS}

    return await shared(request, ("overview", request.state.visitor.role), _EVERY / 2, render)


async def _found(request: Request) -> dict[str, Any]:
    context = context_of(request)
    settings = context.settings
    verdicts = await shared(request, "verdicts", _VERDICT_SECONDS, lambda: context.ask(readiness.verdicts, settings))
    frame: Frame = await shared(request, "frame", _EVERY / 2, lambda: context.ask(top.look, settings, verdicts))
    drawn = await shared(request, "plots", _FLOW_SECONDS, lambda: context.ask(plots, settings))
    primary = next((row for row in frame.rows if row.is_primary), None)
    backups = [row for row in frame.rows if not row.is_primary]
    return {"frame": frame, "plots": drawn, "primary": primary, "backups": backups}


# The verdict as evidence ----------------------------------------------------------------------------------------------


def evidence(connection: Redis, settings: Settings, name: str) -> tuple[Verdict, Sequence[Extension]]:
    """Return the verdict on a backup, with what both servers offer. Raises UnknownBackup, RedisError."""
    known = evidence_from_redis.gather(connection, settings, name)
    rows = extensions.compare(known.old_greeting, known.new_greeting, flow.total(known.hours))
    return readiness.judge(known), rows


@viewer
async def ready(request: Request) -> Response:
    """Show the verdict on one backup with each rule and its settings, on a sheet of paper where it is printed."""
    context = context_of(request)
    verdict, compared = await context.ask(evidence, context.settings, request.path_params["name"])
    return await page(request, "ready.html", verdict=verdict, extensions=compared)


ROUTES = [
    Route("/", show, methods=["GET"]),
    Route("/live", live, methods=["GET"]),
    Route("/ready/{name}", ready, methods=["GET"]),
]
