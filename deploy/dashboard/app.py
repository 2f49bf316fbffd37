"""rq-dashboard for smtp-dup: with a password, mended, served by waitress.

    DASHBOARD_REDIS_URL=redis://localhost:6379/0 DASHBOARD_PASSWORD=... python app.py

With Sentinels DASHBOARD_REDIS_SENTINELS (as redis.sentinels) and DASHBOARD_REDIS_SERVICE (mymaster) name the server.
DASHBOARD_LISTEN (127.0.0.1:9181), DASHBOARD_USER (admin), DASHBOARD_PASSWORD or DASHBOARD_PASSWORD_FILE. Without
a password it makes one up at every start and prints it: there is no way to run it open. A setting that cannot be
used is one line and status 2. While Redis is away every page is a 503, and the next try connects anew.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import waitress
from guard import Guard
from mended import make_app
from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

_REDIS_SECONDS = 5.0
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Settings:
    """What the variables say. ``made_up``: nobody gave a password."""

    redis_url: str
    sentinels: tuple[str, ...]
    service: str
    host: str
    port: int
    user: str
    password: str
    made_up: bool
    page_url: str = ""


def read(environ: Mapping[str, str]) -> Settings:
    """Read the variables. Raises ValueError with what is wrong."""
    listen = environ.get("DASHBOARD_LISTEN") or "127.0.0.1:9181"
    address = re.fullmatch(r"\[?([^\[\]]*)\]?:(\d{1,5})", listen)
    if address is None:
        raise ValueError(f"DASHBOARD_LISTEN: expected host:port, not {listen!r}")
    redis_url = environ.get("DASHBOARD_REDIS_URL") or environ.get("SMTP_DUP_REDIS_URL") or ""
    given = environ.get("DASHBOARD_REDIS_SENTINELS") or environ.get("SMTP_DUP_REDIS_SENTINELS") or ""
    sentinels = tuple(text for part in given.split(",") if (text := part.strip()))
    if sentinels and not redis_url:
        redis_url = "redis://"
    if not redis_url:
        raise ValueError("DASHBOARD_REDIS_URL: must be given, as redis.url of smtp-dup")
    user = environ.get("DASHBOARD_USER") or "admin"
    if ":" in user:
        raise ValueError("DASHBOARD_USER: a colon cannot be part of it")
    given = environ.get("DASHBOARD_PASSWORD", "")
    if not given and (file := environ.get("DASHBOARD_PASSWORD_FILE")):
        try:
            given = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"DASHBOARD_PASSWORD_FILE: {file} cannot be read: {error}") from None
        if not given:
            raise ValueError(f"DASHBOARD_PASSWORD_FILE: {file} is empty")
    page_url = environ.get("DASHBOARD_PAGE_URL", "").strip()
    if page_url and not re.fullmatch(r"(?i)https?://[^\s/?#@]+(/\S*)?", page_url):
        raise ValueError("DASHBOARD_PAGE_URL: expected http://host:port or https://host, the page of smtp-dup")
    return Settings(
        redis_url=redis_url,
        sentinels=sentinels,
        service=environ.get("DASHBOARD_REDIS_SERVICE") or environ.get("SMTP_DUP_REDIS_SERVICE") or "mymaster",
        host=address[1] or "*",
        port=int(address[2]),
        user=user,
        password=given or secrets.token_urlsafe(12),
        made_up=not given,
        page_url=page_url,
    )


def connect(settings: Settings) -> Redis:
    """Return a client of the Redis, or of the master that the Sentinels name. Raises ValueError."""
    limits: dict[str, Any] = {
        "socket_timeout": _REDIS_SECONDS,
        "socket_connect_timeout": _REDIS_SECONDS,
        "retry": Retry(NoBackoff(), 1),  # once, silently: a kept connection that the server has closed
    }
    if not settings.sentinels:
        return Redis.from_url(settings.redis_url, **limits)
    options: dict[str, Any] = parse_url(settings.redis_url)
    tls = options.pop("connection_class", None) is not None
    kept = {name: value for name, value in options.items() if name not in {"host", "port", "path"}}
    sentinel = Sentinel([])
    urls = [text if "://" in text else f"redis://{text}" for text in settings.sentinels]
    sentinel.sentinels = [Redis.from_url(url, **limits, **_port(url)) for url in urls]
    client: Redis = sentinel.master_for(settings.service, ssl=tls, **kept, **limits)
    return client


def _port(url: str) -> dict[str, int]:
    return {} if urlsplit(url).port else {"port": 26379}


def main() -> None:
    """Serve until SIGTERM."""
    try:
        settings = read(os.environ)
        client = connect(settings)
        app = make_app(client, settings.redis_url, settings.page_url)
        guarded = Guard(app, settings.user, settings.password, client)
        server = waitress.create_server(
            guarded,
            host=settings.host,
            port=settings.port,
            threads=_THREADS,
            ident="",
            clear_untrusted_proxy_headers=True,
        )
    except ValueError as error:
        _end(str(error))
    except OSError as error:
        _end(f"DASHBOARD_LISTEN: cannot listen on {settings.host} port {settings.port}: {error.strerror}")
    signal.signal(signal.SIGTERM, _stop)
    sys.stdout.write(f"dashboard on http://{settings.host}:{settings.port}/, user {settings.user}\n")
    if settings.made_up:
        sys.stdout.write(f"password, until the next start: {settings.password} (set DASHBOARD_PASSWORD to keep one)\n")
    sys.stdout.flush()
    server.run()


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)  # waitress ends its threads with it


def _end(line: str) -> NoReturn:
    sys.stderr.write(f"dashboard: {line}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
