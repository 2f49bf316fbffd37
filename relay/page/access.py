"""Who may see and do what: host, session, role, origin and the token of a form are checked here, and nowhere else.

A request that is refused gets one page or line that says why, never a traceback. GET changes nothing; a POST needs a
session of an operator, the token of that session in its form, and an Origin that is the page's own.
"""

from __future__ import annotations

import functools
import hmac
from asyncio import Timeout, timeout
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec
from urllib.parse import parse_qs, quote

from loguru import logger
from redis.exceptions import RedisError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relay.ledger import page_access
from relay.ledger.page_access import OPERATOR, VIEWER, Session
from relay.page import rendering
from relay.page.context import PageContext
from relay.page.hosts import Site, is_same_origin

FORM_OCTETS = 64 << 10
_FORM_FIELDS = 5000
_FORM_TYPE = "application/x-www-form-urlencoded"
_REQUEST_SECONDS = 30.0  # until an answer begins
_LONGEST_PATH = 1000  # characters that a login goes on to
_OPEN_TO_ALL = {"/login", "/open"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer Chromium sends "Origin: null" with forms
}

P = ParamSpec("P")
Handler = Callable[[Request], Awaitable[Response]]
View = Callable[Concatenate[Request, P], Awaitable[Response]]  # of a request, and of what another view hands on


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who asks: ``role`` None is whoever has not logged in, and sees numbers only."""

    name: str = ""
    role: str | None = None
    csrf: str = ""  # for the forms of this session

    @property
    def may_see(self) -> bool:
        """Whether addresses and messages may be shown."""
        return self.role in {VIEWER, OPERATOR}

    @property
    def may_act(self) -> bool:
        """Whether something may be changed."""
        return self.role == OPERATOR


NOBODY = Visitor()


class Access:
    """The outermost middleware of the page."""

    def __init__(self, app: ASGIApp, context: PageContext) -> None:
        self._app = app
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        limit: Timeout | None = None

        async def send_safely(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                if limit:
                    limit.reschedule(None)  # from here on the connection has the deadlines
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        request = Request(scope, receive)
        request.state.visitor = NOBODY
        try:
            async with timeout(_REQUEST_SECONDS) as limit:
                response = await self._refusal(request)
                await (response or self._app)(scope, receive, send_safely)
        except ClientDisconnect:
            raise
        except Exception as error:
            if has_begun:
                raise
            limit = None
            await _said(request, error)(scope, receive, send_safely)

    async def _refusal(self, request: Request) -> Response | None:
        """Find out who asks. Returns a response where they get nothing else."""
        hosts, server = request.headers.getlist("host"), request.scope.get("server")
        site = self._context.hosts.site(hosts[0], server[0] if server else "") if len(hosts) == 1 else None
        if site is None:
            return PlainTextResponse("this page has other names: see status.hosts\n", 421)
        request.state.site = site
        if rendering.serves(request.scope["path"]):
            return None
        if token := request.cookies.get(cookie_name(self._context, site)):
            session = await page_access.find(self._context.redis, token)
            request.state.visitor = visitor_of(self._context, session)
        if request.state.visitor is NOBODY and self._context.has_users and request.scope["path"] not in _OPEN_TO_ALL:
            return _to_login(request)
        return None


def visitor_of(context: PageContext, session: Session | None) -> Visitor:
    """Return whom a session stands for now: a user who is gone, or has another password, is nobody."""
    if session is None:
        return NOBODY
    role = session.role
    if session.mark:
        user = context.users.find(session.name)
        if user is None or not hmac.compare_digest(user.mark, session.mark):
            return NOBODY
        role = user.role
    return Visitor(session.name, role, session.csrf)


async def is_still_there(request: Request) -> bool:
    """Return whether the session of a stream that goes on is still one of the same role. Raises RedisError."""
    context, visitor = request.app.state.context, request.state.visitor
    token = request.cookies.get(cookie_name(context, request.state.site), "")
    session = await page_access.find(context.redis, token, is_used=False) if token else None
    return bool(visitor_of(context, session).role == visitor.role)


def cookie_name(context: PageContext, site: Site) -> str:
    """Return the name of the session's cookie: browsers share cookies between the ports of a host."""
    address = context.settings.status.address
    return f"{'__Host-' * site.is_tls}smtp-dup-{address[1] if address else 0}"


def _to_login(request: Request) -> Response:
    """Send a browser to the login; a script hears 401."""
    accept = request.headers.get("accept", "")
    if request.method == "GET" and ("text/html" in accept or accept in {"", "*/*"}):
        path = request.scope["path"] + (f"?{query}" if (query := request.url.query) else "")
        is_plain = path == "/" or len(path) > _LONGEST_PATH
        return RedirectResponse("/login" if is_plain else f"/login?next={quote(path, safe='/')}", 303)
    return PlainTextResponse("log in first\n", 401)


def _said(request: Request, error: Exception) -> Response:
    """Return the response to what was raised before there was one."""
    if isinstance(error, RedisError | TimeoutError):
        logger.debug("page: {}", error)
        text = "Redis does not answer, and with it the ledger. Mail goes on by the spool; /readyz says more."
        return refused(request, 503, "Redis is away", text)
    logger.opt(exception=error).error("page: a request failed")
    return refused(request, 500, "This failed", "The log of smtp-dup says why.")


def refused(request: Request, status: int, title: str, text: str) -> Response:
    """Return a page that says why there is nothing else."""
    try:
        response: Response = rendering.render(request, "message.html", status=status, title=title, text=text)
    except Exception:
        logger.exception("page: the template of messages failed")
        response = PlainTextResponse(f"{title}\n{text}\n", status)
    if status == 503:
        response.headers["Retry-After"] = "3"
    return response


async def on_http_error(request: Request, error: Exception) -> Response:
    """Answer what no route takes, and what a view refuses by an HTTPException."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    detail = error.detail if isinstance(error, HTTPException) else ""
    response = refused(request, status, detail or "Refused", "")
    response.headers.update(getattr(error, "headers", None) or {})
    return response


async def on_not_there(request: Request, error: Exception) -> Response:
    """Answer where what is asked for is not there, as the text of the exception says."""
    return refused(request, 404, str(error), "")


# Views --------------------------------------------------------------------------------------------------------


def viewer(handler: View[P]) -> View[P]:
    """Have a view only for those who have logged in."""

    @functools.wraps(handler)
    async def guarded(request: Request, /, *args: P.args, **options: P.kwargs) -> Response:
        if not request.state.visitor.may_see:
            return _who_are_you(request)
        return await handler(request, *args, **options)

    return guarded


def operator(handler: Handler) -> Handler:
    """Have a POST only from an operator's own page; ``request.state.form`` has its fields, each a list."""
    return _posted(handler, lambda visitor: visitor.may_act)


def signed(handler: Handler) -> Handler:
    """Have a POST from the own page of anybody who has logged in."""
    return _posted(handler, lambda visitor: visitor.may_see)


def _posted(handler: Handler, may: Callable[[Visitor], bool]) -> Handler:
    @functools.wraps(handler)
    async def guarded(request: Request) -> Response:
        visitor: Visitor = request.state.visitor
        if not visitor.may_see:
            return _who_are_you(request)
        if not may(visitor):
            return refused(request, 403, "Not allowed", "A viewer changes nothing; an operator may.")
        form = await own_form(request)
        given = form.get("csrf", [""])
        if len(given) != 1 or not hmac.compare_digest(given[0].encode(), visitor.csrf.encode()):
            return refused(request, 403, "Not accepted", "This form is not of your session: load the page again.")
        request.state.form = form
        return await handler(request)

    return guarded


def _who_are_you(request: Request) -> Response:
    if request.app.state.context.has_users:
        return _to_login(request)
    text = "Without users this page shows numbers only. `smtp-dup open` prints a link that lets you in."
    return refused(request, 403, "Who are you?", text)


async def own_form(request: Request) -> dict[str, list[str]]:
    """Return the fields of a form that comes from this page. Raises HTTPException."""
    if request.method != "POST" or not is_same_origin(request.state.site, request.headers):
        raise HTTPException(403, "Not sent by this page")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM_TYPE:
        raise HTTPException(415, "Not a form")
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > FORM_OCTETS:
            raise HTTPException(413, "The form is too large")
    try:
        text = body.decode("ascii")
        return parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=_FORM_FIELDS)
    except ValueError:
        raise HTTPException(400, "The form cannot be read") from None
