"""The primary server as one relay process knows it: its connections, and the extensions it last announced.

A mail transaction on one of its connections is a PrimaryTransaction (primary_transaction.py). Trouble with the server
is counted and logged here; what the client hears of it is in primary_replies.py.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from relay import maillog, metrics
from relay.client.connection import Connection
from relay.client.errors import ClientError
from relay.client.pool import Pool
from relay.client.xforward import introduce, xforward
from relay.mail.destination import Destination
from relay.mail.origin import Identity
from relay.mail.reply import Reply
from relay.mail.timeouts import Timeouts
from relay.smtpd.primary_replies import for_client_unconnected

_PROBE_PAUSE = 1.0
_AFTER_MAIL = ("RCPT", "DATA", "body", "dot")  # stages at which a transaction breaks off

Build = Callable[[Mapping[str, str]], Sequence[bytes]]

# The extensions to announce before the primary has answered an EHLO.
SAFE_MINIMUM: Mapping[str, str] = {}


class Witness(Protocol):
    """Who wants to know how transactions end at a primary."""

    def breaks(self, reason: str) -> None:
        """Note a transaction that broke off after MAIL."""

    def works(self) -> None:
        """Note a message that the server has answered for."""


class Primary:
    """The primary server: its pool of connections, and the extensions it last announced."""

    def __init__(self, destination: Destination, pool: Pool, *, timeouts: Timeouts, final_timeout: float) -> None:
        self.destination = destination
        self.pool = pool
        self.timeouts = timeouts
        self.final_timeout = final_timeout
        # LMTP answers the dot once for each recipient; the client can only be given one of these replies.
        self.most_recipients = 1 if destination.scheme == "lmtp" else sys.maxsize
        self.extensions: Mapping[str, str] | None = None
        self.witness: Witness | None = None  # of a primary that has substitutes
        self._probe: asyncio.Task[None] | None = None
        self._probed_at = -_PROBE_PAUSE

    async def announced(self) -> Mapping[str, str]:
        """Return the extensions of the primary's last EHLO; until one is known, asks for it at most once a second.

        The wait is bounded by the connect timeout: a primary that greets slowly is known later, to other clients.
        """
        if self.extensions is None:
            self.ask_soon()
            if self._probe is not None:
                await asyncio.wait([self._probe], timeout=self.timeouts.connect)
        return SAFE_MINIMUM if self.extensions is None else self.extensions

    def ask_soon(self) -> None:
        """Have the primary asked for its extensions, at most once a second, without waiting for it."""
        if self._probe is None and time.monotonic() - self._probed_at >= _PROBE_PAUSE:
            self._probe = asyncio.get_running_loop().create_task(self._ask())

    async def connect(self) -> None:
        """Open a connection as for mail, with EHLO, TLS and AUTH, and keep it for the next. Raises ClientError."""
        connection = await self.pool.lease(timeout=self.timeouts.connect)
        self.extensions = self._usable(connection.extensions)
        self.pool.give_back(connection)

    async def probe(self) -> None:
        """See that a new connection can be had, with EHLO, TLS and AUTH, and end it with QUIT. Raises ClientError."""
        connection = await self.pool.lease(timeout=self.timeouts.connect, fresh=True)
        try:
            self.extensions = self._usable(connection.extensions)
            await connection.quit()
        finally:
            connection.close()
            self.pool.give_back(connection)

    def _usable(self, extensions: Mapping[str, str]) -> Mapping[str, str]:
        """Return the extensions that a message may make use of there: REQUIRETLS by a verified certificate only.

        RFC 8689 4.2.1. Asked for each message: a client that was offered it may have got another primary since.
        """
        if "REQUIRETLS" not in extensions or self.destination.tls == "verify":
            return extensions
        return {name: value for name, value in extensions.items() if name != "REQUIRETLS"}

    async def _ask(self) -> None:
        try:
            await self.connect()
        except ClientError as error:
            self.trouble(error.stage, error)
        finally:
            self._probed_at = time.monotonic()
            self._probe = None

    def mail(
        self, connection: Connection, build: Build, identity: Identity, ahead: deque[bytes], timeout: float
    ) -> Awaitable[Reply]:
        """Send MAIL and the commands ``build`` puts behind it; returns the reply to MAIL, to be awaited.

        ``ahead`` gets those commands.
        """
        if identity or connection.introduced:
            return self._introduced_mail(connection, build, identity, ahead, timeout)
        self.extensions = self._usable(connection.extensions)
        commands = build(self.extensions)
        ahead.extend(commands[1:])
        connection.send(*commands)
        return connection.reply(timeout=timeout)

    async def _introduced_mail(
        self, connection: Connection, build: Build, identity: Identity, ahead: deque[bytes], timeout: float
    ) -> Reply:
        turned_away = await introduce(connection, identity, timeout=timeout)
        if turned_away is not None:
            return turned_away
        self.extensions = self._usable(connection.extensions)
        mail, *behind = build(self.extensions)
        ahead.extend(behind)
        forward = xforward(identity, connection)
        if "PIPELINING" in connection.extensions:
            connection.send(*forward, mail, *behind)
            for _ in forward:  # the replies to XFORWARD do not matter: it serves the primary's log
                await connection.reply(timeout=timeout)
            return await connection.reply(timeout=timeout)
        for line in forward:
            await connection.command(line, timeout=timeout)
        return await connection.command(mail, timeout=timeout)

    async def take_back(self, connection: Connection) -> None:
        """Read the replies to commands that were sent ahead in vain, so that the connection can be kept.

        It is closed when a reply is positive, above all a 354 without recipients (allowed by RFC 2920 3.1), and when
        the replies take longer than ``timeouts.connect``, since the client waits. Never raises ClientError.
        """
        deadline = time.monotonic() + self.timeouts.connect
        try:
            while connection.replies_owed:
                reply = await connection.reply(timeout=max(0.0, deadline - time.monotonic()))
                if reply.code < 400 or reply.code == 421:
                    connection.close()
        except ClientError:
            connection.close()

    def unavailable(self, error: ClientError) -> Reply:
        """Log that no connection to the primary can be had; returns the reply for the client."""
        self.trouble(error.stage, error)
        return for_client_unconnected(error)

    def trouble(self, stage: str, error: BaseException) -> None:
        metrics.primary_trouble.labels(stage).inc()
        if self.witness is not None and stage in _AFTER_MAIL:
            self.witness.breaks(f"{stage}: {error}")
        maillog.primary_trouble(self.destination.address, stage, str(error) or type(error).__name__)
