"""A product with two scripted servers and mail of every kind in it, to be looked at in a browser."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import redis

from relay.ledger import keys, page_access
from relay.smtpd.passwords import hash_password
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

PASSWORD = "correct horse battery staple"
USERS = {"alice": "operator", "victor": "viewer"}
REFUSED = {
    "RCPT TO:<erin@example.com>": "550 5.1.1 <erin@example.com>: Recipient address rejected: User unknown",
    "RCPT TO:<frank@example.com>": "550 5.1.1 <frank@example.com>: Recipient address rejected: User unknown",
    "RCPT TO:<grace@example.org>": "552 5.2.2 <grace@example.org> Mailbox is full",
    "RCPT TO:<dave@example.com>": "450 4.2.0 <dave@example.com>: Greylisted, see http://postgrey.example/help/42",
}


ROUTES = """
[[route]]
name = "pilot"
match = { recipients = "@pilot.example" }
primary = "new"
backups = ["old"]
"""


class PageSite:
    """``smtp-dup up`` between "old" and "new", with users, and how to log in; a ``with`` block ends all of it."""

    def __init__(
        self,
        directory: Path,
        *,
        with_users: bool = True,
        settings: Mapping[str, str] | None = None,
        seed: bool = True,
        routes: str = "",
    ) -> None:
        """``routes`` is what the settings file has of [[route]]."""
        self.old, self.new = ScriptedServer(), ScriptedServer(dict(REFUSED))
        users = "".join(f"{name}:{hash_password(PASSWORD)}:{role}\n" for name, role in USERS.items())
        self._directory = directory
        self._settings = {"retry.first": "300", **(settings or {})}
        if with_users:
            self._settings["status.users_file"] = str(directory / "users")
        self._files = {"users": users, **({"settings.toml": routes} if routes else {})}
        self._seed = seed
        self.product: Product

    def __enter__(self) -> Self:
        self._ends = ExitStack()
        for server in (self.old, self.new):
            server.start()
            self._ends.callback(server.stop)
        self.product = Product(
            self._directory,
            primary=f"old={self.old.address}",
            backups=[f"new={self.new.address}"],
            settings=self._settings,
            files=self._files,
        )
        (self._directory / "users").chmod(0o600)
        self._ends.enter_context(self.product)
        if self._seed:
            self.fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.product.status_port}"

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.product.redis_url)

    def fill(self) -> None:
        """Send some mail, and wait until what is refused and what is put off is known as such."""
        with self.product.dialogue() as client:
            client.hello()
            for n, name in enumerate(("erin", "frank", "dave", "alice", "bob", "carol")):
                client.mail(f"sender{n}@example.net", f"{name}@example.com")
            client.mail("<>".strip("<>"), "grace@example.org")
            client.quit()
        self.wait_for_failed(3)

    def wait_for_failed(self, count: int) -> None:
        with self.redis() as connection:
            wait_until(
                lambda: connection.zcard(keys.FAILED + "new") >= count and connection.hlen(keys.OWN + "new") >= 1,
                message=lambda: self.product.log[-3000:],
            )

    def session(self, role: str = "operator", name: str = "") -> tuple[str, str, str]:
        """Begin a session as a link of `smtp-dup open` does: the cookie's name, its token, and the forms' token."""
        token, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(16)
        value = {"v": 1, "name": name or f"the {role}", "role": role, "mark": "", "csrf": csrf, "begun": time.time()}
        digest = hashlib.sha256(token.encode()).hexdigest()
        with self.redis() as connection:
            connection.set(keys.PAGE_SESSION + digest, json.dumps(value), ex=page_access.IDLE_SECONDS)
        return f"smtp-dup-{self.product.status_port}", token, csrf

    def get(self, path: str, session: tuple[str, str, str] | None = None) -> tuple[int, str]:
        """GET a path: the status and the text."""
        return self._open(urllib.request.Request(self.url + path, headers=_cookie(session)))

    def post(self, path: str, session: tuple[str, str, str] | None, **fields: str) -> tuple[int, str]:
        """POST a form as the page's own would be sent."""
        data = {"csrf": session[2] if session else "", **fields}
        headers = {**_cookie(session), "Origin": self.url, "Sec-Fetch-Site": "same-origin"}
        body = urllib.parse.urlencode(data).encode()
        return self._open(urllib.request.Request(self.url + path, body, headers))

    def _open(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


def _cookie(session: tuple[str, str, str] | None) -> dict[str, str]:
    return {"Cookie": f"{session[0]}={session[1]}"} if session else {}
