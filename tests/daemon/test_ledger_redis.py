"""The Redis of a start."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from relay.command.connection import ledger_of
from relay.daemon import ledger_redis
from relay.ledger import overview
from support.ledger_contents import settings
from support.redis_servers import RedisServer
from support.waiting import wait_until


def test_one_that_cannot_save(tmp_path: Path) -> None:
    """MISCONF: it refuses writes, and PING. That keeps no relay from starting, and no command from reading."""
    server = RedisServer(tmp_path, stop_writes_on_bgsave_error="yes", save="3600 1").start()
    try:
        with server.client() as client:
            folder, name = (client.config_get(key)[key] for key in ("dir", "dbfilename"))
            Path(folder, name).mkdir()  # where the snapshot is to be
            client.bgsave()
            wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")
            with pytest.raises(redis.ResponseError, match="MISCONF"):
                client.ping()
        given = settings(redis_url=server.url, state_dir=str(tmp_path))
        ledger_redis._wait_for_redis(given, may_be_away=False)
        with ledger_of(given) as connection:
            assert overview.summary(connection) == []
    finally:
        server.kill()  # it does not end in order without a snapshot
