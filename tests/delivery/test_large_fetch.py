"""A large record comes out of Redis as it went in, and the connection is as good afterwards as before."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import redis.asyncio
import uvloop
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import ResponseError

from relay.redisio import raw_connection
from support.waiting import PATIENCE
from workers.delivery.large_fetch import fetch

# Around what is read first, and around what a socket holds.
SIZES = [0, 1, 20, *range(54, 66), 70, 65_536, 3_000_000]


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    client = redis.asyncio.Redis.from_url(redis_url, socket_timeout=PATIENCE)
    yield client
    await client.aclose()


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_what_was_written_is_read(run, protocol: int, redis_url: str, redis_client: redis.Redis) -> None:
    """Whatever its size, beside others, and by one connection after the other's kind of read."""

    async def read() -> None:
        client = redis.asyncio.Redis.from_url(redis_url, socket_timeout=PATIENCE, protocol=protocol)
        try:
            for value in values:
                redis_client.set("record", value)
                found = await asyncio.gather(fetch(client, "record"), fetch(client, "nothing"), fetch(client, "record"))
                assert [f and bytes(f) for f in found] == [value and value, None, value and value]
                assert found[0] is not None
                assert await client.get("record") == value
        finally:
            await client.aclose()

    values = [os.urandom(size) for size in SIZES]
    run(read())


async def test_an_error_is_one(client: redis.asyncio.Redis, redis_client: redis.Redis) -> None:
    """What Redis refuses is told in its words, however long, and nothing of them is left for the next command."""
    redis_client.lpush("list", "x")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await fetch(client, "list")
    assert await client.get("nothing") is None


@asynccontextmanager
async def breaking_off(*, closes: bool, patience: float) -> AsyncIterator[redis.asyncio.Redis]:
    """A Redis that begins a reply to GET, and then closes the connection or says nothing more."""
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        while asked := await reader.read(65536):
            if b"GET" in asked:
                writer.write(b"$1000000\r\n" + b"x" * 300_000)
                if closes:
                    writer.close()
            else:
                writer.write(b"+OK\r\n" * asked.count(b"*"))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = redis.asyncio.Redis(port=port, protocol=2, socket_timeout=patience, retry=None)
    try:
        yield client
    finally:
        await client.aclose()
        server.close()
        for connection in connections:
            connection.close()


async def test_a_reply_that_breaks_off_is_no_record() -> None:
    """A Redis that goes away in the middle of a body is trouble with Redis, not a short body."""
    async with breaking_off(closes=True, patience=PATIENCE) as client:
        with pytest.raises(NoConnection):
            await fetch(client, "record")


async def test_a_silent_redis_is_not_waited_for() -> None:
    """The client's own time-out holds, and the rest of that reply is nobody's: its connection is not used again."""
    async with breaking_off(closes=False, patience=0.2) as client:
        with pytest.raises(TimeoutError):
            await fetch(client, "record")
        assert await client.execute_command("ECHO", "anything") == b"OK"


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_connection_that_is_lost_before_the_question(run, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis may die as soon as the connection is there: an error that the caller knows, and no connection is kept."""

    opened = raw_connection.living

    async def living(pool: Any) -> Any:
        connection = await opened(pool)
        raw_connection.transport(connection).abort()
        await asyncio.sleep(0.05)
        return connection

    async def read() -> None:
        client = redis.asyncio.Redis.from_url(redis_url, socket_timeout=PATIENCE)
        with monkeypatch.context() as patched:
            patched.setattr(raw_connection, "living", living)
            with pytest.raises(NoConnection):
                await fetch(client, "record")
        assert await client.get("record") is None
        await client.aclose()

    run(read())
