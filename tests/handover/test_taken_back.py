"""What a worker's socket does not take: the relay ends the lease while that is certain to be nobody's yet."""

from __future__ import annotations

import time

import pytest
import redis

from relay.config.model import RedisSettings
from relay.handover.frames import FRESH_SECONDS, HandedCopy, Hello
from relay.handover.handover import Handover
from relay.ledger import changes, keys
from relay.ledger.changes import Released
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.redisio.clients import async_client
from relay.smtpd.staging import Staging
from support.ledger_contents import Contents
from support.waiting import until


@pytest.mark.parametrize("is_late", [False, True])
async def test_taken_back(redis_client: redis.Redis, redis_url: str, *, is_late: bool) -> None:
    """A job comes in any case. Late, the worker has given the copy back itself, and may have it in hand again."""
    contents = Contents(redis_client, "new")
    copy = contents.staged()
    with redis_client.pipeline() as pipe:
        changes.release(pipe, [Released(copy, ("new",), holders=("worker",))])
        pipe.execute()
    ledger = async_client(RedisSettings(redis_url, 5), 5)
    handover = Handover()
    watch = Monitor(ledger, seconds=5, processes=1)
    staging = Staging(
        ledger,
        ledger,
        Dispatcher(ledger),
        watch,
        stage_seconds=5,
        deadline_seconds=60,
        hold_seconds=60,
        handover=handover,
    )
    leased_at = time.monotonic() - (2 * FRESH_SECONDS if is_late else 0.0)
    handover.on_refused(Hello("new", "worker", ""), [HandedCopy(copy, leased_at, 1.0, b"")])
    await until(lambda: [copy] in contents.queued().values())
    assert redis_client.zcard(keys.BUSY + "new") == is_late
    await staging.drain()
    await ledger.aclose()
