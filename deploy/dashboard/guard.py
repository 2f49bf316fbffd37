"""What stands in front of rq-dashboard: a password for every page, and no help for other sites.

A browser adds the password to whatever any page asks it to send here, so that a request that another site has
caused is refused (403), and what changes something is a POST (405). /healthz alone needs no password and says
nothing but whether Redis answers (200 or 503).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import sys
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from redis import Redis
from redis.exceptions import RedisError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_WRONG = 10  # passwords from one address in a minute
_MINUTE = 60
_ADDRESSES = 10_000
_READING = {"GET", "HEAD"}
_CHANGING = ("/job/", "/queue/", "/requeue/")  # rq-dashboard takes GET for the last one


class Guard:
    """The WSGI application around ``app``; ``client`` is asked for /healthz."""

    def __init__(self, app: WSGIApplication, user: str, password: str, client: Redis) -> None:
        self._app = app
        self._expected = f"{user}:{password}".encode()
        self._client = client
        self._tries = _Tries()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        if path == "/healthz" and method in _READING:
            return _say(start_response, *self._health())
        given, address = environ.get("HTTP_AUTHORIZATION", ""), environ.get("REMOTE_ADDR", "")
        if given and self._tries.are_too_many(address):
            again = ("Retry-After", str(_MINUTE))
            return _say(start_response, "429 Too Many Requests", "too many wrong passwords", again)
        if not self._is_known(given):
            if given:
                self._tries.note(address)
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


class _Tries:
    """Wrong passwords of the last minute by address: so many each, and a line in the log when it is enough."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, tuple[float, int]] = {}  # when its minute began, how many

    def are_too_many(self, address: str) -> bool:
        with self._lock:
            begun, count = self._found.get(address, (0.0, 0))
            return count >= _WRONG and time.monotonic() - begun < _MINUTE

    def note(self, address: str) -> None:
        with self._lock:
            begun, count = self._found.pop(address, (0.0, 0))
            if time.monotonic() - begun >= _MINUTE:
                begun, count = time.monotonic(), 0
            self._found[address] = (begun, count + 1)
            while len(self._found) > _ADDRESSES:
                del self._found[next(iter(self._found))]
        if count + 1 == _WRONG:
            sys.stderr.write(f"dashboard: {_WRONG} wrong passwords from {address!r}: it is turned away for a minute\n")


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
