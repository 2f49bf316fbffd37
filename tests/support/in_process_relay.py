"""One relay process in the test's own event loop: a real listening port, a real pool to a real primary, a ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from relay.client.pool import Pool
from relay.config.loader import Settings, load
from relay.config.model import RedisSettings
from relay.ledger.monitor import Monitor
from relay.ledger.rq_jobs import Dispatcher
from relay.mail.ids import IdSource
from relay.redisio.clients import async_client
from relay.smtpd import commands
from relay.smtpd.context import Context
from relay.smtpd.credentials import Credentials
from relay.smtpd.primary import Primary
from relay.smtpd.shared_counters import ProcessCounters
from relay.smtpd.snapshot import Snapshot
from relay.smtpd.staging import Staging
from support import ended_loops

# A server that says nothing is given up after relay.timeout_seconds, which the defaults leave for minutes.
IMPATIENT = {"relay.greeting_timeout_seconds": "1", "relay.command_timeout_seconds": "1"}


def settings_of(primary: str, settings: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of a relay without backups."""
    flags = {"relay.destination_primary": primary, "relay.timeout_seconds": "5", **IMPATIENT, **(settings or {})}
    return load(flags, {}, ())


@asynccontextmanager
async def serve(settings: Settings, redis_url: str, *, tls: bool = False) -> AsyncIterator[tuple[Context, int]]:
    """Serve clients on the port that is yielded, as one relay process does; with ``tls`` from the first octet."""
    assert settings.primary is not None
    pool = Pool(settings.primary, local_hostname="localhost", timeouts=settings.relay.timeouts, limit=100)
    ledger, bulk = async_client(RedisSettings(redis_url, 5), 5), async_client(RedisSettings(redis_url, 5), 5)
    watch = Monitor(ledger, seconds=5, processes=1)
    staging = Staging(
        ledger, bulk, Dispatcher(ledger), watch, stage_seconds=5, deadline_seconds=630, hold_seconds=3600, spool=None
    )
    counters = ProcessCounters.shared_by(1)[0]
    made = Context(
        settings=settings,
        snapshot=Snapshot(
            Primary(settings.primary, pool, timeouts=settings.relay.timeouts, final_timeout=600), settings.backups
        ),
        staging=staging,
        ids=IdSource(),
        counters=counters,
        credentials=Credentials.load(settings.smtp),
    )
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(partial(commands.take, made, tls=tls), "127.0.0.1", 0)
    try:
        yield made, listener.sockets[0].getsockname()[1]
    finally:
        await ended_loops.close(listener)
        made.stopping = True
        while made.command_loops:
            for client in list(made.command_loops):
                client.stop(impatient=True)
            await asyncio.sleep(0.01)
        for _ in range(20):  # what closing TLS schedules
            await asyncio.sleep(0)
        await pool.close()
        await ledger.aclose()
        await bulk.aclose()
