"""Clients of Redis: what their connections are set to."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
from redis.exceptions import ConnectionError as NoConnection

from relay.config.model import RedisSettings
from relay.redisio import sentinel
from relay.redisio.clients import async_client, sync_client
from support.redis_servers import RedisServer
from support.waiting import PATIENCE, free_port


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


SENTINELS = RedisSettings("redis://", 5, sentinels=("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"), service="post")
MASTERS = {
    "post": {
        "ip": "127.0.0.1",
        "port": 1,
        "num-other-sentinels": 2,
        "is_master": True,
        "is_sdown": False,
        "is_odown": False,
    }
}


async def test_no_sentinel_is_forgotten_when_two_tasks_ask_at_once() -> None:
    """The first one is away, the second answers both: three are asked the next time, and closed at the end."""
    asked = sentinel._AsyncSentinels(SENTINELS, 1)
    everybody = set(asked.sentinels)
    both_wait = asyncio.Barrier(2)

    async def away() -> object:
        raise NoConnection("away")

    async def answer() -> object:
        await both_wait.wait()
        return MASTERS

    first, second, _ = asked.sentinels
    first.sentinel_masters, second.sentinel_masters = away, answer
    found = await asyncio.gather(asked.discover_master("post"), asked.discover_master("post"))
    assert found == [("127.0.0.1", 1)] * 2
    assert asked.sentinels[0] is second
    assert set(asked.sentinels) == set(asked.all) == everybody


def test_no_sentinel_is_forgotten_when_two_threads_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a blocking client that threads share."""
    asked = sentinel._Sentinels(SENTINELS, 1)
    everybody = set(asked.sentinels)
    both_wait = threading.Barrier(2)

    def away() -> object:
        raise NoConnection("away")

    def answer() -> object:
        both_wait.wait(PATIENCE)
        return MASTERS

    first, second, _ = asked.sentinels
    monkeypatch.setattr(first, "sentinel_masters", away)
    monkeypatch.setattr(second, "sentinel_masters", answer)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(asked.discover_master, ["post"] * 2)) == [("127.0.0.1", 1)] * 2
    assert set(asked.sentinels) == everybody
    assert asked.sentinels[0] is second
