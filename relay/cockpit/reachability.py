"""Does each host get through to every server? A task of housekeeping connects now and then, and says what came of it.

A server may know the relay's address and not the workers', or another host's firewall may be in the way: that is found
out from the host itself, before a promotion depends on it. EHLO and QUIT; where workers run also MAIL and RSET, since a
server that is to become a backup must take mail from them. No message is sent. Once an hour a second session finds out
whether tls = verify would let the certificate through, and when it ends.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from redis.exceptions import RedisError

from relay import maillog
from relay.client.connect import connect
from relay.client.connection import Connection
from relay.client.errors import ClientError
from relay.config.model import Settings
from relay.ledger import changes, hosts
from relay.ledger.hosts import Reach
from relay.mail.destination import Destination
from relay.mail.text import printable
from relay.mail.timeouts import Timeouts

_FIRST_SECONDS = 15.0  # after the start: whoever has just mended a firewall wants to see it
_LOOK_SECONDS = 0.25  # between two looks whether to stop
_CERTIFICATE_SECONDS = 3600.0
_AT_ONCE = 4


class Looks:
    """One host's looks at the servers that its settings name."""

    def __init__(self, settings: Settings, place: str, *, delivers: bool) -> None:
        """``delivers``: workers run here."""
        self._settings = settings
        self._place = place
        self._delivers = delivers
        self._certificates: dict[str, tuple[float, bool | None, str, float]] = {}  # when (monotonic), and what

    async def all(self) -> list[Reach]:
        """Look at every server, a few at a time."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def one(server: Destination) -> Reach:
            async with places:
                return await self.look(server)

        return await asyncio.gather(*map(one, self._settings.named))

    async def look(self, server: Destination) -> Reach:
        """Connect, say EHLO and perhaps MAIL, and leave. Trouble with the server is what was found."""
        timeouts, hostname = self._settings.relay.timeouts, self._settings.smtp.domain
        begun = time.monotonic()
        try:
            connection = await connect(server, local_hostname=hostname, timeouts=timeouts)
        except ClientError as error:
            return self._found(server, f"cannot connect to {server.address}: {error}", ok=False)
        try:
            text, ok = f"{time.monotonic() - begun:.3f} s", True
            if self._delivers:
                sender = f"MAIL FROM:<postmaster@{hostname}>".encode("ascii", "replace")
                reply = await connection.command(sender, timeout=timeouts.command)
                if not reply.is_positive:
                    text, ok = f"MAIL is refused: {reply.text}", False
                await connection.command(b"RSET", timeout=timeouts.command)
            await connection.quit(timeout=min(timeouts.connect, 2))
        except ClientError as error:
            text, ok = str(error), False
        finally:
            connection.close()
        return self._found(server, text, *await self._certificate(server, connection), ok=ok)

    def _found(
        self,
        server: Destination,
        text: str,
        verified: bool | None = None,
        why: str = "",
        ends: float = 0.0,
        *,
        ok: bool,
    ) -> Reach:
        host = socket.gethostname()
        return Reach(
            server.name, self._place, host, ok, printable(text), self._delivers, verified, printable(why), ends, 0.0
        )

    async def _certificate(self, server: Destination, connection: Connection) -> tuple[bool | None, str, float]:
        """Return whether tls = verify would be content, why not, and when the certificate ends."""
        if not (connection.is_encrypted or "STARTTLS" in connection.extensions):
            return None, "", 0.0
        known = self._certificates.get(server.name)
        if known is None or time.monotonic() - known[0] >= _CERTIFICATE_SECONDS:
            found = await verify(server, self._settings.smtp.domain, self._settings.relay.timeouts)
            known = self._certificates[server.name] = (time.monotonic(), *found)
        return known[1:]


async def verify(server: Destination, local_hostname: str, timeouts: Timeouts) -> tuple[bool | None, str, float]:
    """Find out whether a server's certificate would pass tls = verify, why not, and when it ends."""
    # Without the user: a second login is more than this question is worth.
    strict = replace(server, tls="verify", username="", password="")
    try:
        connection = await connect(strict, local_hostname=local_hostname, timeouts=timeouts)
    except ClientError as error:
        return (False, error.reason, 0.0) if error.stage == "TLS" else (None, "", 0.0)
    ends = _end(connection.certificate)
    await connection.quit(timeout=min(timeouts.connect, 2))
    return True, "", ends


def _end(certificate: dict[str, Any]) -> float:
    try:
        return float(ssl.cert_time_to_seconds(certificate["notAfter"]))
    except (KeyError, ValueError, TypeError):
        return 0.0


def keep_looking(connection: Any, looks: Looks, every: float, stop: threading.Event) -> None:
    """Look soon after the start, then again and again until the stop; not all hosts at the same time."""
    pause = min(every, _FIRST_SECONDS) * random.uniform(0.5, 1.0)
    while not stop.wait(pause):
        pause = every * random.uniform(0.5, 1.0)
        found = asyncio.run(_until(stop, looks))
        try:
            now = changes.now(connection)
            with connection.pipeline(transaction=False) as pipe:
                for reach in found:
                    hosts.tell_reach(pipe, reach, now)
                pipe.execute()
        except (RedisError, OSError) as error:
            maillog.ledger_trouble("a look at the servers", error)


async def _until(stop: threading.Event, looks: Looks) -> Sequence[Reach]:
    """Look, unless it is to end before that is done: a server may take minutes to greet."""
    looking = asyncio.ensure_future(looks.all())
    while not stop.is_set():
        done, _ = await asyncio.wait({looking}, timeout=_LOOK_SECONDS)
        if done:
            return looking.result()
    looking.cancel()
    return ()
