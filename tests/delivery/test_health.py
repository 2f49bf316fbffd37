"""What a courier reports of its destination reaches the ledger, sooner or later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import redis

from relay import maillog
from relay.breaker import Breaker
from relay.config.model import RedisSettings
from relay.ledger import keys
from relay.ledger.redis_clock import RedisClock
from relay.redisio.clients import async_client
from relay.redisio.pipeline import Pipelines
from support.redis_servers import RedisServer
from support.waiting import until
from workers.delivery.health import HealthReport
from workers.delivery.hold_and_throttle import HoldAndThrottle
from workers.delivery.leases import Leases


async def test_a_report_outlives_an_outage_of_redis(
    redis_factory: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause that Redis could not be told of while it was away is written when it is back."""
    troubles: list[str] = []
    monkeypatch.setattr(maillog, "ledger_trouble", lambda what, error: troubles.append(what))
    server = redis_factory()
    connection = async_client(RedisSettings(server.url, 1), 1)
    health = HealthReport(
        connection,
        Pipelines(connection),
        "new",
        Leases(connection, "new"),
        HoldAndThrottle(connection, "new", "worker", RedisClock()),
    )
    breaker = Breaker(1, on_change=health.on_change)
    watching = asyncio.ensure_future(health.watch(breaker))

    def state() -> bytes | None:
        with redis.Redis.from_url(server.url) as client:
            return client.hget(keys.HEALTH + "new", "state")

    try:
        await until(lambda: state() == b"ok")
        server.kill()
        breaker.opens("connection refused")
        await until(lambda: troubles)
        server.start()
        await until(lambda: state() == b"paused")
    finally:
        watching.cancel()
        await connection.aclose()
