"""The ledger at a glance: what `queue summary`, `top` and the page say of each backup."""

from __future__ import annotations

import socket

import redis

from relay.ledger import changes, health, hosts, overview
from support.ledger_contents import Contents


def test_a_worker_that_stands_still(redis_client: redis.Redis) -> None:
    """It is told for its own backup, or for all that share it, unless the backup is held or the host silent."""
    contents = Contents(redis_client, "new")
    contents.pending()
    now = changes.now(redis_client)

    def tell(*still: str, at: float = now) -> tuple[str, str]:
        hosts.tell(redis_client, "here", "up", 1, 0, 0.0, at, still)
        (row,) = overview.summary(redis_client)
        return row.state, row.reason

    here = socket.gethostname()
    assert tell() == ("ok", "")
    assert tell("worker-new-1 (process 5)") == ("still", f"worker-new-1 (process 5) at {here} stands still")
    assert tell("worker-shared (process 5)")[0] == "still"
    assert tell("worker-new-2-1 (process 5)", "relay-1 (process 6)", "housekeeping (process 7)") == ("ok", "")
    assert tell("worker-new-1 (process 5)", at=now - 2 * hosts.LATE) == ("ok", "")
    health.hold(redis_client, "new", 60, "why", "me")
    assert tell("worker-new-1 (process 5)")[0] == "held"
