"""Templates and static files: read once from the package, then in memory.

Everything is escaped but what a template marks itself; a name that a view has forgotten is an error.
Static files have the digest of their content in their path, so that a browser may keep them for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

_PREFIX = "/static/"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".txt": "text/plain; charset=utf-8",
}
_FOR_EVER = "public, max-age=31536000, immutable"


class _Asset(NamedTuple):
    path: str
    content: bytes
    content_type: str


@cache
def _assets() -> Mapping[str, _Asset]:
    """Return each static file by its name; one of another type, such as a licence without ending, is not served."""
    found = {}
    for file in files("relay.page").joinpath("static").iterdir():
        stem, dot, ending = file.name.rpartition(".")
        if content_type := _TYPES.get(dot + ending):
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:12]
            found[file.name] = _Asset(f"{_PREFIX}{stem}.{digest}.{ending}", content, content_type)
    return found


def asset(name: str) -> str:
    """Return the path of a static file, with its digest. Raises KeyError."""
    return _assets()[name].path


def serves(path: str) -> bool:
    """Return whether a path is that of a static file."""
    return path.startswith(_PREFIX)


async def _static(request: Request) -> Response:
    found = next((one for one in _assets().values() if one.path == request.scope["path"]), None)
    if found is None:
        return Response("not found\n", 404, media_type="text/plain")
    return Response(found.content, headers={"Content-Type": found.content_type, "Cache-Control": _FOR_EVER})


@cache
def environment() -> Environment:
    """Return the templates of the page; a view may add filters where it is imported."""
    made = Environment(
        loader=PackageLoader("relay.page"),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["asset"] = asset
    return made


def render(request: Request, name: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page made of a template.

    Besides ``values`` the template has ``visitor``, ``path``, ``has_users``, ``has_routes``, ``dashboard_url`` and
    ``asset(name)``.
    """
    context = request.app.state.context
    text = (
        environment()
        .get_template(name)
        .render(
            visitor=request.state.visitor,
            path=request.scope["path"],
            has_users=context.has_users,
            dashboard_url=context.settings.status.dashboard_url,
            has_routes=bool(context.settings.route_table),
            **values,
        )
    )
    return HTMLResponse(text, status)


ROUTES = [Route(_PREFIX + "{name}", _static, methods=["GET"])]
