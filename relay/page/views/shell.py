"""What the views have in common: the frame with its counts, and how mail's words and numbers are shown.

Whatever a template writes has passed ``printable``: control characters, and those that turn the direction of text, are
escaped before Jinja escapes HTML. What is long is cut by the template that shows it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from markupsafe import Markup, escape
from redis import Redis
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from relay.cockpit import formatting
from relay.ledger import audit, divergence_groups, overview
from relay.mail.text import printable
from relay.page.context import PageContext
from relay.page.live import live_of
from relay.page.rendering import environment, render
from relay.page.runs import who_acts
from relay.topology import moving

_BADGES_SECONDS = 2.0
_WIDTH, _HEIGHT = 120.0, 24.0  # of a sparkline, in its own units

T = TypeVar("T")


def context_of(request: Request) -> PageContext:
    """Return what a request of the page has at hand."""
    found: PageContext = request.app.state.context
    return found


async def page(request: Request, template: str, /, *, status: int = 200, **values: Any) -> Response:
    """Return a view in its frame."""
    return render(request, template, status=status, badges=await _badges(request), **values)


async def form_page(request: Request, template: str, wrong: Mapping[str, str] | None, /, **values: Any) -> Response:
    """Return a view with a form, as it was sent where something is ``wrong`` with one of its fields."""
    given = getattr(request.state, "form", {})
    return await page(request, template, status=400 if wrong else 200, wrong=wrong or {}, given=given, **values)


def part(request: Request, template: str, /, **values: Any) -> str:
    """Return a part of a view, for the stream of a page that is open."""
    return environment().get_template(template).render(visitor=request.state.visitor, **values)


async def _badges(request: Request) -> dict[str, int]:
    """Return the numbers beside the names of the views."""
    context = context_of(request)
    return await live_of(request).shared.get("badges", _BADGES_SECONDS, lambda: context.ask(_count))


def _count(connection: Redis) -> dict[str, int]:
    rows = overview.summary(connection)
    moved, _ = moving.state(connection)
    numbers = [divergence_groups.numbers(connection, row.destination) for row in rows]
    return {
        "waiting": sum(row.pending for row in rows),
        "failed": sum(row.failed for row in rows),
        "divergence": sum(sum(found.open.values()) for found in numbers),
        "moved": moved.count if moved else 0,
    }


async def act(request: Request, change: Callable[[Redis], T]) -> T:
    """Do what changes something in the name of the visitor. Raises what it raises."""

    def done(connection: Redis) -> T:
        with audit.acting(who_acts(request.state.visitor.name)):
            return change(connection)

    found: T = await context_of(request).ask(done)
    return found


async def shared(request: Request, key: object, seconds: float, find: Callable[[], Awaitable[T]]) -> T:
    """Return what all who look at the same within some seconds have in common."""
    return await live_of(request).shared.get(key, seconds, find)


def not_found(text: str) -> HTTPException:
    """Return that there is no such thing."""
    return HTTPException(404, text)


def field(request: Request, name: str) -> str:
    """Return a field of the form of a POST, "" where it is not there."""
    return str(request.state.form.get(name, [""])[0])


def value_of(text: str, read: Callable[[str], T], default: T, wrong: dict[str, str], name: str) -> T:
    """Return what a field says, as ``read`` has it; where it makes no sense, why goes into ``wrong``."""
    try:
        return read(text)
    except ValueError as error:
        wrong[name] = str(error)
        return default


# How it is shown --------------------------------------------------------------------------------------------------


def said(value: object) -> object:
    """Return what a template may write: text without characters that steer a browser or a reader."""
    return printable(value) if type(value) is str else value


def cut(text: str, most: int = 300) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def number(value: float) -> str:
    """Return a whole number with its thousands apart."""
    return f"{value:,.0f}"


def rate(value: float) -> str:
    """Return messages a second."""
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def moment(at: float | None) -> Markup:
    """Return a time as an element: short for people, and whole for programs and for who points at it."""
    if not at or not math.isfinite(at) or not 0 < at < 1e11:
        return Markup("-")
    local = time.localtime(at)
    is_today = local[:3] == time.localtime()[:3]
    shown = time.strftime("%H:%M:%S" if is_today else "%Y-%m-%d %H:%M", local)
    whole = time.strftime("%Y-%m-%dT%H:%M:%S%z", local)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(whole, formatting.moment(at), shown)


def ago(at: float, now: float) -> str:
    """Return for how long something has been."""
    return formatting.span(now - at)


def spark(values: Sequence[float], title: str = "", *, large: bool = False) -> Markup:
    """Return a row of numbers as a picture of small bars; ``title`` is what a screen reader says."""
    top = max(values, default=0) or 1
    step = _WIDTH / max(1, len(values))
    gap = min(1.0, step * 0.2)
    bars = Markup("").join(
        Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
            n * step, _HEIGHT - (h := max(1.0, _HEIGHT * value / top)), step - gap, h
        )
        for n, value in enumerate(values)
        if value > 0
    )
    return (
        Markup(
            '<svg class="{}" viewBox="0 0 {:.0f} {:.0f}" preserveAspectRatio="none" role="img" aria-label="{}">'
        ).format("spark wide-spark" if large else "spark", _WIDTH, _HEIGHT, printable(title))
        + bars
        + Markup("</svg>")
    )


def commands(text: str) -> Markup:
    """Return a text with what stands in it between grave accents as code."""
    parts = printable(text).split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )


environment().finalize = said
environment().filters.update(
    ago=ago,
    address=formatting.address,
    commands=commands,
    cut=cut,
    count=formatting.count,
    duration=formatting.duration,
    moment=moment,
    whole=formatting.moment,
    number=number,
    octets=formatting.octets,
    rate=rate,
    span=formatting.span,
    spark=spark,
)
