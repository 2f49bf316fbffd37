"""The housekeeping ends as soon as it is told to, whatever its tasks wait for."""

from __future__ import annotations

import select
import threading
from functools import partial
from pathlib import Path

import pytest
import redis

from relay.stopping import StopEvent
from relay.trace import collector, remote_lookup
from relay.trace.remote_lookup import keep_answering
from support.traced import Traced
from support.waiting import PATIENCE, wait_until

FOR_EVER = 1000.0  # seconds


def test_a_task_that_waits_for_something_else_hears_of_the_end(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace's tasks wait for datagrams and for questions in Redis: neither delays a stop."""
    monkeypatch.setattr(remote_lookup, "_LISTEN_SECONDS", int(FOR_EVER))
    monkeypatch.setattr(collector, "_WAIT", FOR_EVER)
    traced, stop = Traced(tmp_path), StopEvent()
    threads = [
        threading.Thread(target=task, args=(stop,), daemon=True)
        for task in (
            traced.collector.run,
            partial(keep_answering, partial(redis.Redis.from_url, redis_url), tmp_path, "h"),
        )
    ]
    for thread in threads:
        thread.start()
    wait_until(lambda: redis_client.info("clients")["blocked_clients"] == 1)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    traced.close()


def test_a_stop_calls_who_waits_and_nobody_else() -> None:
    """Who begins to wait when it is set already is called at once; who has ended waiting is not."""
    called: list[str] = []
    stop = StopEvent()
    with stop.calling(lambda: called.append("before")):
        pass
    with stop.calling(lambda: called.append("during")), stop.readable() as sock:
        assert not select.select([sock], [], [], 0)[0]
        stop.set()
        assert select.select([sock], [], [], 0)[0]
    with stop.calling(lambda: called.append("after")), stop.readable() as sock:
        assert select.select([sock], [], [], 0)[0]
    assert called == ["during", "after"]
