"""What stands in front of rq-dashboard: a password for every page, and no help for other sites.

A browser adds the password to whatever any page asks it to send here, so that a request that another site has
caused is refused (403), and what changes something is a POST (405). /healthz alone needs no password and says
nothing but whether Redis answers (200 or 503).
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable
from typing import TYPE_CHECKING

from redis import Redis
from redis.exceptions import RedisError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_READING = {"GET", "HEAD"}
_CHANGING = ("/job/", "/queue/", "/requeue/")  # rq-dashboard takes GET for the last one


class Guard:
    """The WSGI application around ``app``; ``client`` is asked for /healthz."""

    def __init__(self, app: WSGIApplication, user: str, password: str, client: Redis) -> None:
        self._app = app
        self._expected = f"{user}:{password}".encode()
        self._client = client

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        if path == "/healthz" and method in _READING:
            return _say(start_response, *self._health())
        if not self._is_known(environ.get("HTTP_AUTHORIZATION", "")):
            challenge = ("WWW-Authenticate", 'Basic realm="smtp-dup dashboard", charset="UTF-8"')
            return _say(start_response, "401 Unauthorized", "a user and a password, please", challenge)
        if method in _READING:
            if path.startswith(_CHANGING):
                return _say(start_response, "405 Method Not Allowed", "only by POST", ("Allow", "POST"))
        elif not _is_own(environ):
            return _say(start_response, "403 Forbidden", "this request comes from another site")
        return self._app(environ, start_response)

    def _health(self) -> tuple[str, str]:
        try:
            self._client.ping()
        except RedisError:
            return "503 Service Unavailable", "Redis does not answer"
        return "200 OK", "ok"

    def _is_known(self, header: str) -> bool:
        scheme, _, encoded = header.partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            given = base64.b64decode(encoded.strip(), validate=True)
        except binascii.Error:
            return False
        return hmac.compare_digest(given, self._expected)  # takes as long for a near miss as for a wild guess


def _is_own(environ: WSGIEnvironment) -> bool:
    """Say whether a page of ours, or no browser at all, sent this request."""
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site is not None:
        return site in {"same-origin", "none"}
    origin = environ.get("HTTP_ORIGIN")  # browsers from before 2023
    return origin is None or origin.partition("://")[2] == environ.get("HTTP_HOST")


def _say(start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> list[bytes]:
    body = f"{text}\n".encode()
    start_response(
        status,
        [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *headers],
    )
    return [body]
