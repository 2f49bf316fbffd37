"""A batch sent past redis-py's pipeline does and says what that does, and a broken one leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as NoAnswer
from redis.retry import Retry

from relay.redisio import blocking_batch


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client with one connection: what a batch leaves on it is found by the next one."""
    retry = Retry(NoBackoff(), 1)
    with redis.Redis.from_url(redis_url, max_connections=1, retry=retry, socket_timeout=60) as made:
        yield made


def fill(pipe: Pipeline) -> None:
    pipe.hset("hash", mapping={"text": "ä", "number": 1, "part": 0.5, "octets": b"\xff"})
    pipe.zadd("set", {"member": 1.5})
    pipe.hget("hash", "text")
    pipe.lrange("list", 0, -1)


@pytest.mark.parametrize("transaction", [True, False])
def test_replies_are_those_of_redis(client: redis.Redis, transaction: bool) -> None:
    with client.pipeline(transaction=transaction) as pipe:
        fill(pipe)
        assert blocking_batch.execute(pipe) == [4, 1, "ä".encode(), []]
    with client.pipeline(transaction=transaction) as pipe:
        fill(pipe)
        assert pipe.execute() == [0, 0, "ä".encode(), []]


@pytest.mark.parametrize("transaction", [True, False])
def test_an_error_is_raised_and_the_connection_stays_in_step(client: redis.Redis, transaction: bool) -> None:
    """The others have been done, as in redis-py's pipeline."""
    with client.pipeline(transaction=transaction) as pipe:
        pipe.set("text", "x")
        pipe.hset("text", "field", "x")
        pipe.incr("count")
        with pytest.raises(ResponseError, match="WRONGTYPE"):
            blocking_batch.execute(pipe)
    assert client.mget("text", "count") == [b"x", b"1"]


def test_what_redis_refuses_to_queue_is_not_done(client: redis.Redis) -> None:
    """The error says why, not only that EXEC was aborted."""
    with client.pipeline() as pipe:
        pipe.incr("count")
        pipe.execute_command("NO-SUCH-COMMAND")
        with pytest.raises(ResponseError, match="unknown command"):
            blocking_batch.execute(pipe)
    assert client.get("count") is None


def test_a_replica_refuses_as_ever(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")
    try:
        with client.pipeline() as pipe:
            fill(pipe)
            with pytest.raises(ReadOnlyError):
                blocking_batch.execute(pipe)
    finally:
        client.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    ("last", "error"),
    [(("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no"), NoConnection), (("BLPOP", "nothing", "0"), NoAnswer)],
)
def test_a_batch_without_its_answers_is_sent_once_more(
    redis_url: str, last: tuple[str, ...], error: type[RedisError]
) -> None:
    """Cut off or late: what still comes is never taken for the reply to the next batch."""
    retry = Retry(NoBackoff(), 1)
    with redis.Redis.from_url(redis_url, max_connections=1, retry=retry, socket_timeout=0.5) as client:
        with client.pipeline(transaction=False) as pipe:
            pipe.incr("count")
            pipe.execute_command(*last)
            pipe.get("count")
            with pytest.raises(error):
                blocking_batch.execute(pipe)
        with client.pipeline(transaction=False) as pipe:
            pipe.get("count")
            assert blocking_batch.execute(pipe) == [b"2"]
