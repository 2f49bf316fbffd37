"""A Redis whose settings are changed while mail goes on: the log says so, once, and when it is over."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from relay.config.loader import load
from relay.monitoring import promises
from support.redis_servers import RedisServer
from support.waiting import wait_until

SETTINGS = {"appendonly": "no", "appendfsync": "everysec", "maxmemory-policy": "allkeys-lru"}


def test_changed_while_it_runs(redis_factory: Callable[..., RedisServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, each once; one that hangs meanwhile changes nothing of what is known."""
    told: list[tuple[str, str]] = []
    monkeypatch.setattr("relay.maillog.notice", lambda _level, text, about, **_: told.append((text, about)))
    server = redis_factory()
    settings = load({"redis.url": server.url, "redis.timeout_seconds": "1"}, {}, (), require_primary=False)
    stop = threading.Event()
    looks: list[int] = []
    found = promises.Promises.hear

    def hear(self: promises.Promises, answers: list[object]) -> None:
        found(self, answers)  # type: ignore[arg-type]  # as it came
        looks.append(len(answers))

    monkeypatch.setattr(promises.Promises, "hear", hear)
    thread = threading.Thread(target=promises.keep_looking, args=(settings, server.url, stop, 0.02))
    thread.start()
    try:
        with server.client() as client:
            before = {name: client.config_get(name)[name] for name in SETTINGS}
            wait_until(lambda: len(looks) > 2)
            assert told == []
            for name, value in SETTINGS.items():
                client.config_set(name, value)
            broken = {("a copy may be lost", f"redis {name}") for name in SETTINGS}
            wait_until(lambda: set(told) == broken)
            server.pause()
            wait_until(lambda: looks[-1] == 1)
            server.resume()
            wait_until(lambda: looks[-1] > 1)
            assert len(told) == len(broken)
            for name, value in before.items():
                client.config_set(name, value)
            again = {("Redis keeps this promise again", f"redis {name}") for name in SETTINGS}
            wait_until(lambda: set(told) == broken | again)
            assert len(told) == len(broken) + len(again)
    finally:
        stop.set()
        thread.join()
