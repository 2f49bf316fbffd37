"""Logging in by password or by a link of `smtp-dup open`, and out again."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from relay import maillog
from relay.ledger import page_access
from relay.page.access import cookie_name, own_form, refused, signed
from relay.page.rendering import render
from relay.smtpd.passwords import Busy

_OWN_PATH = re.compile(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]{0,2000}")
_LONGEST = 256  # characters of a name


async def ask(request: Request) -> Response:
    """Show the form for name and password."""
    if not request.app.state.context.has_users:
        return RedirectResponse("/", 303)
    return render(request, "login.html", next=_own_path(request.query_params.get("next", "")), name="", trouble="")


async def log_in(request: Request) -> Response:
    """Begin a session for who knows the password of a name."""
    context = request.app.state.context
    form = await own_form(request)
    name, password, further = (_one(form, field) for field in ("name", "password", "next"))
    client = request.client.host if request.client else ""
    trouble = ""
    if not context.has_users:
        return RedirectResponse("/", 303)
    if not context.tries.take(client, name[:_LONGEST]):
        trouble, reason, status = "Too many tries. Wait a minute.", "too many tries", 429
    else:
        try:
            if user := await context.users.log_in(name, password):
                context.tries.forgive(client, name)
                return await _begin(request, name, user.role, user.mark, further, how="password")
            trouble, reason, status = "Name or password is wrong.", "", 401
        except Busy:
            trouble, reason, status = "Too many log in at this moment. Try again.", "busy", 503
    maillog.page_login_refused(client, name[:_LONGEST], reason)
    return render(request, "login.html", status=status, next=_own_path(further), name=name[:_LONGEST], trouble=trouble)


async def ask_with_link(request: Request) -> Response:
    """Show a button: a browser may load a link before anybody follows it, and it is good only once."""
    return render(request, "open.html", token=request.query_params.get("token", ""))


async def log_in_with_link(request: Request) -> Response:
    """Begin a session for who has a link that was not used."""
    context = request.app.state.context
    form = await own_form(request)
    client = request.client.host if request.client else ""
    found = await page_access.take_link(context.redis, _one(form, "token"))
    if found is None:
        maillog.page_login_refused(client, "", "the link is used or too old")
        text = "A link is good once, for a minute. `smtp-dup open` prints another."
        return refused(request, 403, "This link is used or too old", text)
    return await _begin(request, found[0], found[1], "", "", how="link")


@signed
async def log_out(request: Request) -> Response:
    """End the session."""
    await _end(request)
    response = RedirectResponse("/login" if request.app.state.context.has_users else "/", 303)
    name = cookie_name(request.app.state.context, request.state.site)
    response.delete_cookie(name, secure=request.state.site.is_tls, httponly=True, samesite="strict")
    return response


async def _begin(request: Request, name: str, role: str, mark: str, further: str, *, how: str) -> Response:
    """Begin a session with a token of its own: whatever cookie came with the request is no longer one."""
    context, site = request.app.state.context, request.state.site
    await _end(request)
    token, _ = await page_access.begin(context.redis, name, role, mark)
    maillog.page_logged_in(request.client.host if request.client else "", name, role, how)
    response = RedirectResponse(_own_path(further) or "/", 303)
    response.set_cookie(cookie_name(context, site), token, secure=site.is_tls, httponly=True, samesite="strict")
    return response


async def _end(request: Request) -> None:
    context = request.app.state.context
    if token := request.cookies.get(cookie_name(context, request.state.site)):
        await page_access.end(context.redis, token)


def _own_path(text: str) -> str:
    """Return a path of this page to go on with, "" where it is none: a login must not end at another site."""
    return text if _OWN_PATH.fullmatch(text) else ""


def _one(form: dict[str, list[str]], field: str) -> str:
    return form.get(field, [""])[0]


ROUTES = [
    Route("/login", ask, methods=["GET"]),
    Route("/login", log_in, methods=["POST"]),
    Route("/open", ask_with_link, methods=["GET"]),
    Route("/open", log_in_with_link, methods=["POST"]),
    Route("/logout", log_out, methods=["POST"]),
]
