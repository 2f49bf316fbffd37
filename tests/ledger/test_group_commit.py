"""Group commit: a group is written as a whole, and every caller gets its own answer."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import hiredis
import pytest
import redis
import redis.asyncio
from loguru import logger
from rq.job import Job
from rq.serializers import JSONSerializer

from relay.ledger import keys
from relay.ledger.changes import Released, Staged
from relay.ledger.group_commit import GroupCommit
from relay.ledger.rq_jobs import Dispatcher, queue
from support.waiting import PATIENCE, until
from workers.delivery.outbox import Outbox

MANY = 9000  # Lua takes fewer arguments than this

Answer = Callable[[int, list[bytes]], Awaitable[bytes]]


class Watched(str):
    """An item whose end can be seen."""

    __slots__ = ("__weakref__",)


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[redis.asyncio.Redis]:
    """A server of Redis's protocol: ``answer`` is asked with the connection's number for each EVAL."""
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        number, commands = len(connections), hiredis.Reader()
        while data := await reader.read(65536):
            commands.feed(data)
            while (command := commands.gets()) is not False:
                writer.write(await answer(number, command) if command[0] == b"EVAL" else b"+OK\r\n")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = redis.asyncio.Redis(port=port, protocol=2, retry=None)
    try:
        yield client
    finally:
        await client.aclose()
        server.close()
        for connection in connections:
            connection.close()


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with AsyncExitStack() as ends:
        client = redis.asyncio.Redis.from_url(redis_url)
        ends.push_async_callback(client.aclose)
        yield client


async def test_thousands_at_once(connection: redis.asyncio.Redis, redis_client: redis.Redis) -> None:
    """However many messages leave in one group, none is lost between two lists."""
    commit = GroupCommit(connection, seconds=PATIENCE)
    ids = [f"m{n}" for n in range(MANY)]
    await asyncio.gather(*(commit.submit("stage", Staged(i, (b"record",), 1.0)) for i in ids))
    moved = await asyncio.gather(*(commit.submit("release", Released(i, ("new", "other"))) for i in ids))
    assert sum(moved) == MANY
    assert redis_client.zcard(keys.STAGED) == 0
    assert {redis_client.zcard(keys.PENDING + name) for name in ("new", "other")} == {MANY}


async def test_large_records_are_staged_as_small_ones_are(
    connection: redis.asyncio.Redis, redis_client: redis.Redis
) -> None:
    """Several at once, in parts: each is listed, whole, and can be released."""
    commit = GroupCommit(connection, seconds=PATIENCE)
    ids, body = ["a", "b", "c"], b"x" * 400_000
    await asyncio.gather(*(commit.submit("stage", Staged(i, (i.encode(), body), 7.5), 400_001) for i in ids))
    assert redis_client.zrange(keys.STAGED, 0, -1, withscores=True) == [(i.encode(), 7.5) for i in ids]
    assert redis_client.mget([keys.MESSAGE + i for i in ids]) == [i.encode() + body for i in ids]
    assert await commit.submit("release", Released("a", ("new",))) == 1


@pytest.mark.parametrize("size", [400, 400_000])
async def test_a_record_that_does_not_fit_is_not_half_there(
    connection: redis.asyncio.Redis, redis_client: redis.Redis, size: int
) -> None:
    """A full Redis takes neither the body nor its place in the list, and who asked hears why."""
    commit = GroupCommit(connection, seconds=PATIENCE)
    before = redis_client.config_get("maxmemory")["maxmemory"]
    redis_client.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(redis.ResponseError, match="memory"):
            await commit.submit("stage", Staged("a", (b"x" * size,), 1.0), size)
    finally:
        redis_client.config_set("maxmemory", before)
    assert not redis_client.exists(keys.STAGED, keys.MESSAGE + "a")
    await commit.submit("stage", Staged("b", (b"record",), 1.0))
    assert redis_client.get(keys.MESSAGE + "b") == b"record"


async def test_thousands_are_settled_at_once(connection: redis.asyncio.Redis, redis_client: redis.Redis) -> None:
    """Nor do outcomes that had to wait for Redis grow too many to be written."""
    ids = [f"m{n}" for n in range(MANY)]
    redis_client.zadd(keys.PENDING + "new", dict.fromkeys(ids, 1.0))
    outbox = Outbox(connection, redis_client, "new")
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(outbox.settle(i) for i in ids))
    assert redis_client.zcard(keys.PENDING + "new") == 0


async def test_a_late_answer_is_nobody_elses() -> None:
    """A connection whose answer did not come in time is never used again: the next answer on it would be the last's."""
    released = asyncio.Event()

    async def answer(number: int, command: list[bytes]) -> bytes:
        if number == 1:
            await released.wait()
        return b"*1\r\n:%d\r\n" % number

    async with answering(answer) as client:
        commit = GroupCommit(client, seconds=0.2, flights=1)
        with pytest.raises((redis.RedisError, TimeoutError)):
            await commit.submit("release", Released("a", ()))
        await commit.drain()
        released.set()
        assert [await commit.submit("release", Released(i, ())) for i in "bc"] == [2, 2]


async def test_what_has_its_answer_is_not_kept_in_memory() -> None:
    """While one write hangs, the messages of those that go on beside it are not piled up behind it."""
    hangs, goes_on = asyncio.Event(), asyncio.Event()

    async def answer(_number: int, command: list[bytes]) -> bytes:
        if b"hangs" in command:
            hangs.set()
            await goes_on.wait()
        return b":1\r\n"

    async with answering(answer) as client:
        commit = GroupCommit(client, seconds=PATIENCE)
        first = commit.submit("discard", "hangs")
        await hangs.wait()
        item = Watched("goes on")
        watched = weakref.ref(item)
        done = commit.submit("discard", item)
        del item
        assert await done == 1
        await until(lambda: watched() is None)
        assert not first.done()
        goes_on.set()
        await first


async def test_each_of_several_drains_ends() -> None:
    """Who drains is told when all has landed, also beside another who drains, and one who gave up."""
    goes_on = asyncio.Event()

    async def answer(_number: int, _command: list[bytes]) -> bytes:
        await goes_on.wait()
        return b":1\r\n"

    async with answering(answer) as client:
        commit = GroupCommit(client, seconds=PATIENCE)
        done = commit.submit("discard", "a")
        drains = [asyncio.ensure_future(commit.drain()) for _ in range(3)]
        await asyncio.sleep(0)
        drains[1].cancel()
        await asyncio.wait([drains[1]])
        goes_on.set()
        async with asyncio.timeout(PATIENCE / 2):
            await asyncio.gather(drains[0], drains[2])
        assert done.result() == 1


async def test_a_fault_of_ours_does_not_end_dispatching(
    connection: redis.asyncio.Redis, redis_client: redis.Redis
) -> None:
    """What nobody foresaw when a job is written is told, and tried again: no id is dropped."""

    class Faulty(redis.asyncio.ConnectionPool):
        faults = 1

        async def get_connection(self, *args: Any, **options: Any) -> Any:
            if self.faults:
                self.faults -= 1
                raise LookupError("unforeseen")
            return await super().get_connection(*args, **options)

    said: list[str] = []
    sink = logger.add(said.append)
    pool = Faulty(**connection.connection_pool.connection_kwargs)
    pool.connection_class = connection.connection_pool.connection_class
    dispatcher = Dispatcher(redis.asyncio.Redis(connection_pool=pool))
    dispatcher.add("new", "m1")
    await until(lambda: redis_client.llen(queue(redis_client, "new").key) == 1)
    await pool.disconnect()
    logger.remove(sink)
    assert "unforeseen" in "".join(said)


async def test_a_drain_leaves_nothing_behind(connection: redis.asyncio.Redis, redis_client: redis.Redis) -> None:
    """What came while a job was being written has one too before the process ends, not only when it is missed."""
    dispatcher = Dispatcher(connection)
    for n in range(105):
        dispatcher.add("new", f"m{n}")
    await dispatcher.drain()
    jobs = Job.fetch_many(
        [i.decode() for i in redis_client.lrange(queue(redis_client, "new").key, 0, -1)],
        connection=redis_client,
        serializer=JSONSerializer,
    )
    assert [i for job in jobs if job for i in job.args[1]] == [f"m{n}" for n in range(105)]


async def test_a_relay_makes_jobs_of_as_many_copies_as_it_is_told(
    connection: redis.asyncio.Redis, redis_client: redis.Redis
) -> None:
    """``workers.batch`` is the limit of what is released together, and of what comes from the spool."""
    dispatcher = Dispatcher(connection, job_size=2)
    for n in range(5):
        dispatcher.add("new", f"m{n}")
    await dispatcher.drain()
    await dispatcher.put("new", ["m5", "m6", "m7"])
    jobs = queue(redis_client, "new").get_jobs()
    assert [job.args[1] for job in jobs] == [["m0", "m1"], ["m2", "m3"], ["m4"], ["m5", "m6"], ["m7"]]


async def test_a_fault_of_ours_does_not_end_the_outbox(
    connection: redis.asyncio.Redis, redis_client: redis.Redis
) -> None:
    """Nor does it leave a job waiting for an outcome that nobody writes any more."""
    faults = [LookupError("unforeseen")]

    def change(_pipe: object) -> None:
        if faults:
            raise faults.pop()

    said: list[str] = []
    sink = logger.add(said.append)
    async with asyncio.timeout(PATIENCE):
        await Outbox(connection, redis_client, "new").write(change)
    logger.remove(sink)
    assert "unforeseen" in "".join(said)
