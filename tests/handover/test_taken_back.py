"""What is leased to a worker and never gets there: the relay ends the lease while it is certain to be nobody's yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from relay import unix_sockets
from relay.config.model import RedisSettings
from relay.handover.frames import FRESH_SECONDS, HandedCopy, Hello, Limits, folder_of, ledger_of
from relay.handover.handover import Handover
from relay.ledger import changes, keys
from relay.ledger.changes import Released
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail.envelope import Envelope
from relay.mail.ids import IdSource
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from relay.redisio.clients import async_client
from relay.smtpd.staging import Staging
from support.ledger_contents import Contents
from support.redis_servers import RedisServer
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


async def test_the_answer_to_a_release_is_lost(redis_factory: Callable[..., RedisServer], tmp_path: Path) -> None:
    """Redis has leased the copy, and its relay does not know: the job that comes then finds no lease."""
    server = redis_factory()
    client = server.client()
    contents = Contents(client, "new")
    folder = folder_of(tmp_path)
    folder.mkdir(0o700)
    listener = unix_sockets.listening(folder, "new.sock", 1)
    ledger = async_client(RedisSettings(server.url, 5), 5, retries=0)
    handover = Handover(tmp_path, server.url)
    watch = Monitor(ledger, seconds=5, processes=1)
    staging = Staging(
        ledger,
        ledger,
        Dispatcher(ledger),
        watch,
        stage_seconds=0.5,
        deadline_seconds=60,
        hold_seconds=60,
        handover=handover,
    )
    following = asyncio.ensure_future(handover.follow())
    await until(lambda: bool(handover._lines))
    worker, _ = listener.accept()
    worker.sendall(Hello("new", "worker", ledger_of(server.url)).packed() + Limits(10, 1 << 20).packed())
    await until(lambda: handover._line_of("new", 0) is not None)
    envelope = Envelope(IdSource().next(), "a@test", (Recipient("b@test"),), 0.0, 2, destinations=("new",))
    await staging.stage(Message(envelope, b"x\r\n"))
    server.pause()
    await staging.release(Released(envelope.id, ("new",)))
    server.resume()
    await until(lambda: [envelope.id] in contents.queued().values())
    assert contents.pending_ids() == [envelope.id]
    assert not client.exists(keys.BUSY + "new", keys.HOLDERS + "new")
    await staging.drain()
    following.cancel()
    handover.close()
    worker.close()
    listener.close()
    await ledger.aclose()
    client.close()
