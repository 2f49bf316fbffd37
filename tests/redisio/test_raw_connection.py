"""redis-py has the private side that relay.redisio.raw_connection was written for; another version fails here first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import redis
import redis.asyncio
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import ReadOnlyError, ResponseError

from relay.redisio import raw_connection
from support.waiting import PATIENCE, until


@pytest.fixture(params=[2, 3])
async def client(request: pytest.FixtureRequest, redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    made = redis.asyncio.Redis.from_url(redis_url, protocol=request.param)
    yield made
    await made.aclose()


class _Reply(asyncio.Protocol):
    def __init__(self) -> None:
        self.octets: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.octets.set_result(data)


async def test_a_transport_can_be_taken_over_and_given_back(client: redis.asyncio.Redis) -> None:
    """What Redis says goes to our protocol meanwhile, and to redis-py's again afterwards."""
    connection = await raw_connection.living(client.connection_pool)
    transport = raw_connection.transport(connection)
    owner, ours = transport.get_protocol(), _Reply()
    transport.set_protocol(ours)
    transport.write(b"PING\r\n")
    assert await asyncio.wait_for(ours.octets, PATIENCE) == b"+PONG\r\n"
    transport.set_protocol(owner)
    await client.connection_pool.release(connection)
    assert await client.ping()


async def test_errors_are_redis_py_s_own(client: redis.asyncio.Redis) -> None:
    """A caller that knows redis-py's errors catches these."""
    connection = await raw_connection.living(client.connection_pool)
    parse = raw_connection.error_parser(connection)
    assert isinstance(parse("READONLY You can't write against a read only replica."), ReadOnlyError)
    assert isinstance(parse("ERR unknown command"), ResponseError)
    await raw_connection.discard(client.connection_pool, connection)


async def test_a_connection_that_was_closed_at_rest_is_replaced(
    client: redis.asyncio.Redis, redis_client: redis.Redis
) -> None:
    """The transport that is handed out is open, whatever became of the kept one."""
    kept = await raw_connection.living(client.connection_pool)
    await client.connection_pool.release(kept)
    redis_client.client_kill_filter(_type="normal", skipme=True)
    await until(lambda: kept._reader is None or kept._reader._eof)  # the loop has been told
    connection = await raw_connection.living(client.connection_pool)
    assert not raw_connection.transport(connection).is_closing()
    await connection.send_command("PING")
    assert await connection.read_response() in {b"PONG", "PONG"}
    await client.connection_pool.release(connection)


async def test_a_closed_connection_has_no_transport(client: redis.asyncio.Redis) -> None:
    """It may be closed as soon as it has been opened; uvloop would raise a RuntimeError at the first write."""
    connection = await raw_connection.living(client.connection_pool)
    raw_connection.transport(connection).abort()
    with pytest.raises(NoConnection):
        raw_connection.transport(connection)
    await connection.disconnect(nowait=True)
    with pytest.raises(NoConnection):
        raw_connection.transport(connection)
    await client.connection_pool.release(connection)
