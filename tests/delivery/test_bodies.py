"""Bodies of claimed copies: what unfolds to much is not unfolded ahead, and what is no record holds up nobody."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
import redis

from relay.config.model import RedisSettings
from relay.ledger import changes, keys
from relay.mail import record
from relay.redisio.clients import async_client
from relay.redisio.pipeline import Pipelines
from support.ledger_contents import Contents
from support.reactions import Gate
from support.running_courier import at_the_dot, at_work
from support.scripted_server import ScriptedServer
from support.waiting import until
from workers.delivery.bodies import Bodies


async def test_what_unfolds_to_much_waits_for_its_turn(redis_client: redis.Redis, redis_url: str) -> None:
    """A few octets in Redis may be a hundred megabytes: they are counted as what they are, not as they are stored."""
    contents = Contents(redis_client)
    small = contents.pending("a@test")
    large = contents.pending("a@test", body=b"Subject: x\r\n\r\n" + (b"0" * 76 + b"\r\n") * 100_000)
    assert redis_client.strlen(keys.MESSAGE + large) < 10_000
    client = async_client(RedisSettings(redis_url, 5), 5)
    bodies = Bodies(Pipelines(client), client)
    await bodies.read_ahead(contents.claim("job", small, large))
    assert bodies.at_hand(small) is not None
    assert bodies.at_hand(large) is None
    message = await bodies.take(large)
    assert message is not None
    assert len(message.body) > 7_000_000
    await client.aclose()


async def test_a_large_one_stops_nobody(redis_client: redis.Redis, redis_url: str) -> None:
    """While it is unfolded and checked, the event loop goes on, and so does every other thread."""
    contents = Contents(redis_client)
    large = contents.pending("a@test", body=b"Subject: x\r\n\r\n" + b"..\r\n" * 12_000_000)
    client = async_client(RedisSettings(redis_url, 5), 5)
    bodies = Bodies(Pipelines(client), client)
    worst = 0.0
    taking = asyncio.create_task(bodies.take(large))
    while not taking.done():
        # Processor time: how busy the machine is does not count.
        begun, used = time.perf_counter(), time.process_time()
        await asyncio.sleep(0.001)
        worst = max(worst, min(time.perf_counter() - begun, time.process_time() - used))
    assert (await taking) is not None
    assert worst < 0.15
    await client.aclose()


async def test_a_message_of_another_type_of_key(
    redis_client: redis.Redis, redis_url: str, backup: ScriptedServer
) -> None:
    """It fails with the reason, and those in the same job are delivered."""
    contents = Contents(redis_client)
    ids = [contents.pending(f"{n}@test") for n in range(5)]
    redis_client.delete(keys.MESSAGE + ids[2])
    redis_client.lpush(keys.MESSAGE + ids[2], "no record")
    async with at_work(redis_url, backup) as work:
        work.add(ids)
        await until(lambda: len(backup.messages) == 4)
        await until(lambda: contents.failed_ids() == [ids[2]])
    assert "another type of key" in contents.state(ids[2], failure=True).last_reply


async def test_what_another_has_delivered_meanwhile_is_not_lost(
    redis_client: redis.Redis, redis_url: str, backup: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease had ended, so two had it in hand: a body that went with its last copy is not said to be missing."""
    told: list[str] = []
    monkeypatch.setattr("relay.maillog.body_missing", lambda message_id, _name: told.append(message_id))
    contents = Contents(redis_client)
    noise = random.Random(1).randbytes(600 << 10).hex().encode()
    lines = b"".join(noise[i : i + 76] + b"\r\n" for i in range(0, len(noise), 76))
    slow = contents.pending("slow@test", sender="slow@test")
    delivered, lost = (contents.pending(f"{n}@test", body=b"Subject: x\r\n\r\n" + lines) for n in range(2))
    gate = Gate()
    backup.replies["."] = at_the_dot("slow", (gate, None))
    async with at_work(redis_url, backup, connections=1) as work:
        work.add([slow, delivered, lost])
        await until(lambda: gate.reached)
        with redis_client.pipeline() as pipe:
            changes.settle(pipe, "new", [delivered])  # by the other worker
            pipe.execute()
        assert not contents.has_body(delivered)
        redis_client.delete(keys.MESSAGE + lost)
        backup.replies.clear()
        gate.open()
        await until(lambda: not contents.pending_ids())
        await until(lambda: not redis_client.exists(keys.BUSY + "new", keys.HOLDERS + "new"))
    assert told == [lost]
    assert len(backup.messages) == 1


def test_the_check_finds_a_lone_dot_anywhere() -> None:
    """Also where two slices of the search meet."""
    for at in range(record._SLICE - 5, record._SLICE + 5):
        body = b"x" * at + b"\r\n.\r\n"
        assert record._has(record._LONE_DOT, body)
    assert not record._has(record._LONE_DOT, b"x" * (record._SLICE + 3))
