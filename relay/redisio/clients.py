"""Makes every Redis client of smtp-dup: by URL, or by asking Sentinels which server is the master (sentinel.py).

A ``confirmed`` client's transactions succeed only when ``redis.replicas`` replicas have them (replication.py). Every
failure is a RedisError.
"""

from __future__ import annotations

import socket
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from relay.config.model import RedisSettings
from relay.redisio import sentinel
from relay.redisio.replication import CONFIRM_SECONDS, ConfirmedRedis

_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds, seconds, unanswered probes


def sync_client(server: RedisSettings, seconds: float, *, retries: int = 1) -> redis.Redis:
    """Return a blocking client: each reply within ``seconds``, and at most ``retries`` reconnects for a command."""
    limits = _limits(seconds, Retry(NoBackoff(), retries)) | _kept_alive(server)
    if not server.sentinels:
        return redis.Redis.from_url(server.url, **limits)
    return redis.Redis.from_pool(sentinel.MasterPool(server, seconds, **_options(server), **limits))


def async_client(
    server: RedisSettings, seconds: float, *, retries: int = 1, confirmed: bool = False, decode: bool = False
) -> redis.asyncio.Redis:
    """Return an async client with the same limits. ``confirmed``: its transactions wait for ``redis.replicas``."""
    limits = _limits(seconds, AsyncRetry(NoBackoff(), retries)) | {"decode_responses": decode} | _kept_alive(server)
    kind = ConfirmedRedis if confirmed and server.replicas else redis.asyncio.Redis
    if server.sentinels:
        client = kind.from_pool(sentinel.AsyncMasterPool(server, seconds, **_options(server), **limits))
    else:
        client = kind.from_url(server.url, **limits)
    if isinstance(client, ConfirmedRedis):
        client.replicas = server.replicas
        # A large body takes time to reach the replicas, too.
        client.patience = min(seconds / 2, CONFIRM_SECONDS) if seconds <= server.timeout_seconds else seconds / 2
    return client


def sentinel_clients(server: RedisSettings, seconds: float) -> list[tuple[str, redis.asyncio.Redis]]:
    """Return the address of each Sentinel with an async client of it."""
    limits = _limits(seconds, AsyncRetry(NoBackoff(), 0))
    return [
        (address, redis.asyncio.Redis.from_url(url, decode_responses=True, **limits))
        for address, url in zip(server.sentinel_addresses, server.sentinel_urls, strict=True)
    ]


def _limits(seconds: float, retry: Retry | AsyncRetry) -> dict[str, Any]:
    return {"socket_timeout": seconds, "socket_connect_timeout": seconds, "retry": retry}


def _kept_alive(server: RedisSettings) -> dict[str, Any]:
    """Return the options for TCP keepalive.

    A firewall may silently drop a connection that is idle for some minutes: without keepalive, the first message after
    that would wait for `redis.timeout_seconds`.
    """
    if not server.sentinels and server.url.startswith("unix:"):
        return {}
    options = {getattr(socket, name): value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}
    return {"socket_keepalive": True, "socket_keepalive_options": options}


def _options(server: RedisSettings) -> dict[str, Any]:
    """Return the options in the URL besides the host: user, password, database, TLS."""
    found: dict[str, Any] = parse_url(server.url or "redis://")
    kind = found.pop("connection_class", None)
    for name in ("host", "port", "path"):
        found.pop(name, None)
    return {**found, "ssl": kind is not None}
