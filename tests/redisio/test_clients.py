"""Clients of Redis: what their connections are set to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import redis

from relay.config.model import RedisSettings
from relay.redisio.clients import async_client, sync_client
from support.redis_servers import RedisServer
from support.waiting import free_port


def _is_kept_alive(sock: socket.socket) -> bool:
    idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0 and idle <= 60


def test_quiet_connections_over_tcp_are_kept_alive(redis_factory: Callable[..., RedisServer]) -> None:
    """The kernel asks within a minute, in both kinds of client; a unix socket, which has no such thing, works too."""
    port = free_port()
    server = redis_factory(port=str(port))
    settings = RedisSettings(f"redis://127.0.0.1:{port}", 5)
    with sync_client(settings, 5) as client:
        connection = client.connection_pool.get_connection()
        assert _is_kept_alive(connection._sock)
        client.connection_pool.release(connection)
        assert client.ping()

    async def ask(url: str) -> bool:
        other = async_client(RedisSettings(url, 5), 5)
        try:
            assert await other.ping()
            connection = await other.connection_pool.get_connection()
            found = connection._writer.get_extra_info("socket")
            kept = url.startswith("unix:") or _is_kept_alive(found)
            await other.connection_pool.release(connection)
            return kept
        finally:
            await other.aclose()

    assert asyncio.run(ask(settings.url))
    assert asyncio.run(ask(server.url))
    with sync_client(RedisSettings(server.url, 5), 5) as client:
        assert client.ping()
        assert isinstance(client, redis.Redis)
