"""Redis behind Sentinels: pools that ask them which server is the master, and keep connections to that one only.

Each pool in use asks every second, so that idle connections to a former master are dropped even if nothing failed on
them: it may still be running and accept writes that are lost. A READONLY reply, also from within a script, shows a
former master too. When no Sentinel names a master, connections are kept as they are; whoever needs a new one gets a
ConnectionError.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import ReadOnlyError, RedisError
from redis.retry import Retry

from relay import maillog
from relay.config.model import RedisSettings

_ASK_SECONDS = 1.0  # between two queries of the Sentinels by a pool in use
_RESTED_SECONDS = 0.5  # a pool that was unused for this long beyond it may have missed a failover
_FAILED_SECONDS = 5.0  # until the next query after no Sentinel answered, since a query may take its whole time-out
_SENTINEL_SECONDS = 1.0  # for the reply of one Sentinel; then the next is asked


def master_of(client: redis.Redis) -> object:
    """Return the (host, port) of the master that a client uses, None if no Sentinel names one."""
    return getattr(client.connection_pool, "master_address", None)


async def find_master(client: redis.asyncio.Redis) -> object:
    """Ask the Sentinels for the (host, port) of the master; None without Sentinels or master. Raises RedisError."""
    pool = client.connection_pool
    return await pool.get_master_address() if isinstance(pool, AsyncMasterPool) else None


_told: dict[tuple[str, ...], Any] = {}  # Sentinels -> the master that any pool of this process last heard of


def _tell(server: RedisSettings, master: tuple[str, int]) -> None:
    before = _told.get(server.sentinels)
    _told[server.sentinels] = master
    if before not in {None, master}:
        maillog.notice(
            "warning",
            "Redis has another master: writes that the old one had not replicated are lost, and may be repeated",
            was=f"{before[0]}:{before[1]}",
            now=f"{master[0]}:{master[1]}",
        )


def _is_past(server: RedisSettings, address: Any) -> bool:
    """Return whether this process has heard of another master than this one."""
    return bool(_told.get(server.sentinels) != address)


def _nobody(server: RedisSettings, error: RedisError) -> NoConnection:
    """Return the error for the case that no Sentinel names a master; redis-py's own text is unreadable."""
    why = "" if isinstance(error, NoConnection) else f" ({error})"  # else a Sentinel has refused us
    return NoConnection(f"none of the {len(server.sentinels)} Sentinels names a master of {server.service} now{why}")


def _sentinel_limits(seconds: float) -> dict[str, Any]:
    patience = min(seconds, _SENTINEL_SECONDS)
    return {"socket_timeout": patience, "socket_connect_timeout": patience}


class _AllSentinels:
    """Clients of the Sentinels of one pool, who has answered first.

    redis-py exchanges the first one and who has answered by their places. When two ask at once, the places of the later
    one are those of before: a Sentinel would take another's place, not be asked any more and never be closed.
    """

    sentinels: list[Any]

    def remember(self) -> None:
        """Note who all of them are."""
        self.all = tuple(self.sentinels)

    def put_back(self) -> None:
        """Have all of them in the list again, behind the one that is its first."""
        first = self.sentinels[0]
        self.sentinels = [first, *(client for client in self.all if client is not first)]


class _Sentinels(_AllSentinels, redis.sentinel.Sentinel):
    """The Sentinels of one pool, each with its own credentials."""

    def __init__(self, server: RedisSettings, seconds: float) -> None:
        super().__init__([])
        self.server = server
        limits = _sentinel_limits(seconds)
        self.sentinels = [redis.Redis.from_url(u, retry=Retry(NoBackoff(), 0), **limits) for u in server.sentinel_urls]
        self.remember()

    def discover_master(self, service_name: str) -> tuple[str, int]:
        try:
            master: tuple[str, int] = super().discover_master(service_name)
        except RedisError as error:
            raise _nobody(self.server, error) from error
        finally:
            self.put_back()
        _tell(self.server, master)
        return master


class _AsyncSentinels(_AllSentinels, redis.asyncio.sentinel.Sentinel):
    """The same for an async pool."""

    def __init__(self, server: RedisSettings, seconds: float) -> None:
        super().__init__([])
        self.server = server
        limits = _sentinel_limits(seconds)
        self.sentinels = [
            redis.asyncio.Redis.from_url(u, retry=AsyncRetry(NoBackoff(), 0), **limits) for u in server.sentinel_urls
        ]
        self.remember()

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        try:
            master: tuple[str, int] = await super().discover_master(service_name)
        except RedisError as error:
            raise _nobody(self.server, error) from error
        finally:
            self.put_back()
        _tell(self.server, master)
        return master


# Connections to the master ------------------------------------------------------------------------------------


def _is_demoted(response: object) -> bool:
    """Return whether a script within a MULTI got READONLY: redis-py checks only the reply as a whole."""
    return isinstance(response, list) and any(isinstance(part, ReadOnlyError) for part in response)


class _Connection(redis.sentinel.SentinelManagedConnection):
    """A connection that fails when its server is a replica, or no longer the master once it is connected.

    A server that hangs accepts connections, and may answer minutes later as if it were still the master.
    """

    def connect_to(self, address: Any) -> None:
        super().connect_to(address)
        if _is_past(self.connection_pool.sentinel_manager.server, address):
            self.disconnect()
            raise NoConnection("there is another master meanwhile")

    def read_response(self, *args: Any, **options: Any) -> Any:
        response = super().read_response(*args, **options)
        if _is_demoted(response):
            self.disconnect()
            raise NoConnection("the master has become a replica")
        return response


class _AsyncConnection(redis.asyncio.sentinel.SentinelManagedConnection):
    """The same for an async connection."""

    async def connect_to(self, address: Any) -> None:
        await super().connect_to(address)
        if _is_past(self.connection_pool.sentinel_manager.server, address):
            await self.disconnect()
            raise NoConnection("there is another master meanwhile")

    async def read_response(self, *args: Any, **options: Any) -> Any:
        response = await super().read_response(*args, **options)
        if _is_demoted(response):
            await self.disconnect()
            raise NoConnection("the master has become a replica")
        return response


class _TlsConnection(_Connection, redis.sentinel.SentinelManagedSSLConnection):
    pass


class _AsyncTlsConnection(_AsyncConnection, redis.asyncio.sentinel.SentinelManagedSSLConnection):
    pass


class MasterPool(redis.sentinel.SentinelConnectionPool):
    """A pool that keeps only connections to the current master, each with these options."""

    def __init__(self, server: RedisSettings, seconds: float, *, ssl: bool, **options: Any) -> None:
        kind = _TlsConnection if ssl else _Connection
        super().__init__(server.service, _Sentinels(server, seconds), connection_class=kind, **options)
        self._ask_at = 0.0

    def get_connection(self, command_name: str | None = None, *_: Any, **__: Any) -> Any:
        if time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + _ASK_SECONDS
            try:
                self.get_master_address()  # drops what is kept to another
            except RedisError:  # no Sentinel knows a master; the connections are kept
                self._ask_at = time.monotonic() + _FAILED_SECONDS
        return super().get_connection()

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:
            for client in self.sentinel_manager.all:
                client.connection_pool.disconnect()


class AsyncMasterPool(redis.asyncio.sentinel.SentinelConnectionPool):
    """The same for async clients; a caller waits for the query only if the pool was unused before."""

    def __init__(self, server: RedisSettings, seconds: float, *, ssl: bool, **options: Any) -> None:
        kind = _AsyncTlsConnection if ssl else _AsyncConnection
        super().__init__(server.service, _AsyncSentinels(server, seconds), connection_class=kind, **options)
        self._ask_at = 0.0
        self._asking: asyncio.Task[None] | None = None
        self._rested = False

    async def get_connection(self, command_name: str | None = None, *_: Any, **__: Any) -> Any:
        late = time.monotonic() - self._ask_at
        if self._asking is None and late >= 0:
            self._rested = late >= _RESTED_SECONDS
            self._asking = asyncio.get_running_loop().create_task(self._ask())
        if self._asking is not None and self._rested:
            await asyncio.shield(self._asking)
        return await super().get_connection()

    async def release(self, connection: Any) -> None:
        if self.master_address != (connection.host, connection.port):
            await connection.disconnect(nowait=True)  # waiting could fail, and then the pool would lose its slot
        await super().release(connection)

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:
            if self._asking:
                self._asking.cancel()
                await asyncio.wait([self._asking])  # it may hold a connection to a Sentinel that it has just made
            for client in self.sentinel_manager.all:
                await client.connection_pool.disconnect()

    async def _ask(self) -> None:
        pause = _ASK_SECONDS
        try:
            await self.get_master_address()
        except RedisError:
            pause = _FAILED_SECONDS
        finally:
            self._ask_at = time.monotonic() + pause
            self._asking = None
