"""The page in this process: a server in a thread on a free port, and a client that keeps cookies as a browser does.

Unlike a browser the client sends exactly the headers that a test gives it, also those that no browser would.
"""

from __future__ import annotations

import functools
import http.client
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from redis import Redis

from relay.config.loader import load
from relay.config.model import Settings
from relay.ledger import page_access
from relay.monitoring.answers import HttpAnswer
from relay.page import server
from relay.smtpd.passwords import hash_password

PASSWORD = "correct horse"
_hash_password = functools.cache(hash_password)  # a check takes 50 ms; so does making one


def users_file(folder: Path, *users: str, name: str = "users") -> Path:
    """Write a file of users such as "ann:operator", all with PASSWORD."""
    path = folder / name
    path.write_text(
        "".join(f"{user.partition(':')[0]}:{_hash_password(PASSWORD)}:{user.partition(':')[2]}\n" for user in users)
    )
    path.chmod(0o600)
    return path


@dataclass
class Reply:
    """What a request heard."""

    status: int
    headers: Mapping[str, str]
    text: str
    cookies: list[str]

    @property
    def csrf(self) -> str:
        found = re.search(r'name="csrf" value="([^"]+)"', self.text)
        assert found, self.text
        return found[1]


@dataclass
class PageClient:
    """A browser with its cookies, which asks one thing after the other."""

    port: int
    host: str = ""
    cookies: dict[str, str] = field(default_factory=dict)
    secure: bool = False

    def __post_init__(self) -> None:
        self.host = self.host or f"127.0.0.1:{self.port}"

    @property
    def origin(self) -> str:
        return f"http{'s' * self.secure}://{self.host}"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str | None) -> Reply:
        """Send a request; a header that is None is left out."""
        given: dict[str, str | None] = {"Host": self.host, "Accept": "text/html"}
        if self.cookies:
            given["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in given.items():
                if value is not None:
                    connection.putheader(name, value)
            if body is not None and "Content_Length" not in headers:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        finally:
            connection.close()
        cookies = [value for name, value in response.getheaders() if name.lower() == "set-cookie"]
        for cookie in cookies:
            name, _, rest = cookie.partition("=")
            value = rest.partition(";")[0].strip('"')
            if value:
                self.cookies[name] = value
            else:
                self.cookies.pop(name, None)
        return Reply(response.status, {n.lower(): v for n, v in response.getheaders()}, text, cookies)

    def get(self, path: str, **headers: str | None) -> Reply:
        return self.ask("GET", path, **headers)

    def post(self, path: str, form: Mapping[str, Any] | bytes, **headers: str | None) -> Reply:
        """Send a form as the page's own would be sent."""
        body = form if isinstance(form, bytes) else urlencode(form, doseq=True).encode()
        own: dict[str, str | None] = {
            "Origin": self.origin,
            "Sec_Fetch_Site": "same-origin",
            "Content_Type": "application/x-www-form-urlencoded",
        }
        return self.ask("POST", path, body, **(own | headers))

    def log_in(self, name: str, password: str = PASSWORD, **more: str) -> Reply:
        return self.post("/login", {"name": name, "password": password, **more})

    @property
    def session_cookie(self) -> str:
        return next(name for name in self.cookies if "smtp-dup" in name)


@dataclass
class ServedPage:
    """A page that is served, with its settings and its Redis."""

    settings: Settings
    port: int
    redis: Redis

    def client(self, host: str = "", *, secure: bool = False) -> PageClient:
        return PageClient(self.port, host, secure=secure)

    def logged_in(self, name: str) -> PageClient:
        client = self.client()
        assert client.log_in(name).status == 303
        return client

    def opened(self, role: str = "operator") -> PageClient:
        """Return a client that has followed a link."""
        client = self.client()
        token = page_access.make_link(self.redis, "somebody", role)
        assert client.post("/open", {"token": token}).status == 303
        return client


@contextmanager
def served_page(
    redis_url: str, folder: Path, *, listen: str = "127.0.0.1", redis_at: str = "", **values: str
) -> Iterator[ServedPage]:
    """Serve the page with these settings (``status__hosts="…"``), and health answers that are always well."""
    listener = socket.create_server((listen or "0.0.0.0", 0))
    port = listener.getsockname()[1]
    flags = {
        "relay.destination_primary": "old.example.com:25",
        "relay.destination_backups": "new=new.example.com:25",
        "status.listen": f"{listen}:{port}",
        "redis.url": redis_at or redis_url,
        "redis.timeout_seconds": "2",
        "state_dir": str(folder / "state"),
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    settings = load(flags, {}, [])
    stop = threading.Event()
    answers = {path: (lambda: HttpAnswer(200, "text/plain", b"ok\n")) for path in ("/healthz", "/readyz", "/metrics")}
    thread = threading.Thread(target=server.serve, args=(settings, listener, answers, stop))
    thread.start()
    try:
        with Redis.from_url(redis_url) as redis:
            yield ServedPage(settings, port, redis)
    finally:
        stop.set()
        thread.join(20)
