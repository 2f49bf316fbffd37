"""What stands in front of rq-dashboard lets nobody in without the password, and no other site act for who has it."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_spec = importlib.util.spec_from_file_location(
    "dashboard_guard", Path(__file__).parents[2] / "deploy" / "dashboard" / "guard.py"
)
assert _spec
assert _spec.loader
guard = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(guard)


def _basic(text: bytes) -> dict[str, str]:
    return {"HTTP_AUTHORIZATION": f"Basic {base64.b64encode(text).decode()}"}


RIGHT = _basic(b"admin:secret")


def ask(path: str, method: str = "GET", client: redis.Redis | None = None, **headers: str) -> int:
    """Return the status of a request to an application that answers everything."""

    def app(_environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"shown"]

    said: list[str] = []
    environ = {"PATH_INFO": path, "REQUEST_METHOD": method, "HTTP_HOST": "board.example", **headers}
    body = guard.Guard(app, "admin", "secret", client)(environ, lambda status, _headers: said.append(status))
    assert (b"shown" in b"".join(body)) == (said[0] == "200 OK" and path != "/healthz")
    return int(said[0][:3])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        _basic(b"admin:wrong"),
        _basic(b"admin:"),
        _basic(b":secret"),
        _basic(b"admin:secret\0"),
        {"HTTP_AUTHORIZATION": "Basic !"},
        {"HTTP_AUTHORIZATION": "Bearer " + RIGHT["HTTP_AUTHORIZATION"][6:]},
        {"HTTP_AUTHORIZATION": ""},
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "path", ["/", "/0/data/queues.json", "/static/x.css", "/healthz/", "//healthz", "/job/1/requeue"]
)
def test_nothing_without_the_password(headers: dict[str, str], method: str, path: str) -> None:
    """Every page, and what is no page, asks for the user and the password."""
    assert ask(path, method, **headers) == 401


def test_the_password_opens(redis_client: redis.Redis) -> None:
    """Who has it sees pages and may act; only /healthz is for everybody, and tells nothing more."""
    assert ask("/", **RIGHT) == 200
    assert ask("/job/1/requeue", "POST", HTTP_SEC_FETCH_SITE="same-origin", **RIGHT) == 200
    assert ask("/job/1/requeue", "POST", HTTP_ORIGIN="https://board.example", **RIGHT) == 200
    assert ask("/job/1/requeue", "POST", **RIGHT) == 200  # no browser
    assert ask("/healthz", client=redis_client) == 200
    away = redis.Redis(unix_socket_path="/nonexistent", retry=Retry(NoBackoff(), 0))
    assert ask("/healthz", client=away) == 503


@pytest.mark.parametrize(
    "headers",
    [
        {"HTTP_SEC_FETCH_SITE": "cross-site"},
        {"HTTP_SEC_FETCH_SITE": "same-site"},
        {"HTTP_ORIGIN": "https://elsewhere.example"},
        {"HTTP_ORIGIN": "null"},
        {"HTTP_ORIGIN": "https://elsewhere.example", "HTTP_SEC_FETCH_SITE": "cross-site"},
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_no_other_site_acts_for_who_has_it(headers: dict[str, str], method: str) -> None:
    """A browser adds the password to what any page asks it to send: what another site has caused is refused."""
    assert ask("/job/1/requeue", method, **headers, **RIGHT) == 403


@pytest.mark.parametrize("path", ["/job/1/requeue", "/queue/x/empty", "/requeue/x"])
def test_no_change_by_get(path: str) -> None:
    """An image on some page is a GET: it changes nothing."""
    assert ask(path, **RIGHT) == 405


def test_guessing_is_slow_and_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten wrong passwords of an address, and it is turned away for a minute, with a line; others are not."""

    def app(_environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"shown"]

    one = guard.Guard(app, "admin", "secret", None)

    def try_from(address: str, headers: dict[str, str]) -> int:
        said: list[str] = []
        environ = {"PATH_INFO": "/", "REQUEST_METHOD": "GET", "REMOTE_ADDR": address, **headers}
        one(environ, lambda status, _headers: said.append(status))
        return int(said[0][:3])

    assert [try_from("192.0.2.1", _basic(b"admin:%d" % n)) for n in range(12)] == [401] * 10 + [429] * 2
    assert try_from("192.0.2.1", RIGHT) == 429
    assert try_from("192.0.2.2", RIGHT) == 200
    assert capsys.readouterr().err.count("10 wrong passwords from '192.0.2.1'") == 1
