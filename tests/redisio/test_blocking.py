"""A command that waits in Redis ends when somebody wants that, in whatever state it is."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from redis.exceptions import ConnectionError as NoConnection

from relay.redisio import raw_connection
from relay.redisio.blocking import Blocking
from support.redis_servers import RedisServer
from support.waiting import PATIENCE, wait_until

WAIT = ("BLMOVE", "here", "there", "LEFT", "RIGHT", 0)  # for ever


@pytest.fixture
def blocking(redis_url: str) -> Iterator[Blocking]:
    with redis.Redis.from_url(redis_url) as client:
        yield Blocking(client)


def waits(client: redis.Redis) -> bool:
    return client.info("clients")["blocked_clients"] == 1


def begin(blocking: Blocking) -> tuple[threading.Thread, list[object]]:
    replies: list[object] = []
    thread = threading.Thread(target=lambda: replies.append(blocking.execute(*WAIT)), daemon=True)
    thread.start()
    return thread, replies


def test_replies_come_as_ever(blocking: Blocking, redis_client: redis.Redis) -> None:
    redis_client.rpush("here", "a", "b")
    assert [blocking.execute(*WAIT) for _ in range(2)] == [b"a", b"b"]
    assert blocking.execute("BLPOP", "here", 0.01) is None
    assert not blocking.is_ended


def test_who_waits_is_ended_and_takes_nothing_afterwards(blocking: Blocking, redis_client: redis.Redis) -> None:
    """When it has returned, Redis has let go of it: what comes then stays where it is."""
    thread, replies = begin(blocking)
    wait_until(lambda: waits(redis_client))
    blocking.end()
    thread.join(PATIENCE)
    redis_client.rpush("here", "a")
    assert (replies, redis_client.lrange("here", 0, -1)) == ([None], [b"a"])


def test_what_was_answered_before_the_end_is_returned(
    blocking: Blocking, redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply that is on its way when the end comes is read all the same."""
    redis_client.rpush("here", "a")
    connection = blocking._pool.get_connection()
    blocking._pool.release(connection)
    read = connection.read_response

    def end_first() -> object:
        wait_until(lambda: redis_client.llen("there") == 1)
        blocking.end()
        return read()

    monkeypatch.setattr(connection, "read_response", end_first)
    assert blocking.execute(*WAIT) == b"a"


def test_none_is_begun_after_the_end(blocking: Blocking, redis_client: redis.Redis) -> None:
    redis_client.rpush("here", "a")
    blocking.end()
    blocking.end()
    assert blocking.execute(*WAIT) is None
    assert redis_client.lrange("here", 0, -1) == [b"a"]


@pytest.mark.parametrize("moment", ["get_connection", "send_command"])
def test_an_end_at_any_moment_is_seen(blocking: Blocking, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Before it has a connection, and before the command is sent."""
    connection = blocking._pool.get_connection()
    blocking._pool.release(connection)
    of = blocking._pool if moment == "get_connection" else connection
    step = getattr(of, moment)

    def end_first(*words: object) -> object:
        blocking.end()
        return step(*words)

    monkeypatch.setattr(of, moment, end_first)
    assert blocking.execute(*WAIT) is None


def test_a_redis_that_goes_is_an_error(redis_factory: Callable[..., RedisServer]) -> None:
    """Without an end it is redis-py's own; with one it is the end."""
    server = redis_factory()
    with redis.Redis.from_url(server.url) as client:
        blocking = Blocking(client)
        server.stop()
        with pytest.raises(NoConnection):
            blocking.execute(*WAIT)
        blocking.end()
        assert blocking.execute(*WAIT) is None


def test_a_signal_handler_may_end_it(redis_url: str, redis_client: redis.Redis) -> None:
    """In the thread that waits: there the system call is resumed after the handler."""
    program = (
        "import signal, sys, redis; from relay.redisio.blocking import Blocking; "
        f"blocking = Blocking(redis.Redis.from_url({redis_url!r})); "
        "signal.signal(signal.SIGTERM, lambda *_: blocking.end()); "
        f"sys.exit(7 if blocking.execute(*{WAIT!r}) is None else 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(raw_connection.__file__).parents[2])
    wait_until(lambda: waits(redis_client))
    process.terminate()
    assert process.wait(PATIENCE) == 7
