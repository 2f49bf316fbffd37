"""Connections to one destination, kept open for reuse, and the limit on their number.

The connection used last is leased first, so that the others grow idle and are closed with QUIT. An idle connection that
was lost or got an unsolicited reply is dropped silently. If the server leaves a RSET without a reply, all idle
connections that are owed one are closed, and for some minutes no connection that needs a RSET is kept. When all
connections are in use, ``lease`` waits in line and raises PoolExhausted at its deadline. A 421 greeting while others
are in use shows the server's own limit: ``lease`` waits for one of those. Every leased connection must be given back,
whatever happened; one in an unknown state is closed here and never used again.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic as _now  # the clock of the event loop, which would have to be looked up each time

from relay.client.connect import avoid, connect
from relay.client.connection import Connection
from relay.client.errors import ClientError, ConnectFailed, DeadlinePassed
from relay.client.session_refusals import SessionRefusals
from relay.mail.destination import Destination
from relay.mail.reply import Reply
from relay.mail.timeouts import Timeouts

_IDLE_SECONDS = 60.0  # how long a connection is kept that nobody uses
_CEILING_SECONDS = 30.0  # how long a server's limit, known from a 421 greeting, is respected
_NO_RSET_SECONDS = 300.0  # how long a server that did not answer a RSET is sent none


class PoolExhausted(ClientError):
    """All connections are in use; ``reply`` is the server's 421 if the limit is the server's."""


class Pool:
    """Leases connections of one event loop. ``limit`` bounds those in use and those kept, together."""

    def __init__(
        self,
        destination: Destination,
        *,
        local_hostname: str,
        timeouts: Timeouts,
        limit: int,
        max_refusals: int = 0,
        on_open: Callable[[Connection], None] | None = None,
    ) -> None:
        """Make an empty pool. ``timeouts`` are for handshakes and for waiting in line.

        ``on_open`` is called with each new connection, and must not block. A connection with more than ``max_refusals``
        refusals since its last accepted message is not kept. The destination limits the messages and the age of each.
        """
        self.destination = destination
        self._local_hostname = local_hostname
        self._timeouts = timeouts
        self._limit = max(1, limit)
        self._max_refusals = max_refusals
        self._most_messages = destination.messages_per_connection or sys.maxsize
        self._age = destination.connection_age or math.inf
        self._fresh_since = float("-inf")  # older connections are not leased any more
        self.refusals = SessionRefusals()  # whether refusals on reused connections were about the connection
        self._on_open = on_open
        self._idle: list[Connection] = []  # by last_used, the newest at the end
        self._leased: set[Connection] = set()
        self.in_use = 0  # slots taken: leased connections, and those being opened or checked
        self._waiters: deque[asyncio.Future[None]] = deque()  # done: a slot has been taken for the waiter
        self._ceiling: tuple[int, float] | None = None  # the server's own limit, and until when it is respected
        self._refusal: Reply | None = None  # the 421 that showed it
        self._no_rset_until = 0.0
        self._reaper: asyncio.TimerHandle | None = None
        self._goodbyes: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def room(self) -> int:
        """How many connections may be in use now: the limit, or less if the server has a lower one."""
        if self._ceiling is None:
            return self._limit
        ceiling, until = self._ceiling
        if _now() >= until:
            self._ceiling = None
            return self._limit
        return min(self._limit, ceiling)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    def set_limit(self, limit: int) -> None:
        """Change the limit now; what is leased above it is closed when it comes back."""
        self._limit = max(1, limit)
        while self._idle and self.in_use + len(self._idle) > self._limit:
            self._say_goodbye(self._idle.pop(0))
        self._wake()

    def at_hand(self) -> Connection | None:
        """Lease the idle connection used last, if nothing has to be waited for; None: ``lease`` sees to it."""
        if not self._idle or self._closed or self._waiters or self._ceiling is not None or self.in_use >= self._limit:
            return None
        connection, now = self._idle[-1], _now()
        if self._is_stale(connection, now) or not connection.is_usable:
            return None
        self._idle.pop()
        self.in_use += 1
        self._leased.add(connection)
        return connection

    async def lease(self, *, timeout: float | None = None, fresh: bool = False) -> Connection:
        """Return a connection that is ready for MAIL. ``timeout`` is for waiting in line; None: ``timeouts.connect``.

        ``fresh`` skips the idle ones, for a caller whose reused connection was just lost. Raises PoolExhausted, and
        ConnectFailed from the handshake of a new connection, which ``timeout`` does not bound.
        """
        deadline = _now() + (self._timeouts.connect if timeout is None else timeout)
        if self._closed or self._waiters or self.in_use >= self.room:
            await self._wait(deadline, first=False)
        else:
            self.in_use += 1
        while True:
            try:
                connection = await self._kept() if self._idle and not fresh else None
                if connection is None:
                    connection = await self._connect()
            except ConnectFailed as error:
                others = self.in_use - 1
                if error.reply is None or error.reply.code != 421 or not others:
                    self._free()
                    raise
                self._refusal = error.reply
                self._ceiling = (others, _now() + _CEILING_SECONDS)
                self._free()
                await self._wait(deadline, first=True)
                fresh = False  # a connection given back now has just worked
            except BaseException:
                self._free()
                raise
            else:
                self._leased.add(connection)
                return connection

    def can_go_on(self, connection: Connection) -> bool:
        """Return whether a leased connection may carry another transaction before it is given back."""
        return self._is_worth_keeping(connection) and self.in_use <= self.room and not self._closed

    def give_back(self, connection: Connection) -> None:
        """Take back a connection in any state: it is kept if it can be used again, else closed. Never raises."""
        if connection not in self._leased:
            connection.close()
            return
        self._leased.discard(connection)
        if connection.turned_away:
            avoid(connection.peer)
        if not connection.is_usable:
            connection.close()
        elif self._closed or self.in_use + len(self._idle) > self._limit or not self._is_worth_keeping(connection):
            self._say_goodbye(connection)
        else:
            self._keep(connection)
        self.in_use -= 1
        if self._waiters:
            self._wake()

    def renew(self) -> None:
        """Retire all connections that are open now: a server applies its new settings to new connections only."""
        self._fresh_since = _now()
        while self._idle:
            self._say_goodbye(self._idle.pop())

    async def close(self) -> None:
        """Close the idle connections with QUIT; those in use are closed when they are given back."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(self._closing())
        while self._idle:
            self._say_goodbye(self._idle.pop())
        if self._goodbyes:
            await asyncio.wait(self._goodbyes)

    # -- connections --

    def _is_worth_keeping(self, connection: Connection) -> bool:
        """Return whether a connection may carry another transaction, also of another caller."""
        return (
            connection.transactions < self._most_messages
            and connection.transactions < connection.limits.mails
            and connection.refusals <= self._max_refusals
            and connection.created >= self._fresh_since
            and connection.created + self._age >= _now()
        )

    async def _kept(self) -> Connection | None:
        """Return the idle connection used last that is still usable, or None."""
        while self._idle:
            connection = self._idle.pop()
            if self._is_stale(connection, _now()):
                self._say_goodbye(connection)
                continue
            try:
                while connection.replies_owed:  # to the RSET sent by give_back; usually it has arrived already
                    reply = await connection.reply(timeout=self._timeouts.connect)
                    if not reply.is_positive:
                        connection.close()
            except DeadlinePassed:
                self._retire_owed()
            except ClientError:
                pass
            except BaseException:
                connection.close()
                raise
            if connection.is_usable:
                return connection
            connection.close()
        return None

    def _is_stale(self, connection: Connection, now: float) -> bool:
        """Return whether an idle connection is not to be used any more."""
        return (
            connection.last_used + _IDLE_SECONDS < now
            or connection.created + self._age < now
            or connection.created < self._fresh_since
        )

    def _retire_owed(self) -> None:
        """Close the other idle connections that are owed a reply: waiting would cost a time-out for each."""
        self._no_rset_until = _now() + _NO_RSET_SECONDS
        for connection in self._idle:
            if connection.replies_owed:
                connection.close()
        self._idle = [connection for connection in self._idle if connection.is_open]

    async def _connect(self) -> Connection:
        # Idle connections count too: the oldest is closed to make room.
        while self._idle and self.in_use + len(self._idle) > self.room:
            self._say_goodbye(self._idle.pop(0))
        connection = await connect(
            self.destination,
            local_hostname=self._local_hostname,
            timeouts=self._timeouts,
        )
        if self._closed:
            connection.close()
            raise self._closing()
        if self._on_open is not None:
            self._on_open(connection)
        return connection

    def _keep(self, connection: Connection) -> None:
        if connection.is_dirty:
            if _now() < self._no_rset_until:
                connection.close()
                return
            try:
                connection.send(b"RSET")  # the next lease reads the reply, so that nothing waits here
            except ClientError:
                connection.close()
                return
        connection.last_used = _now()
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._reap)

    def _reap(self) -> None:
        """Close the connections that have been idle for too long, and set the timer for the next one."""
        loop = asyncio.get_running_loop()
        self._reaper = None
        now = _now()
        while self._idle and self._idle[0].last_used + _IDLE_SECONDS <= now + 0.01:
            self._say_goodbye(self._idle.pop(0))
        if self._idle:
            self._reaper = loop.call_at(self._idle[0].last_used + _IDLE_SECONDS, self._reap)

    def _say_goodbye(self, connection: Connection) -> None:
        if not connection.is_open:
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(connection.quit())
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)

    # -- slots --

    async def _wait(self, deadline: float, *, first: bool) -> None:
        """Wait in line for a slot. When cancelled, a slot that was granted already is passed on."""
        if self._closed:
            raise self._closing()
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        if first:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        self._wake()  # the server's limit may have expired since
        timer = loop.call_at(deadline, self._expire, waiter)
        try:
            await waiter
        except BaseException:
            if not waiter.done() or waiter.cancelled() or waiter.exception() is not None:
                with suppress(ValueError):
                    self._waiters.remove(waiter)
            else:
                self._free()
            raise
        finally:
            timer.cancel()

    def _expire(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.done():
            refusal = self._refusal if self._ceiling is not None else None
            waiter.set_exception(
                PoolExhausted(f"all connections are in use: {self.in_use}", stage="connect", reply=refusal)
            )

    def _free(self) -> None:
        self.in_use -= 1
        if self._waiters:
            self._wake()

    def _wake(self) -> None:
        while self._waiters and self.in_use < self.room:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.in_use += 1
                waiter.set_result(None)

    def _closing(self) -> ClientError:
        return ClientError("the pool is closed", stage="connect")
